"""A training step never asks for a number: on a GPU that would wait for all that is queued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtlctl.stages.runner import run
from dtlctl.training import engine as engine_module
from dtlctl.training.engine import Engine
from tests.conftest import EVERY_LOSS

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "index by a mask",
           "linalg_pinv", "_linalg_eigh"}  # fmt: skip


class Asked(TorchDispatchMode):
    """Counts the operations whose result Python or the shape of a tensor has to know at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(place, torch.Tensor) and place.dtype == torch.bool
            for argument in args
            if isinstance(argument, list | tuple)
            for place in argument
        )
        self.operations["index by a mask" if by_mask else name] += 1
        return func(*args, **(kwargs or {}))

    def waits(self) -> dict[str, int]:
        return {name: n for name, n in self.operations.items() if name in WAITING}


def in_steps(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> Asked:
    """What the steps of `work` do, as on an accelerator, where nobody looks at losses between two reports."""
    asked, step = Asked(), Engine._step

    def watched(self, *arguments):
        with asked:
            step(self, *arguments)

    monkeypatch.setattr(engine_module, "check_reports", lambda *_: None)
    monkeypatch.setattr(Engine, "_step", watched)
    work()
    return asked


def test_the_watch_sees_what_waits():
    values = torch.tensor([1.0, 2.0])
    with Asked() as asked:
        float(values.sum())
        bool((values > 0).all())
        values.nonzero()
        values[values > 1]
    assert asked.waits() == {"_local_scalar_dense": 2, "nonzero": 1, "index by a mask": 1}


def test_no_step_of_a_training_waits(opened, monkeypatch):
    """Pre-training with clipping, and fine-tuning."""
    experiment = opened("pretrain.clip=1.0")
    asked = in_steps(monkeypatch, lambda: run(experiment, ["pretrain", "finetune"], only=["pre", "TL"]))
    assert asked.operations["convolution"] > 0 and asked.operations["_fused_sgd_"] >= 16
    assert asked.waits() == {}


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("unlearn", "retain"), EVERY_LOSS)
def test_no_step_of_a_disposal_waits(opened, monkeypatch, unlearn, retain):
    """By every loss, in every way of holding graphs."""
    experiment = opened(f"dispose.one.unlearn={unlearn}", f'dispose.one.retain={{kind="{retain}"}}')
    asked = in_steps(monkeypatch, lambda: run(experiment, ["dispose"], only=["one"]))
    assert asked.operations["convolution"] > 0 and asked.operations["_fused_sgd_"] >= 3
    known = {"_local_scalar_dense": 6}  # a disposal's mean of weights has its count on the CPU, whatever the device
    known["_local_scalar_dense"] += 3 if "recompute" in unlearn else 0  # seeds, there too
    known["_local_scalar_dense"] += 3 if "simulated" in unlearn else 0  # what the step draws, there too
    known |= {"_linalg_eigh": 3} if "null-space" in unlearn else {}  # one a step, of a matrix of classes x classes
    assert asked.waits() == known
