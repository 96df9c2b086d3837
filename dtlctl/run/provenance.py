"""Where a result comes from: the datasets as the recipe had them, the machine, the time and the versions.

The key of a result knows its images by content, which nobody has at hand who only reads sidecars. So a sidecar keeps
the recipe's tables too, outside the key: the same images may well be somewhere else by now.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
from pydantic import Field

from dtlctl import __version__
from dtlctl.data.cache import Images
from dtlctl.data.dataset import Dataset
from dtlctl.data.subset import per_class
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.strict import Strict


class Origin(Strict):
    """One dataset, as the recipe had it, and the sizes of its train split."""

    table: Dataset
    train_images: int = Field(ge=1)
    classes: int = Field(ge=1)
    smallest_class: int = Field(ge=1)

    def drawn(self, fraction: float) -> int:
        """How many images that fraction draws: as many are the same ones."""
        if fraction == 1:
            return self.train_images
        return self.classes * per_class(fraction, self.train_images, self.classes, self.smallest_class)


def origin(dataset: Dataset, train: Images) -> dict[str, Any]:
    """An `Origin` as JSON, for a sidecar. train: the train split."""
    smallest = int(np.bincount(train.labels, minlength=len(train.classes)).min())
    sizes = {"train_images": len(train.labels), "classes": len(train.classes), "smallest_class": smallest}
    return {"table": dataset.model_dump(mode="json"), **sizes}


def differs(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> bool:
    """Whether the result was certainly made from other images than the recipe says, or with other augmentation.

    Certainly, because a dataset of another name may be the same one; see `renamed`. Raises KeyError, TypeError or
    ValueError for a sidecar that does not say.
    """
    for role in job.roles:
        was, now = _read(sidecar, role), recipe.data.of(role)
        if was.table.augment != now.augment or was.drawn(was.table.fraction) != was.drawn(now.fraction):
            return True
    return False


def renamed(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> dict[str, str]:
    """By role, what the recipe calls a dataset otherwise than the result did, in words: these may be one dataset."""
    found = {}
    for role in job.roles:
        was, now = _read(sidecar, role).table, recipe.data.of(role)
        names = sorted(Dataset.model_fields.keys() - {"fraction", "augment"})
        if changed := [name for name in names if getattr(was, name) != getattr(now, name)]:
            before, after = (", ".join(_say(table, name) for name in changed) for table in (was, now))
            found[role] = f"made with {before}; the recipe has {after}"
    return found


def circumstances(device: torch.device, processes: int) -> dict[str, Any]:
    """The part of a sidecar that no result depends on: memory, processes, device, time, versions."""
    from accelerate import __version__ as accelerate_version

    on_gpu = device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if on_gpu else (platform.processor() or device.type),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "dtlctl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate_version,
        },
    }


def _read(sidecar: dict[str, Any], role: str) -> Origin:
    """What the sidecar says of the role; "finished": its data may be out of reach where it is read."""
    return Origin.model_validate(sidecar["datasets"][role], context={"finished": True})


def _say(table: Dataset, name: str) -> str:
    value = getattr(table, name)
    return f"no {name}" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"
