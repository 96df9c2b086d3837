"""Diverged training is stopped, and named, before anything of it is kept; what torch's errors mean to a user."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtlctl.errors import DivergedError

if TYPE_CHECKING:
    from dtlctl.recipe.plan import Job
    from dtlctl.training.resume import State


def remedy(settings: Any) -> str:
    """What may keep the network that a table trains or adopts from diverging, by the table's keys."""
    if getattr(settings, "weights", None):
        return "other weights"
    ways = ["a smaller lr", *["clip = 1.0"] * (settings.clip is None or settings.clip > 1)]
    ways += [f"another {key}" for key, name in (("price", "price"), ("lambda", "lam")) if getattr(settings, name, None)]
    return " or ".join(filter(None, [", ".join(ways[:-1]), ways[-1]]))


def check_reports(state: State, step: int) -> None:
    """Raise DivergedError if anything that was reported since the last row is not finite."""
    bad = [name for name, value in state.sums.items() if not math.isfinite(value)]
    if bad:
        last = ", ".join(f"{k} {v:.4g}" for k, v in state.rows[-1].items()) if state.rows else "none yet"
        what = f"{' and '.join(bad)} not finite"
        raise DivergedError(f"training diverged at step {step}: {what}; last finite report: {last}")


def check_weights(model: nn.Module, step: int) -> None:
    """Raise DivergedError if the last step, of that number, left a weight or a buffer that is not finite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise DivergedError(f"training diverged at step {step}, the last: {name} is not finite")


def check_finite(values: Tensor) -> None:
    """Raise DivergedError where a published model's answers to n images, [n, ...], or its gradients are not finite."""
    bad = int((~values.isfinite()).reshape(len(values), -1).any(1).sum())
    if bad:
        raise DivergedError(
            f"the model's answers to {bad} of {len(values)} images, or their gradients, are not finite; no attack can "
            "read them"
        )


def is_loss(error: RuntimeError) -> bool:
    """Whether the other end of a message is gone, or hangs."""
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
