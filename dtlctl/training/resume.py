"""What an unfinished training needs to go on as if nothing had happened.

One safetensors file whose metadata holds the JSON part, so that one rename publishes both. Batch i and the schedule at
step i are functions of the seed and i: the step is the sampler's position too.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtlctl.console import devices
from dtlctl.errors import CheckpointError, one_line
from dtlctl.storage import checkpoint
from dtlctl.strict import Strict
from dtlctl.training.collectives import Collectives

HELD_OUT = "held_out"
"""Of a row: the accuracy in % on images held out, where it decides when a training stops."""
KEPT = ("step", "lr", "rows", "seconds")
"""Fields of State that are in the JSON part as they are."""

AT_END = 30.0
"""Seconds since the last save after which a training that ends is saved once more."""


@dataclass
class State:
    """Where a training stands between two steps.

    rows: the reports so far; sums: this process's, scalars, since the last one; seconds: up to the start or the last
    restore; lr: of the last step; best: weights and buffers of the best row by HELD_OUT; beside: what changes with the
    model, as a mean of its weights, and is saved with it.
    """

    step: int = 0
    rows: list[dict[str, int | float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    lr: float = 0.0
    best: dict[str, Tensor] = field(default_factory=dict)
    beside: nn.Module | None = None

    def best_step(self) -> int:
        """Of the first row that is the best by HELD_OUT; 0 where none has it."""
        looks = [row for row in self.rows if HELD_OUT in row]
        return int(max(looks, key=lambda row: row[HELD_OUT])["step"]) if looks else 0


class Document(Strict):
    """The JSON part. sha256: of the tensors; lrs: of the next step, by group of weights; sums: of every process."""

    format: Literal[2] = 2
    key: str
    sha256: str
    step: int = Field(ge=0)
    lr: float
    lrs: list[float]
    rows: list[dict[str, int | float]]
    sums: list[dict[str, float]] = Field(min_length=1)
    seconds: float = Field(ge=0)
    saved: str
    """When, in local time."""


class StateFile:
    """The state of one training, in one file, valid for one key (what the training depends on).

    On another number of processes a training goes on exactly but for the random numbers inside the model (dropout):
    these are then those of as many of the old processes, over again.
    """

    def __init__(self, path: Path, key: str, minutes: float = 5.0):
        self.path, self.key, self.minutes = path, key, minutes
        self._saved = time.monotonic()

    def due(self, ends: bool = False) -> bool:
        """Whether it is time to save. ends: before what a stage still measures once its training has ended."""
        return time.monotonic() - self._saved >= min(60 * self.minutes, AT_END if ends else math.inf)

    def save(self, group: Collectives, state: State, model: nn.Module, optimizer: Optimizer) -> None:
        """By all processes, written by the main one. Raises CheckpointError; the earlier state is intact."""
        parts: dict[str, Mapping[str, Any]] = {"model": model.state_dict(), "best": state.best}
        if state.beside:
            parts["beside"] = state.beside.state_dict()
        for number, own in optimizer.state_dict()["state"].items():
            parts[f"optimizer/{number}"] = {k: v for k, v in own.items() if isinstance(v, Tensor)}  # it makes the rest
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        tensors["random"] = group.gather(_random(group.device)[None])
        sums = group.gather_objects([{name: float(value) for name, value in state.sums.items()}])
        group.by_main(lambda: self._write(tensors, sums, state, optimizer))
        self._saved = time.monotonic()

    def restore(
        self, group: Collectives, state: State, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
    ) -> str | None:
        """Take up the state if there is one for this key; returns when it was saved. Raises CheckpointError."""
        found = self._read()
        step = found[0].step if found else -1
        if group.agree(step) != -group.agree(-step):  # in all of them, or the others would wait for this one
            raise CheckpointError(f"{self.path}: not the same on all processes; they must share the run's folder")
        if found is None:
            return None
        document, tensors = found
        try:
            checkpoint.fill(model, _under("model/", tensors))
            _fill(optimizer, _under("optimizer/", tensors))
            for options, lr in zip(optimizer.param_groups, document.lrs, strict=True):
                options["lr"] = lr
            schedule.load_state_dict({"last_epoch": step, "_step_count": step + 1, "_last_lr": list(document.lrs)})
            if state.beside:
                checkpoint.fill(state.beside, _under("beside/", tensors))
            for name in KEPT:
                setattr(state, name, getattr(document, name))
            state.best = {name: tensor.to(group.device) for name, tensor in _under("best/", tensors).items()}
            rank, processes = group.share.rank, len(document.sums)
            own = document.sums[rank % processes]
            if processes != group.processes:  # only the mean over processes matters
                own = {name: fmean(each[name] for each in document.sums) for name in own}
            zero = torch.zeros((), dtype=devices.widest(group.device), device=group.device)
            state.sums = {name: zero + value for name, value in own.items()}
            _set_random(tensors["random"][rank % processes], group.device)
        except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise self._unusable(error) from None
        return document.saved

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)

    def _write(
        self, tensors: dict[str, Tensor], sums: list[dict[str, float]], state: State, optimizer: Optimizer
    ) -> None:
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        digest, saved = hashlib.sha256(save(tensors)).hexdigest(), time.strftime("%Y-%m-%d %H:%M:%S")
        lrs, kept = [float(options["lr"]) for options in optimizer.param_groups], {k: getattr(state, k) for k in KEPT}
        document = Document(key=self.key, sha256=digest, lrs=lrs, sums=sums, saved=saved, **kept)
        checkpoint.write(self.path, save(tensors, {"dtlctl": document.model_dump_json()}))

    def _read(self) -> tuple[Document, dict[str, Tensor]] | None:
        from safetensors import SafetensorError
        from safetensors.torch import load, save

        try:
            blob = self.path.read_bytes()
            tensors = load(blob)
            length = int.from_bytes(blob[:8], "little")  # of the header, which `load` has checked
            document = Document.model_validate_json(json.loads(blob[8 : 8 + length])["__metadata__"]["dtlctl"])
            if document.key != self.key:
                return None
            if document.sha256 != (found := hashlib.sha256(save(tensors)).hexdigest()):
                raise ValueError(f"SHA-256 {found} where it says {document.sha256}")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise self._unusable(error) from None
        return document, tensors

    def _unusable(self, error: Exception) -> CheckpointError:
        reason = one_line(error, 200)
        return CheckpointError(
            f"{self.path}: the saved state cannot be used: {reason}\ndelete it to start this stage from its beginning"
        )


def _random(device: torch.device) -> Tensor:
    """uint8 [n]: the states of torch's generators on the CPU and, behind it, on the accelerator, where there is one."""
    there = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return torch.cat([torch.get_rng_state(), *there])


def _set_random(state: Tensor, device: torch.device) -> None:
    here, there = state.tensor_split([len(torch.get_rng_state())])
    torch.set_rng_state(here.clone())
    if device.type != "cpu" and len(there):  # a state that was saved on a CPU has none
        torch.get_device_module(device).set_rng_state(there.clone())


def _fill(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put "NUMBER/NAME" back. Raises ValueError for a tensor that is not shaped like its weight, or not finite."""
    weights = [weight for options in optimizer.param_groups for weight in options["params"]]
    for place, tensor in tensors.items():
        number, _, name = place.partition("/")
        weight = weights[int(number)]
        if (tensor.dim() and tensor.shape != weight.shape) or not tensor.isfinite().all():
            raise ValueError(f"optimizer/{place} does not fit its weight")
        optimizer.state[weight][name] = tensor.to(weight.device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
