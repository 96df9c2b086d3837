"""The accelerator of this process, if it has one: Accelerate's choice, and what torch tells of any kind of it."""

import os
import platform
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OFF = ("", "0", "no", "none", "false", "n", "f", "off", "auto")
NO_FLOAT64 = ("mps",)
ALONE = ("mps",)  # between these torch sends no messages


def kind() -> str:
    """What Accelerate takes here: "cuda", "mps", "xpu", ...; "cpu" where there is none, or where it is told so.

    Several processes take the CPU where their accelerators could send each other nothing.
    """
    told = os.environ.get("ACCELERATE_USE_CPU", "").strip().lower() not in OFF
    told = told or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not told else None
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return found.type if found and (alone or found.type not in ALONE) else "cpu"


def name(device: torch.device) -> str:
    """What it calls itself; of a CPU, as Linux tells it."""
    if ask := _of(device, "get_device_name"):
        return ask(device)
    found = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), found)
    return found if device.type == "cpu" else f"{found} {device.type}"


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if wait := _of(device, "synchronize"):
        wait()
    return time.perf_counter()


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free, and all, of an accelerator with memory of its own."""
    return ask(device) if (ask := _of(device, "mem_get_info")) else None


def peak(device: torch.device) -> int | None:
    """The most bytes that tensors have taken on an accelerator since the start, or since it was told to forget."""
    return ask(device) if (ask := _of(device, "max_memory_allocated")) else None


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Within, random numbers are drawn that nobody misses afterwards, on the CPU and on the device."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def able(tensor: Tensor) -> Tensor:
    """The tensor; on the CPU where its device lacks float64, and with it much of linear algebra."""
    return tensor.cpu() if tensor.device.type in NO_FLOAT64 else tensor


def exact(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where its device lacks that."""
    return able(tensor).double()


def _of(device: torch.device, function: str) -> Any:
    """Of torch.cuda, torch.xpu, torch.mps, ...: not all have the same functions."""
    return getattr(getattr(torch, device.type, None), function, None)
