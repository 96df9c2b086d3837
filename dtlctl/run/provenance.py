"""Where a result comes from: the datasets as the recipe had them, the machine, the time and the versions.

The key of a result knows its images by content, which nobody has at hand who only reads sidecars. So a sidecar keeps
the recipe's tables too, outside the key.
"""

import json
import platform
import sys
import time
from typing import Any

import numpy as np
import torch

from dtlctl import __version__
from dtlctl.console import devices
from dtlctl.data.dataset import Dataset
from dtlctl.data.entry import Images
from dtlctl.data.subset import sizes
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe


def origin(dataset: Dataset, train: Images) -> dict[str, Any]:
    """One dataset for a sidecar: its table in the recipe and the sizes of its train split, of which `train` is all."""
    counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
    return {"table": dataset.model_dump(mode="json"), "class_images": counts}


def differs(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> bool:
    """Whether the result was certainly made from other images than the recipe says, or with other augmentation.

    Certainly, because a dataset of another name may be the same one; see `renamed`. Raises AttributeError, KeyError or
    TypeError for a sidecar that does not say.
    """
    for role in job.roles:
        was, now = sidecar["datasets"][role], recipe.data.of(role)
        then, counts = was["table"], was["class_images"]
        before = sizes(counts, then["fraction"], then["balance"])
        if then["augment"] != now.augment or before != sizes(counts, now.fraction, now.balance):
            return True
    return False


def renamed(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> dict[str, str]:
    """By role, what the recipe calls a dataset otherwise than the result did, in words: these may be one dataset."""
    found = {}
    for role in job.roles:
        was, now = sidecar["datasets"][role]["table"], recipe.data.of(role).model_dump(mode="json")
        names = sorted(now.keys() - {"fraction", "balance", "augment", "decode"})
        if changed := [key for key in names if now[key] != was.get(key)]:
            before, after = (
                ", ".join(f"{key} = {json.dumps(table.get(key), ensure_ascii=False)}" for key in changed)
                for table in (was, now)
            )
            found[role] = f"made with {before}; the recipe has {after}"
    return found


def circumstances(device: torch.device, processes: int) -> dict[str, Any]:
    """The part of a sidecar that no result depends on: memory, processes, device, time, versions."""
    import resource  # not on Windows, where `dtlctl.load` works

    from accelerate import __version__ as accelerate_version

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "peak_memory_bytes": devices.peak(device) or peak,
        "processes": processes,
        "device": devices.name(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "dtlctl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate_version,
        },
    }
