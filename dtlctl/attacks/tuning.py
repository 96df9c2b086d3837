"""Tuning an attacker: held-out images choose the setting and the step; those that judge him choose nothing."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from dtlctl.data.tensors import Batch, Batches
from dtlctl.errors import DataError
from dtlctl.model.networks import Classifier, rates

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
OPTIMIZERS = {"sgd": partial(SGD, momentum=MOMENTUM), "adam": Adam, "adamw": AdamW}
EVALUATIONS = 10
"""How often a model in training is tested on the held-out images."""


class Setting(NamedTuple):
    """One point of an attacker's grid."""

    kind: str
    optimizer: str | None
    """None for those who only fit a classifier to features"""
    rate: int | float  # as a file that is read again gives them: whole numbers stay whole
    """learning rate; of a probe C, the inverse strength of its L2 term; of knn the number of neighbours"""
    stage: str | None = None
    """whose features a probe sees: a stage's name, or embedding; None for those who train through the network"""
    amount: int | float | None = None
    """of what is done to the model beforehand: stages drawn anew, rank, bits of a weight, share of them zeroed (< 1)"""


class Evaluation(NamedTuple):
    """What the held-out images say after some steps: accuracy in %, cross-entropy in nats."""

    step: int
    accuracy: float
    loss: float

    @property
    def merit(self) -> tuple[float, float, int]:
        """Larger is better: accuracy, then loss (few images make many ties), then fewer steps."""
        return self.accuracy, -self.loss, -self.step


class Trial(NamedTuple):
    """One setting, trained on the attacker's training part; it never meets the images that judge him."""

    setting: Setting
    seed: int
    evaluations: list[Evaluation]
    """Empty where the training diverged before the first, or a probe's features are not finite."""
    acc_pl: float | None = None
    """% of the images that judge, once it was made again with all images that he has; None where that diverged."""
    table: dict[str, Any] | None = None
    """Of a search: the attacker who does this and nothing else, as a recipe would name him."""

    @property
    def best(self) -> Evaluation | None:
        return max(self.evaluations, key=lambda one: one.merit, default=None)

    def document(self, *, final: bool = False) -> dict[str, Any]:
        """As a sidecar keeps it, when it was tried, or at last made again."""
        step, val = self.best[:2] if self.best else (None, None)
        found = {"acc_pl": self.acc_pl} if final else {"evaluations": [list(one) for one in self.evaluations]}
        table = {"table": self.table} if self.table else {}
        return {**self.setting._asdict(), "seed": self.seed, "step": step, "val": val, **found, **table}


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows 0 ... N-1 with these labels (integers [N]) into (training, held-out) rows, both sorted.

    The held-out part has the same number of every class: `share` of the smallest class, at least one. Raises
    DataError for a class of one image.
    """
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    smallest = min(map(len, groups))
    if smallest < 2:
        raise DataError("images are held out: 2 or more of every class are needed")
    count = min(smallest - 1, max(1, round(share * smallest)))
    rng = np.random.default_rng(seed)
    held = np.sort(np.concatenate([rng.permutation(group)[:count] for group in groups]))
    return np.setdiff1d(np.arange(len(labels)), held), held


def choose(trials: Sequence[Trial]) -> Trial | None:
    """The trial that is best on the held-out images; of equals, the first. None where all of them diverged."""
    finite = [trial for trial in trials if trial.best]
    return max(finite, key=lambda trial: trial.best.merit if trial.best else (), default=None)


def factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step (0 <= step < steps) as a share of its peak: a linear rise, then a cosine to zero."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def train(
    model: Classifier,
    batches: Batches,
    setting: Setting,
    *,
    steps: int,
    warmup: float,
    weight_decay: float = WEIGHT_DECAY,
    layer_decay: float | None = None,
    unlabelled: Batches | None = None,
    threshold: float = 1.0,
    until: int | None = None,
    held_out: Callable[[], Iterable[Batch]] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Evaluation]:
    """Train all of `model` in place by cross-entropy, on this process alone, along a schedule of `steps` steps.

    layer_decay: of adamw, as `networks.rates` takes it. unlabelled: images to learn from too, by `pseudo_labelled`.
    until: stop after so many steps. held_out: batches to test the model on `EVALUATIONS` times, until its loss is not
    finite; it ends with the weights of its best test.
    """
    weights: Any = [p for p in model.parameters() if p.requires_grad]
    if layer_decay is not None:
        weights = rates(model, model.backbone, setting.rate, layer_decay)
    make: Any = OPTIMIZERS[setting.optimizer or "sgd"]
    optimizer = make(weights, setting.rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(min(step, steps - 1), steps, warmup))
    every, evaluations, best_state = max(1, steps // EVALUATIONS), [], None
    for step in range(until or steps):
        if stopped():
            break
        batch = batches[step]
        model.train()
        if unlabelled is None:
            loss = F.cross_entropy(model(batch.x), batch.y)
        else:
            own, others = model(torch.cat([batch.x, unlabelled[step].x])).tensor_split([len(batch.y)])
            loss = F.cross_entropy(own, batch.y) + pseudo_labelled(others, threshold)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if held_out is not None and ((step + 1) % every == 0 or step + 1 == steps):
            found = evaluate(model, held_out(), step + 1)
            if not math.isfinite(found.loss):
                break
            evaluations.append(found)
            if found == max(evaluations, key=lambda one: one.merit):
                best_state = copy.deepcopy(model.state_dict())
    if best_state is not None:
        model.load_state_dict(best_state)
    return evaluations


def pseudo_labelled(logits: Tensor, threshold: float) -> Tensor:
    """Mean over logits [n, K] of the cross-entropy to the likeliest class (Lee 2013), 0 for those below the threshold.

    As in FixMatch (arXiv:2001.07685), of one view.
    """
    likelihood, labels = logits.detach().softmax(1).max(1)
    return (F.cross_entropy(logits, labels, reduction="none") * (likelihood >= threshold)).mean()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], step: int) -> Evaluation:
    """Accuracy and loss on this process alone, in eval mode; the loss tells of answers that are not finite."""
    model.eval()
    hits, loss, images = 0, 0.0, 0
    for batch in batches:
        logits = model(batch.x)
        hits += int((logits.argmax(1) == batch.y).sum())
        loss += float(F.cross_entropy(logits, batch.y, reduction="sum")) + 0 * float(logits.sum())
        images += len(batch.y)
    return Evaluation(step, 100 * hits / images, loss / images)


def evaluate_probe(fitted: Any, features: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Of scikit-learn's classifier: features that are not finite, and classes never fitted, are wrong answers."""
    usable = np.isfinite(features).all(1) & np.isin(labels, fitted.classes_)
    p = fitted.predict_proba(np.where(usable[:, None], features, 0))
    right = (fitted.classes_[p.argmax(1)] == labels) & usable
    places = np.searchsorted(fitted.classes_, labels).clip(max=len(fitted.classes_) - 1)
    own = p[np.arange(len(labels)), places] * usable
    return Evaluation(0, 100 * float(right.mean()), float(-np.log(own.clip(1e-12)).mean()))
