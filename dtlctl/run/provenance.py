"""Where, how and when a result was made."""

from __future__ import annotations

import platform
import resource
import sys
import time
from typing import Any

import torch

from dtlctl import __version__


def circumstances(device: torch.device, processes: int) -> dict[str, Any]:
    """A part of a sidecar that no result depends on."""
    from accelerate import __version__ as accelerate_version

    return {
        "peak_memory_bytes": _peak_memory(device),
        "processes": processes,
        "device": _name(device),
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
