"""What a network computes on the way to its answer, and the nearest neighbours of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from dtlctl.model import networks
from dtlctl.model.networks import Classifier

EMBEDDING = "embedding"
"""The name of what the heads see."""


@torch.no_grad()
def read(model: Classifier, images: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """Of images, in parts [n, 3, S, S]: the mean [N, C] of every stage by its name, first stage first; the embedding.

    The model is in eval mode. Of a network whose stages are not known there is the embedding alone.
    """
    names = [*(stage.name for stage in networks.stages(model.backbone)), EMBEDDING]
    found: list[list[np.ndarray]] = []
    with networks.watched(model.backbone) as seen:
        for x in images:
            seen.clear()
            embedding = model.embed(x)
            means = [pooled(output.to(embedding.dtype), model.backbone) for output in seen]
            found.append([part.cpu().numpy() for part in (*means, embedding)])
    return {name: np.concatenate(parts) for name, *parts in zip(names, *found, strict=True)}


def distinct(found: dict[str, np.ndarray]) -> list[str]:
    """The names of what `read` found, without a last stage whose mean is the embedding: a probe would be made twice."""
    *names, last = found
    same = names and found[names[-1]].shape == found[last].shape
    if same and np.allclose(found[names[-1]], found[last], rtol=1e-3, atol=1e-6, equal_nan=True):
        names.pop()
    return [*names, last]


def pooled(output: Tensor, backbone: nn.Module) -> Tensor:
    """[B, C] of maps [B, C, H, W] (of a Swin transformer [B, H, W, C]) or of tokens [B, T, C]."""
    if output.ndim == 4:
        return output.mean((1, 2) if isinstance(backbone, SwinTransformer) else (2, 3))
    return output.mean(1) if output.ndim == 3 else output


class Nearest:
    """The k nearest neighbours by the cosine of standardised features, each with a vote of 1 / distance.

    features: [N, F], finite; labels: integers [N]. What `Logistic` has, so that both are judged in the same way.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, k: int):
        from sklearn.neighbors import KNeighborsClassifier

        self.mean, self.scale, self.classes = features.mean(0), features.std(0) + 1e-6, np.unique(labels)
        voting = KNeighborsClassifier(min(k, len(labels)), metric="cosine", weights="distance")
        self._fitted = voting.fit((features - self.mean) / self.scale, labels)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n, classes that were seen]: the logarithm of the share of votes; a class without one has a thousandth."""
        return np.log(self._fitted.predict_proba((features - self.mean) / self.scale) + 1e-3)
