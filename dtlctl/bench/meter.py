"""The clock, the bytes of a step, and the machine that both were measured on."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a step needs at most, beyond what is held already."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc keeps what was freed, and a step would seem to need nothing
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    try:  # Linux forgets the highest resident size when told so
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        step()
        return None
    before = _kilobytes(status, "VmRSS")
    step()
    return 1024 * max(0, _kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on whatever is timed: the device, its instructions, threads, and torch's version."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
