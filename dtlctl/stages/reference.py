"""Reference models for RMIA and LiRA: is the model surer of this image than models that never saw it?

The attacker knows the model's source head, the images with their true labels, and how the model was pre-trained. He
trains reference models himself, each on a random half of all images, members and non-members alike.
"""

from functools import lru_cache, partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dtlctl.attacks import signals
from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batch, Batches
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.run.experiment import Experiment
from dtlctl.stages.readout import seen

SPLITS: tuple[Split, Split] = ("train", "test")
FEW = 16
"""Below so many models that never saw an image, LiRA takes one deviation for all images."""


class References(NamedTuple):
    """What models that never saw an image said of it: `signals.scaled` answers."""

    out: dict[Split, np.ndarray]
    """[images of the split, references / 2]; of the train split, nan outside of the source's subset."""
    a: float
    """RMIA's, tuned on the first reference in the target's place; the paper's constant where there are but two."""
    variance: float | None
    """LiRA's, where there are few: the mean over all images of the variance of what was said of each."""


@lru_cache(maxsize=1)
def answers(experiment: Experiment, count: int) -> References:
    """What `count` (even) models say that are trained as `pretrain` says, in pairs on complementary random halves."""
    rows, tested = experiment.data.index("source"), len(experiment.data.images("source", "test").labels)
    done, images = experiment.results.reference_answers(), len(rows) + tested
    said, inside = np.zeros((count, images)), np.zeros((count, images), bool)
    for number in range(count):
        places = _half(experiment, number, images)
        form = Annotated[list[float], Field(min_length=images, max_length=images)]
        train_one = partial(_reference, experiment, number, count, places)
        said[number], inside[number, places] = done.common(experiment.engine, f"{number}", form, train_one), True
    out = np.where(inside[::2], said[1::2], said[::2]).T
    a = signals.OFFLINE
    if count > 2:  # of the first pair's own, one was trained on every image: the others are asked
        a = signals.offline_a(torch.from_numpy(said[0]), torch.from_numpy(out[:, 1:]), inside[0])
    train = np.full((len(experiment.data.images("source", "train").labels), count // 2), np.nan)
    train[rows] = out[: len(rows)]
    variance = float(out.var(1).mean()) if count // 2 < FEW else None
    return References({"train": train, "test": out[len(rows) :]}, a, variance)


def missing(experiment: Experiment, count: int) -> int:
    """How many of `count` references have yet to be trained."""
    done = experiment.results.reference_answers()
    return sum(not done.has(f"{number}", list[float]) for number in range(count))


def _half(experiment: Experiment, number: int, images: int) -> np.ndarray:
    """Sorted places of the images that a reference is trained on."""
    order = np.random.default_rng(experiment.recipe.stream(f"audit/references/{number // 2}")).permutation(images)
    return np.sort(np.split(order, [images // 2])[number % 2])


def _reference(experiment: Experiment, number: int, count: int, inside: np.ndarray) -> list[float]:
    """Train one reference on the images at these places (of the train subset, then the test split); its answers."""
    settings, tag, engine = experiment.recipe.pretrain, f"audit/reference/{number}", experiment.engine
    train, test, rows = *(experiment.data.images("source", s) for s in SPLITS), experiment.data.index("source")
    model = experiment.trainer.new_model({"source": len(train.classes)}, tag)
    batches = Batches(
        [train.pixels, test.pixels],
        np.concatenate([train.labels, test.labels]),
        np.concatenate([rows, len(train.labels) + np.arange(len(test.labels))])[inside],
        batch_size=settings.batch_size,
        augment=experiment.recipe.data.source.augment,
        seed=experiment.recipe.stream(tag),
        device=engine.device,
        share=engine.share,
    )
    steps = settings.total_steps(batches.images)
    with experiment.processes.progress(f"audit/reference {number + 1} of {count}", steps) as bar:
        objective = cross_entropy(model, "source", batches, settings.label_smoothing)
        engine.train(model, objective, settings, steps, batches.batch_size, bar, lambda step: {})
    model.eval()

    def answer(batch: Batch) -> Tensor:
        return signals.scaled(model(batch.x, "source"), batch.y)

    said = [seen(experiment, "source", *side, answer) for side in zip(SPLITS, (rows, None), strict=True)]
    return torch.cat(said).tolist()
