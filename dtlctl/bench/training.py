"""How many images a second training takes here: on ready tensors, as `pretrain` does it, and by a plain script.

The plain script is what people write to train a network on a `datasets` table. Where timm is, its loader takes part.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import chain, product, repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dtlctl.bench.meter import Setup, Way
from dtlctl.console.devices import clock
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
from dtlctl.training.resume import State

WARM_UP = 3  # steps of every way before any is timed
IMAGES = 1 << 14  # of the plain script: enough for any number of steps, and their files fit in memory
Turn = Callable[[int, int], float]
"""(number of the first step, steps) -> seconds that the steps took, to the end of what the device was given."""
Flow = tuple[Turn, int]
"""Turns, and how many batches are decoded ahead of them."""


class Ready(Batches):
    """One batch that is on the device already, whatever the step: no data work at all."""

    def __init__(self, batch: Batch):
        self.batch, self.batch_size, self.share = batch, len(batch.y), Share()

    def __getitem__(self, step: int) -> Batch:
        return self.batch


def run(setup: Setup, data: str, steps: int) -> dict[str, Any]:
    """The benchmark as the command line asks for it. `data` is what a recipe takes as data.source.path.

    Raises RecipeError for a call that is wrong, DataError for images that cannot be read.
    """
    try:
        networks.check(setup.arch, setup.stem, None, setup.image_size)
        kinds = Dataset(path=data, decode="cache"), Dataset(path=data, decode="stream")
        sources = [Source(one, "source") for one in kinds]
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

    def ours(batches: Batches, channels_last: bool = setup.channels_last) -> Turn:
        model = setup.network(source=classes)
        model.channels_last = channels_last
        return _turn(engine, engine.place(model, global_batch_norm=True), batches, plan)

    more: Any = {"batch_size": size, "augment": "crop-flip", "seed": 0, "device": engine.device}
    batches, streamed = (Batches(one.pixels, one.labels, np.arange(count), **more) for one in (kept, looked_at))
    ready, other = Ready(batches[0]), "ready-contiguous" if setup.channels_last else "ready-channels-last"
    ways: dict[Way, Flow] = {
        ("ready", None): (ours(ready), 0),
        (other, None): (ours(ready, not setup.channels_last), 0),
        ("dtlctl", None): (ours(batches), 0),
        ("stream", None): (ours(streamed), AHEAD),
        ("decode", None): (_timed(streamed.__getitem__, engine.device), AHEAD),
    }
    images = _table(sources[0], setup)
    for way, workers in product(("plain", "timm") if find_spec("timm") else ("plain",), sorted({0, cores() - 1})):
        ways[way, workers] = _plain(images, setup, classes, workers, plan, engine.device, by_timm=way == "timm")
    seconds = setup.seconds({way: partial(_a_step, *turn, steps) for way, turn in ways.items()})
    told = {"data": data, "images": count, "steps": steps}
    return told | setup.document(engine.device, compared(seconds, size), cores=cores())


def _turn(engine: Engine, model: networks.Classifier, batches: Batches, plan: Training) -> Turn:
    objective, silent, size = cross_entropy(model, "source", batches), Progress("", 0, enabled=False), plan.batch_size

    def turn(first: int, steps: int) -> float:
        begun: Any = {"reports": 1, "state": State(step=first)}  # no turn sees the images of the one before again
        return engine.train(model, objective, plan, first + steps, size, silent, lambda _: {}, **begun).seconds

    return turn


def _timed(step: Callable[[int], object], device: torch.device) -> Turn:
    def turn(first: int, steps: int) -> float:
        started = clock(device)
        for number in range(first, first + steps):
            step(number)
        return clock(device) - started

    return turn


def _a_step(turn: Turn, ahead: int, steps: int, number: int) -> float:
    """Seconds a step of one turn. Batches that may be decoded ahead are used up untimed; no two turns have one."""
    first, length = number * (steps + 2 * ahead), steps if number else WARM_UP
    if ahead:
        turn(first, ahead)
    return turn(first + ahead, length) / length


def plain_network(setup: Setup, classes: int) -> nn.Module:
    """The bench's network with torch's own convolutions, as torchvision has it."""
    ours = setup.network(source=classes)
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return nn.Sequential(ours.backbone, ours.heads["source"])


def _table(source: Source, setup: Setup) -> Any:
    """The first training images, still encoded, as a `datasets.Dataset` of `image` and `label`."""
    import datasets

    with TemporaryDirectory() as scratch:
        opened = source.rows("train", setup.image_size, Path(scratch))
        kept = np.flatnonzero(opened.labels >= 0)[: max(setup.batch_size, IMAGES)].tolist()
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        columns = {"image": list(opened.pictures(kept)), "label": opened.labels[kept]}
        return datasets.Dataset.from_dict(columns, features=features)


def _plain(
    images: Any, setup: Setup, classes: int, workers: int, plan: Training, device: torch.device, by_timm: bool = False
) -> Flow:
    """What torch's and torchvision's own tutorials do: a DataLoader over images that are transformed one by one."""
    from torchvision import transforms as T

    size, on_gpu = setup.image_size, device.type == "cuda"
    transforms = [
        *([] if images[0]["image"].size == (size, size) else [T.Resize(size), T.CenterCrop(size)]),
        T.RandomCrop(size, padding=size // 8),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    options: Any = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": on_gpu}
    if by_timm:
        loader = _of_timm(images, setup, transforms, device, options)
    else:
        prepared = images.with_transform(partial(_prepare, T.Compose(transforms)))
        loader = DataLoader(prepared, setup.batch_size, shuffle=True, drop_last=True, **options)
    model = plain_network(setup, classes).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    source = chain.from_iterable(repeat(loader))

    def step(_: int) -> None:
        batch = next(source)
        x, y = (part.to(device, non_blocking=True) for part in (batch if by_timm else batch.values()))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=setup.precision == "bfloat16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return _timed(step, device), 2 * workers + on_gpu  # a DataLoader's, and one of timm's prefetcher


def _of_timm(images: Any, setup: Setup, transforms: list[Any], device: torch.device, options: Any) -> Any:
    """timm's loader of the same table; on a GPU with its prefetcher, which makes floats of bytes there."""
    from timm.data import ImageDataset, create_loader
    from timm.data.transforms import ToNumpy
    from torchvision.transforms import Compose

    on_gpu, shape = device.type == "cuda", (3, setup.image_size, setup.image_size)
    prepared = ImageDataset("", Encoded(images))
    more: Any = {"is_training": True, "use_prefetcher": on_gpu, "device": device, **options}
    loader = create_loader(prepared, shape, setup.batch_size, **more)
    prepared.transform = Compose([*transforms[:-2], ToNumpy()] if on_gpu else transforms)
    return loader


class Encoded:
    """A table as timm reads one: a file and a label a row."""

    def __init__(self, images: Any):
        import datasets

        self.images = images.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        row = self.images[index]
        return BytesIO(row["image"]["bytes"]), row["label"]


def _prepare(transform: Callable[[Any], Tensor], examples: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    return {"x": [transform(image.convert("RGB")) for image in examples["image"]], "y": examples["label"]}


def compared(seconds: dict[Way, list[float]], batch_size: int) -> list[dict[str, Any]]:
    """Rows: medians, and how many times as fast each way is as `ready` and as the faster of the plain scripts."""
    medians = {way: median(turns) for way, turns in seconds.items()}
    fastest = min(took for (way, _), took in medians.items() if way == "plain")
    return [
        {"way": way, "workers": workers, "seconds": took, "images_per_second": batch_size / took,
         "to_ready": medians["ready", None] / took, "to_plain": fastest / took, "turns": seconds[way, workers]}
        for (way, workers), took in medians.items()
    ]  # fmt: skip


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
