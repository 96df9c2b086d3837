"""What some of the errors that torch raises mean to whoever started the command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dtlctl.recipe.plan import Job


def is_loss(error: RuntimeError) -> bool:
    """Whether the error is that of a message whose other end is gone, or hangs."""
    return isinstance(error, torch.distributed.DistError) or any(w in str(error) for w in ("gloo", "timed out"))


def is_shortage(error: BaseException) -> bool:
    """Whether the error says that memory ran out. torch's allocator for the CPU has no class of its own for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("allocate memory", "not enough memory", "out of memory"))
    )


def shortage(job: Job[Any]) -> str:
    """That memory ran out in a job, and which keys of the recipe make it need less."""
    ways = ["more processes, each on a device of its own"]
    if size := getattr(job.settings, "batch_size", None):
        ways.insert(0, f"a batch_size below {size}")
    if job.stage == "dispose" and job.settings.unlearn.chunks > 1 and job.settings.unlearn.memory != "recompute":
        ways.insert(0, 'unlearn.memory = "recompute"')
    return f"{job.title}: memory ran out\nit takes less with " + ", or ".join(ways)
