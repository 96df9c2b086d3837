"""The script that people write to train a torchvision network on a `datasets` table, for `bench --train`.

It uses nothing of ours but the CIFAR ResNets and resnet10, which torchvision lacks.
"""

from __future__ import annotations

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

from dtlctl.bench.meter import clock
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import rows
from dtlctl.model import networks
from dtlctl.recipe.settings import Training

IMAGES = 1 << 14  # as many are enough for any number of steps, and their files fit in memory


def network(arch: str, stem: str, image_size: int, classes: int) -> nn.Module:
    """The network as torchvision makes it; what torchvision lacks is ours, with torch's own convolutions."""
    import torchvision

    torch.manual_seed(0)
    if arch not in torchvision.models.list_models(module=torchvision.models):
        ours = networks.build(arch, {"source": classes}, stem=stem, image_size=image_size)
        for module in ours.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d
        return nn.Sequential(ours.backbone, ours.heads["source"])
    size = {"image_size": image_size} if arch.startswith("vit_") else {}
    net = torchvision.models.get_model(arch, weights=None, num_classes=classes, **size)
    if stem == "small":
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def table(dataset: Dataset, image_size: int, least: int) -> Any:
    """The first training images, still encoded, as a `datasets.Dataset` of `image` and `label`: `least` or more."""
    import datasets

    with TemporaryDirectory() as scratch:
        opened = rows(dataset, "train", image_size, "source", Path(scratch))
        kept = np.flatnonzero(opened.labels >= 0)[: max(least, IMAGES)].tolist()
        pictures = [{"bytes": p, "path": None} if isinstance(p, bytes) else p for p in opened.pictures(kept)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict({"image": pictures, "label": opened.labels[kept]}, features=features)


def batches(images: Any, size: int, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """What torch's and torchvision's own tutorials do: a DataLoader over images that are transformed one by one."""
    from torchvision import transforms as T

    fitted = images[0]["image"].size == (size, size)
    steps = [
        *([] if fitted else [T.Resize(size), T.CenterCrop(size)]),
        T.RandomCrop(size, padding=size // 8),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return DataLoader(
        images.with_transform(partial(_prepare, T.Compose(steps))),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def _prepare(transform: Callable[[Any], Tensor], examples: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    return {"x": [transform(image.convert("RGB")) for image in examples["image"]], "y": examples["label"]}


def turns(
    model: nn.Module, loader: DataLoader, plan: Training, precision: networks.Precision, device: torch.device
) -> Callable[[int, int], float]:
    """(number of the first step, steps) -> seconds. Batches that workers made beforehand are used up untimed."""
    optimizer = torch.optim.SGD(model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay)
    source = chain.from_iterable(repeat(loader))
    waiting = loader.num_workers * (loader.prefetch_factor or 0)
    model.train()

    def turn(first: int, steps: int) -> float:
        started = clock(device)
        for step in range(waiting + steps):
            if step == waiting:
                started = clock(device)
            batch = next(source)
            x, y = batch["x"].to(device, non_blocking=True), batch["y"].to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return clock(device) - started

    return turn
