"""How many images a second training takes here: on ready tensors, as `pretrain` does it, and by a plain script."""

from collections.abc import Callable
from statistics import median
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from torch import Tensor

from dtlctl.bench import meter, plain
from dtlctl.console import devices
from dtlctl.console.machine import cores
from dtlctl.console.progress import Progress
from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.data.stream import AHEAD
from dtlctl.data.tensors import Batch, Batches, Share
from dtlctl.errors import RecipeError
from dtlctl.model import networks
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.settings import Training
from dtlctl.training.engine import Engine

WARM_UP = 3  # steps of every way before any is timed
DECODE: tuple[Literal["cache", "stream"], ...] = ("cache", "stream")
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


def run(setup: meter.Setup, data: str, steps: int) -> dict[str, Any]:
    """The benchmark as the command line asks for it. `data` is what a recipe takes as data.source.path.

    Raises RecipeError for a call that is wrong, DataError for images that cannot be read.
    """
    try:
        networks.check(setup.arch, setup.stem, None, setup.image_size)
        sources = [Source(Dataset(path=data, decode=way), "source") for way in DECODE]
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(f"bench: --data: {reason}") from None
    except ValueError as error:
        raise RecipeError(f"bench: {error}") from None
    with Progress("decode", 1, enabled=not setup.quiet) as progress:
        kept, looked_at = (cache.load(one, "train", setup.image_size, progress=progress.at) for one in sources)
    size, count = setup.batch_size, len(kept.labels)
    if count < size:
        raise RecipeError(f"bench: --batch-size {size}: {data} has only {count} training images")
    engine, classes = Engine(setup.precision), len(kept.classes)
    plan = Training(steps=steps, batch_size=size, lr=0.01, schedule="constant")

    def ours(batches: Batches, channels_last: bool) -> Turn:
        model = setup.network(source=classes)
        model.channels_last = channels_last
        return _turn(engine, engine.place(model, global_batch_norm=True), batches, plan)

    more: Any = {"batch_size": size, "augment": "crop-flip", "seed": 0, "device": engine.device}
    batches, streamed = (Batches(one.pixels, one.labels, np.arange(count), **more) for one in (kept, looked_at))
    ready, other = Ready(batches[0]), "ready-contiguous" if setup.channels_last else "ready-channels-last"
    turns: dict[Way, Turn] = {
        ("ready", None): ours(ready, setup.channels_last),
        (other, None): ours(ready, not setup.channels_last),
        ("dtlctl", None): ours(batches, setup.channels_last),
        ("stream", None): _in_flow(ours(streamed, setup.channels_last)),
        ("decode", None): _in_flow(_fetching(streamed, engine)),
    }
    table = plain.table(sources[0], setup)
    for workers in sorted({0, cores() - 1}):
        turns["plain", workers] = plain.turns(table, setup, classes, workers, plan, engine.device)
    progress = Progress("bench", (setup.repeats + 1) * len(turns), enabled=not setup.quiet)
    with networks.precision(setup.precision), progress:
        seconds = measure(turns, steps, setup.repeats, progress)
    told = {"data": data, "images": count, "steps": steps}
    return told | setup.document(engine.device, compared(seconds, size), cores=cores())


def _turn(engine: Engine, model: networks.Classifier, batches: Batches, plan: Training) -> Turn:
    objective, silent = cross_entropy(model, "source", batches), Progress("", 0, enabled=False)

    def turn(first: int, steps: int) -> float:
        def onwards(step: int) -> tuple[Tensor, dict[str, Tensor]]:
            return objective(first + step)  # no turn sees the images of the one before again

        return engine.train(model, onwards, plan, steps, plan.batch_size, silent, lambda _: {}, reports=1).seconds

    return turn


def _fetching(batches: Batches, engine: Engine) -> Turn:
    """Batches, and nothing done with them."""

    def turn(first: int, steps: int) -> float:
        started = devices.clock(engine.device)
        for step in range(first, first + steps):
            batches[step]
        return devices.clock(engine.device) - started

    return turn


def _in_flow(turn: Turn) -> Turn:
    """Batches that were decoded before the turn are used up untimed; no two turns have a batch in common."""

    def later(first: int, steps: int) -> float:
        start = first * (1 + AHEAD)
        turn(start, AHEAD)
        return turn(start + AHEAD, steps)

    return later


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
    seconds = {row["way"]: row["seconds"] for row in document["rows"]}
    if "stream" in seconds:
        share = max(seconds["ready"], seconds["decode"]) / seconds["stream"]
        lines.append(f"stream has {100 * share:.0f} % of the speed of the slower of ready and decode")
    return "\n".join(lines)
