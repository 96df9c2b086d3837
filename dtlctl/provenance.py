"""Where, how and when a result was made."""

from __future__ import annotations

import platform
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from dtlctl import __version__, origins
from dtlctl.plan import Job

if TYPE_CHECKING:
    from dtlctl.experiment import Experiment


def circumstances(lab: Experiment, job: Job[Any]) -> dict[str, Any]:
    """The part of a sidecar that no result depends on."""
    from accelerate import __version__ as accelerate_version

    engine = lab.engine
    return {
        "datasets": origins.of(lab, job),
        "peak_memory_bytes": _peak_memory(engine.device),
        "processes": engine.processes,
        "device": _name(engine.device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "dtlctl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate_version,
        },
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (platform.processor() or device.type)


def _peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's peak where there is one, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
