"""Learning from labels: the loss of pre-training, fine-tuning and piggybacking."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from dtlctl.data.tensors import Batches
from dtlctl.model.networks import Classifier


def cross_entropy(
    model: Classifier, head: str, batches: Batches, smoothing: float = 0.0
) -> Callable[[int], tuple[Tensor, dict[str, Tensor]]]:
    """Mean cross-entropy of the global batch, in nats, as an objective of the engine; smoothing: of labels.

    Each process sums over its share and divides by the mean share: so the average over processes is the mean over
    images even where shares differ in size.
    """

    def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batches[step]
        model.train()
        total = F.cross_entropy(model(batch.x, head), batch.y, reduction="sum", label_smoothing=smoothing)
        loss = total * (batches.share.processes / batches.batch_size)
        return loss, {"loss": loss.detach()}

    return objective
