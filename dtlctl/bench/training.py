"""How many images a second training takes here: on ready tensors, as `pretrain` does it, and by a plain script."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dtlctl.bench import meter, plain
from dtlctl.console.machine import cores
from dtlctl.console.progress import Progress
from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.tensors import Batch, Batches, Share
from dtlctl.errors import RecipeError
from dtlctl.model import networks
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.settings import Training
from dtlctl.training.engine import Engine

WARM_UP = 3  # steps of every way before any is timed
Way = tuple[str, int | None]
"""A name, and the number of workers of a plain script."""
Turn = Callable[[int, int], float]
"""(number of the first step, steps) -> seconds that the steps took, to the end of what the device was given."""


class Ready(Batches):
    """One batch that is on the device already, whatever the step: no data work at all."""

    def __init__(self, batch: Batch):
        self.batch, self.batch_size, self.share = batch, len(batch.y), Share()

    def __getitem__(self, step: int) -> Batch:
        return self.batch


def run(
    arch: str,
    stem: str,
    image_size: int,
    batch_size: int,
    precision: networks.Precision,
    repeats: int,
    channels_last: bool,
    data: str,
    steps: int,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """The benchmark as the command line asks for it. `data` is what a recipe takes as data.source.path.

    `ready` and `dtlctl` lay images out as `channels_last` says, one more way on a ready batch as it does not.

    Raises RecipeError for a call that is wrong, DataError for images that cannot be read.
    """
    try:
        networks.check(arch, stem, None, image_size)
        dataset = Dataset(path=data)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"bench: --data: {reason}") from None
    except ValueError as error:
        raise RecipeError(f"bench: {error}") from None
    with Progress("decode", 1, enabled=not quiet) as progress:
        images = cache.load(dataset, "train", image_size, role="source", progress=progress.at)
    if len(images.labels) < batch_size:
        raise RecipeError(f"bench: --batch-size {batch_size}: {data} has only {len(images.labels)} training images")
    engine, classes, count = Engine(precision), len(images.classes), cores()
    plan = Training(steps=steps, batch_size=batch_size, lr=0.01, schedule="constant")

    def network(channels_last: bool) -> networks.Classifier:
        torch.manual_seed(0)
        model = networks.build(arch, {"source": classes}, stem=stem, image_size=image_size)
        model.precision, model.channels_last = precision, channels_last
        return engine.place(model, global_batch_norm=True)

    turns = _ours(engine, network, channels_last, images, plan)
    table = plain.table(dataset, image_size, batch_size)
    for workers in sorted({0, count - 1}):
        loader = plain.batches(table, image_size, batch_size, workers, engine.device)
        model = plain.network(arch, stem, image_size, classes).to(engine.device)
        turns["plain", workers] = plain.turns(model, loader, plan, precision, engine.device)
    with networks.precision(precision), Progress("bench", (repeats + 1) * len(turns), enabled=not quiet) as progress:
        seconds = measure(turns, steps, repeats, progress)
    settings = {"precision": precision, "batch_size": batch_size, "image_size": image_size, "arch": arch, "stem": stem}
    machine = {**meter.machine(engine.device), "cores": count, "channels_last": channels_last, **settings}
    counts = {"data": data, "images": len(images.labels), "steps": steps, "repeats": repeats}
    return {"machine": machine, **counts, "rows": compared(seconds, batch_size)}


def _ours(
    engine: Engine,
    network: Callable[[bool], networks.Classifier],
    channels_last: bool,
    images: cache.Images,
    plan: Training,
) -> dict[Way, Turn]:
    """The engine's loop on a ready batch, on the same in the other layout, and on all the images."""
    pixels, labels, device = images.pixels, images.labels, engine.device
    index, size = np.arange(len(labels)), plan.batch_size
    batches = Batches(pixels, labels, index, batch_size=size, augment="crop-flip", seed=0, device=device)
    ready = Ready(batches[0])
    other = "ready-contiguous" if channels_last else "ready-channels-last"
    return {
        ("ready", None): _turn(engine, network(channels_last), ready, plan),
        (other, None): _turn(engine, network(not channels_last), ready, plan),
        ("dtlctl", None): _turn(engine, network(channels_last), batches, plan),
    }


def _turn(engine: Engine, model: networks.Classifier, batches: Batches, plan: Training) -> Turn:
    objective, silent = cross_entropy(model, "source", batches), Progress("", 0, enabled=False)

    def turn(first: int, steps: int) -> float:
        def onwards(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            return objective(first + step)  # no turn sees the images of the one before again

        return engine.train(model, onwards, plan, steps, plan.batch_size, silent, lambda _: {}, reports=1).seconds

    return turn


def measure(turns: dict[Way, Turn], steps: int, repeats: int, progress: Progress) -> dict[Way, list[float]]:
    """Seconds a step of every way, one number a turn; the ways take turns, after a warm-up."""
    seconds: dict[Way, list[float]] = {way: [] for way in turns}
    for number in range(repeats + 1):
        length = steps if number else WARM_UP
        for way, turn in turns.items():
            took = turn(number * steps, length) / length
            if number:
                seconds[way].append(took)
            progress.advance(1)
            progress.show({f"{way[0]} s/step": took})
    return seconds


def compared(seconds: dict[Way, list[float]], batch_size: int) -> list[dict[str, Any]]:
    """Rows: medians, and how many times as fast each way is as `ready` and as the faster of the plain scripts."""
    medians = {way: median(turns) for way, turns in seconds.items()}
    fastest = min(took for (way, _), took in medians.items() if way == "plain")
    return [
        {
            "way": way,
            "workers": workers,
            "seconds": took,
            "images_per_second": batch_size / took,
            "to_ready": medians["ready", None] / took,
            "to_plain": fastest / took,
            "turns": seconds[way, workers],
        }
        for (way, workers), took in medians.items()
    ]


def text(document: dict[str, Any]) -> str:
    """The rows as lines of text."""
    machine = document["machine"]
    told = ("device", "threads", "cores", "precision", "batch_size", "channels_last")
    lines = [
        ", ".join(f"{key} {machine[key]}" for key in told),
        f"{machine['arch']}, stem {machine['stem']}, {machine['image_size']} pixels, "
        f"{document['images']} images of {document['data']}",
        f"{'way':20}{'workers':>8}{'s/step':>9}{'images/s':>10}{'x ready':>9}{'x plain':>9}",
    ]
    for row in document["rows"]:
        workers = "-" if row["workers"] is None else row["workers"]
        numbers = f"{row['seconds']:9.4f}{row['images_per_second']:10.0f}{row['to_ready']:9.3f}{row['to_plain']:9.2f}"
        lines.append(f"{row['way']:20}{workers:>8}{numbers}")
    return "\n".join(lines)
