"""A training step mixes no devices and waits for no copy, shown on torch's `meta` device in an accelerator's place.

Tensors on `meta` have shapes and no numbers: nothing is computed there, and asking for a number is an error. As on
Apple's GPUs, there is no float64 either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtlctl.attacks import signals
from dtlctl.attacks.registry import ATTACKS
from dtlctl.attacks.signals import Observation
from dtlctl.console import devices
from dtlctl.data import tensors
from dtlctl.model import batchnorm, networks
from dtlctl.objectives import unlearn
from dtlctl.run.experiment import Experiment
from dtlctl.run.results import Results
from dtlctl.run.trainer import Trainer
from dtlctl.stages import dispose as disposal
from dtlctl.stages.runner import run
from dtlctl.training import engine as engine_module
from dtlctl.training.engine import Engine
from tests.conftest import EVERY_LOSS

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Refuses operations on several devices, and copies between them that are not in pinned memory."""

    sending = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, options = func.overloadpacket.__name__, kwargs or {}
        # A CPU tensor without dimensions is a number, and may meet any device; CPU rows may not index an accelerator's.
        met = {t.device.type for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor) and t.dim()}
        if name == "_to_copy" and options.get("device") is not None:
            met |= {options["device"].type}
        assert len(met) < 2 or (self.sending and name == "_to_copy"), f"{name} between {sorted(met)}"
        result = func(*args, **options)
        wide = [t for t in tree_leaves((args, options, result)) if isinstance(t, torch.Tensor) and t.is_meta]
        wide = [t for t in wide if t.dtype == torch.float64 and "meta" in devices.NO_FLOAT64]
        assert not wide, f"{name} in float64"
        self.seen |= met
        return result


class Made(TorchFunctionMode):
    """Refuses `torch.tensor` on the accelerator: its number would be copied there from memory that is not pinned."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func is not torch.tensor or "device" not in (kwargs or {}), "torch.tensor on the accelerator"
        return func(*args, **(kwargs or {}))


class Still(torch.optim.SGD):
    """Changes nothing: `meta` has no fused SGD."""

    def __init__(self, weights, lr, momentum, weight_decay, fused):
        super().__init__(weights, lr, momentum, weight_decay=weight_decay)

    def step(self, closure=None):
        pass


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Every step of training is watched; copies through `sent` are in pinned memory where there is such memory."""
    watch, step, sent = Watch(), Engine._step, tensors.sent

    def watched(self, *arguments) -> None:
        with watch, Made():
            step(self, *arguments)

    def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        watch.sending = True
        try:
            return sent(tensor, device)
        finally:
            watch.sending = False

    able: list[torch.Tensor] = []

    def eigh(square: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert square is able[-1], "not every device has eigenvalues"
        return square[0], square

    monkeypatch.setattr(devices, "NO_FLOAT64", ("meta",))
    monkeypatch.setattr(devices, "able", lambda tensor: able.append(tensor) or tensor)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for module in (tensors, unlearn):
        monkeypatch.setattr(module, "sent", pinned)
    monkeypatch.setattr(Engine, "_step", watched)
    return watch


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Experiment], None]:
    """Moves an experiment to `meta`, where nobody may look at a number or keep weights."""

    def report(self, state, due, *_) -> None:
        if state.step in due:
            state.rows.append(dict.fromkeys(("acc_s", "acc_t", "acc_pl", "source_loss"), 0.0) | {"step": state.step})

    def move(experiment: Experiment) -> None:
        monkeypatch.setattr(torch.optim, "SGD", Still)
        monkeypatch.setattr(engine_module, "check_weights", lambda *_: None)
        monkeypatch.setattr(Trainer, "right", lambda _self, _model, _role, _split, rows: np.zeros(len(rows), bool))
        monkeypatch.setattr(disposal.Checks, "_probe", lambda *_: 0.0)
        monkeypatch.setattr(disposal.Disposal, "source_loss_of_teacher", lambda *_: 0.0)
        monkeypatch.setattr(Engine, "_report", report)
        monkeypatch.setattr(Results, "publish", lambda *_: None)
        monkeypatch.setattr(Trainer, "measured", lambda *_: dict.fromkeys(("acc_s", "acc_t", "acc_pl"), 0.0))
        experiment.engine.device = META

    return move


def test_the_watch_sees_what_mixes_and_what_is_not_pinned(watch):
    there, here = torch.ones(3, device=META), torch.ones(3)
    with watch, Made():
        there + there * torch.ones(())
        tensors.sent(here, META)
        for wrong in (
            lambda: there + here,
            lambda: here.to(META),
            lambda: there[torch.ones(2, dtype=torch.int64)],
            lambda: torch.tensor(1.0, device=META),
            there.double,
        ):
            with pytest.raises(AssertionError):
                wrong()


def test_batch_norm_over_processes_stays_on_its_device(watch, monkeypatch):
    monkeypatch.setattr(batchnorm, "_sum_over_processes", lambda values: values)
    batchnorm.over_processes(norm := nn.BatchNorm2d(3, device=META))
    with watch, Made():
        norm(torch.ones(2, 3, 4, 4, device=META)).sum().backward()


def test_training_stays_on_its_device(opened, watch, elsewhere):
    experiment = opened("pretrain.clip=1.0")
    run(experiment, ["pretrain", "finetune"])
    elsewhere(experiment)
    run(experiment, ["pretrain", "finetune", "piggyback"], only=["pre", "TL", "TGT", "scratch"], force=True)
    assert "meta" in watch.seen


@pytest.mark.parametrize(("loss", "retain"), EVERY_LOSS)
def test_a_disposal_stays_on_its_device(opened, watch, elsewhere, loss, retain):
    experiment = opened(f"dispose.one.unlearn={loss}", f'dispose.one.retain={{kind="{retain}"}}')
    run(experiment, ["pretrain", "finetune"], only=["pre", "TL"])
    elsewhere(experiment)
    run(experiment, ["dispose"], only=["one"])
    assert "meta" in watch.seen


@pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - {"adv-dist"}))  # foolbox looks at numbers
def test_what_an_attack_sees_stays_on_its_device(attack):
    torch.manual_seed(0)
    model = networks.build("resnet8", {"source": 3, "target": 2}, width=4, image_size=8).eval().to(META)
    x, y = torch.empty(6, 3, 8, 8, device=META), torch.empty(6, dtype=torch.int64, device=META)
    view = Observation(model.through("source"), [(x, y)])
    with Watch(), Made():
        seen = ATTACKS[attack].observe(view, 20)
    assert {(len(values), values.device) for values in seen.values()} == {(6, META)}


@pytest.mark.parametrize("attack", ["modified-entropy", "grad-x", "rmia", "lira"])
def test_an_attack_that_wants_float64_has_it_on_the_cpu(attack, monkeypatch):
    monkeypatch.setattr(devices, "exact", lambda tensor: torch.rand(tensor.shape, dtype=torch.float64))
    model = networks.build("resnet8", {"source": 3, "target": 2}, width=4, image_size=8).eval().to(META)
    x, y = torch.empty(6, 3, 8, 8, device=META), torch.zeros(6, dtype=torch.int64)
    y = y.to(META) if attack == "grad-x" else y  # it is called with the images; the others' labels pick numbers out
    view = Observation(model.through("source"), [(x, y)])
    with Watch():
        if attack in ATTACKS:
            seen = ATTACKS[attack].observe(view, 20)
        else:
            seen = getattr(signals, attack)(view, torch.rand(6, 2, dtype=torch.float64))
    assert {values.device.type for values in seen.values()} == {"cpu"}
