"""Reference models for RMIA: is the model surer of this image than models that never saw it?

The attacker knows the model's source head, the images with their true labels, and how the model was pre-trained. He
trains reference models himself, each on a random half of all images, members and non-members alike.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batches
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.training.finite import check_finite

if TYPE_CHECKING:
    from dtlctl.run.experiment import Experiment


SPLITS: tuple[Split, Split] = ("train", "test")


@lru_cache(maxsize=1)
def confidences(experiment: Experiment, count: int) -> dict[Split, dict[int, float]]:
    """The references' confidence in the true class, by row of the source's train subset and of its test split.

    `count` (even) models are trained as `pretrain` says, in pairs on complementary random halves, so that each
    image is unknown to half of them; only those are averaged. What each said is kept in the run's folder, for other
    models and later audits.
    """
    rows, tested = experiment.data.index("source"), len(experiment.data.images("source", "test").labels)
    done, sums = experiment.results.reference_answers(), np.zeros(len(rows) + tested)
    for number in range(count):
        inside, outside = _halves(experiment, number, len(sums))
        train_one = partial(_reference, experiment, number, count, inside, outside)
        form = Annotated[list[float], Field(min_length=len(outside), max_length=len(outside))]
        sums[outside] += done.common(experiment.engine, f"{number}", form, train_one)
    means = sums / max(1, count // 2)
    known = dict(zip(rows.tolist(), means[: len(rows)].tolist(), strict=True))
    return {"train": known, "test": dict(enumerate(means[len(rows) :].tolist()))}


def missing(experiment: Experiment, count: int) -> int:
    """How many of `count` references have yet to be trained."""
    done = experiment.results.reference_answers()
    return sum(not done.has(f"{number}", list[float]) for number in range(count))


def _halves(experiment: Experiment, number: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted places of the images that a reference is trained on, and of those that it never sees."""
    order = np.random.default_rng(experiment.recipe.stream(f"audit/references/{number // 2}")).permutation(images)
    halves = [np.sort(half) for half in np.split(order, [images // 2])]
    return halves[number % 2], halves[1 - number % 2]


def _reference(experiment: Experiment, number: int, count: int, inside: np.ndarray, outside: np.ndarray) -> list[float]:
    """Train one reference; its confidence in the true class of the images that it never saw.

    inside, outside: sorted places of images, those of the train subset first, then those of the test split.
    """
    settings, tag = experiment.recipe.pretrain, f"audit/reference/{number}"
    train, test, rows = *(experiment.data.images("source", s) for s in SPLITS), experiment.data.index("source")
    model = experiment.trainer.new_model({"source": len(train.classes)}, tag)
    batches = Batches(
        [train.pixels, test.pixels],
        np.concatenate([train.labels, test.labels]),
        np.concatenate([rows, len(train.labels) + np.arange(len(test.labels))])[inside],
        batch_size=settings.batch_size,
        augment=experiment.recipe.data.source.augment,
        seed=experiment.recipe.stream(tag),
        device=experiment.engine.device,
        share=experiment.engine.share,
    )
    steps = settings.total_steps(batches.images)
    with experiment.processes.progress(f"audit/reference {number + 1} of {count}", steps) as bar:
        objective = cross_entropy(model, "source", batches)
        experiment.engine.train(model, objective, settings, steps, batches.batch_size, bar, lambda step: {})
    parts = rows[outside[outside < len(rows)]], outside[outside >= len(rows)] - len(rows)
    found = torch.cat([_confidence(experiment, model.eval(), *side) for side in zip(SPLITS, parts, strict=True)])
    check_finite(found)
    return found.tolist()


@torch.no_grad()
def _confidence(experiment: Experiment, model: torch.nn.Module, split: Split, rows: np.ndarray) -> Tensor:
    """Of these rows of a split of the source: float64 [n], on the CPU."""
    batches, engine = experiment.trainer.split("source", split, rows), experiment.engine
    parts = [model(batch.x, "source").softmax(1).gather(1, batch.y[:, None])[:, 0] for batch in batches]
    return engine.gather(torch.cat([torch.zeros(0, device=engine.device), *parts])).double().cpu()
