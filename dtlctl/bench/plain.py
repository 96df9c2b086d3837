"""The script that people write to train a network on a `datasets` table, for `bench --train`."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dtlctl.bench.meter import Setup
from dtlctl.console.devices import clock
from dtlctl.data.sources import Source
from dtlctl.recipe.settings import Training

IMAGES = 1 << 14  # as many are enough for any number of steps, and their files fit in memory


def network(setup: Setup, classes: int) -> nn.Module:
    """The bench's network with torch's own convolutions, as torchvision has it."""
    ours = setup.network(source=classes)
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return nn.Sequential(ours.backbone, ours.heads["source"])


def table(source: Source, setup: Setup) -> Any:
    """The first training images, still encoded, as a `datasets.Dataset` of `image` and `label`."""
    import datasets

    with TemporaryDirectory() as scratch:
        opened = source.rows("train", setup.image_size, Path(scratch))
        kept = np.flatnonzero(opened.labels >= 0)[: max(setup.batch_size, IMAGES)].tolist()
        pictures = [{"bytes": p, "path": None} if isinstance(p, bytes) else p for p in opened.pictures(kept)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict({"image": pictures, "label": opened.labels[kept]}, features=features)


def turns(
    images: Any, setup: Setup, classes: int, workers: int, plan: Training, device: torch.device
) -> Callable[[int, int], float]:
    """(number of the first step, steps) -> seconds, of what torch's and torchvision's own tutorials do.

    A DataLoader over images that are transformed one by one. Batches that workers made beforehand are used up untimed.
    """
    from torchvision import transforms as T

    size, on_gpu = setup.image_size, device.type == "cuda"
    steps = [
        *([] if images[0]["image"].size == (size, size) else [T.Resize(size), T.CenterCrop(size)]),
        T.RandomCrop(size, padding=size // 8),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    options: Any = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    prepared = images.with_transform(partial(_prepare, T.Compose(steps)))
    loader = DataLoader(prepared, setup.batch_size, pin_memory=on_gpu, **options)
    model = network(setup, classes).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    source, waiting = chain.from_iterable(repeat(loader)), workers * (loader.prefetch_factor or 0)

    def turn(first: int, steps: int) -> float:
        started = clock(device)
        for step in range(waiting + steps):
            if step == waiting:
                started = clock(device)
            batch = next(source)
            x, y = batch["x"].to(device, non_blocking=True), batch["y"].to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=setup.precision == "bfloat16"):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return clock(device) - started

    return turn


def _prepare(transform: Callable[[Any], Tensor], examples: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    return {"x": [transform(image.convert("RGB")) for image in examples["image"]], "y": examples["label"]}
