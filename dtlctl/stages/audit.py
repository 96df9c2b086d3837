"""What a model still tells about its source training set: membership inference (section 4.4)."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from dtlctl.attacks.membership import judge
from dtlctl.data.tensors import Batch
from dtlctl.engine import History
from dtlctl.errors import DataError
from dtlctl.experiment import Experiment
from dtlctl.models import Classifier
from dtlctl.plan import Job
from dtlctl.recipe import Audit


def audit(lab: Experiment, job: Job[Audit]) -> None:
    """The loss attack (Yeom et al., arXiv:1709.01604): the smaller an image's loss, the likelier a member.

    Members are as many images of the source's training subset as there are non-members, the source's test split.
    The attacker knows the model with its source head and half of both groups.
    """
    started = time.perf_counter()
    model = lab.load_model(job.model).eval()
    train, test = lab.index("source"), np.arange(len(lab.images("source", "test").labels))
    count, seed = min(len(train), len(test)), lab.seed("audit")
    if count < 8:
        raise DataError(f"{job.title}: {count} members and non-members are too few; 8 of each are needed")
    rng = np.random.default_rng(seed)
    members, others = (np.sort(rng.permutation(rows)[:count]) for rows in (train, test))
    verdict = judge(
        -_losses(lab, model, lab.split("source", "train", members)),
        -_losses(lab, model, lab.split("source", "test", others)),
        seed,
    )
    history = History(seconds=time.perf_counter() - started)
    lab.publish(job, {"members": count, "others": count, "loss": verdict._asdict()}, history)


@torch.no_grad()
def _losses(lab: Experiment, model: Classifier, batches: Iterable[Batch]) -> np.ndarray:
    """The source cross-entropy of every image, in nats, from all processes."""
    parts = [F.cross_entropy(model(batch.x, "source"), batch.y, reduction="none") for batch in batches]
    return lab.engine.gather(torch.cat(parts)).double().cpu().numpy()
