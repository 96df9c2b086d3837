"""The device is Accelerate's choice. There is no accelerator here: stand-ins say what torch would."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from dtlctl.console import devices
from dtlctl.errors import RecipeError
from dtlctl.stages import pretrain as stage
from dtlctl.training import engine as engine_module
from dtlctl.training import resume, surroundings


@pytest.fixture
def has(monkeypatch):
    """has("mps"): torch finds such a device."""

    def found(kind: str) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))

    return found


@pytest.mark.parametrize(
    ("found", "processes", "told", "expected"),
    [
        ("cuda", 1, {}, "cuda"),
        ("cuda", 4, {}, "cuda"),
        ("xpu", 4, {"ACCELERATE_USE_CPU": "false"}, "xpu"),
        ("mps", 1, {}, "mps"),
        ("mps", 2, {}, "cpu"),  # torch sends nothing between them
        ("cuda", 1, {"ACCELERATE_USE_CPU": "True"}, "cpu"),
        ("cuda", 2, {"ACCELERATE_TORCH_DEVICE": "cpu"}, "cpu"),
    ],
)
def test_the_engine_takes_what_is_here(found, processes, told, expected, has, monkeypatch):
    has(found)
    for name, value in {"WORLD_SIZE": str(processes), **told}.items():
        monkeypatch.setenv(name, value)
    assert devices.kind() == expected
    asked = []
    monkeypatch.setattr(engine_module, "Accelerator", lambda cpu, **_: asked.append(cpu) or Accelerator(cpu=True))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(devices, "kind", lambda: expected)
    engine_module.Engine()
    assert asked == [expected == "cpu"]


def test_without_an_accelerator_it_is_the_cpu():
    assert devices.kind() == "cpu" and engine_module.Engine().device == torch.device("cpu")


def test_float64_is_refused_where_the_device_has_none(has):
    has("mps")
    surroundings.check("float32")
    with pytest.raises(RecipeError, match=r'^precision = "float64": mps has none.*ACCELERATE_USE_CPU=1[^\n]*$'):
        surroundings.check("float64")


@pytest.mark.parametrize(
    ("said", "device"),
    [
        ("The operator 'aten::_linalg_eigh' is not currently implemented for the MPS device. If you want ...\n", "MPS"),
        ("Could not run 'aten::_linalg_eigh' with arguments from the 'XPU' backend. This could be ...\n", "XPU"),
    ],
)
def test_what_a_device_cannot_do_ends_with_its_name_and_a_remedy(said, device, call, recipe_file, monkeypatch):
    def fails(*_):
        raise NotImplementedError(said)

    monkeypatch.setattr(stage, "pretrain", fails)
    code, _, err = call("pretrain", recipe_file)
    *_, what, remedy = err.strip().splitlines()
    assert code == 2 and what.startswith(f"error: {device}: ") and "aten::_linalg_eigh" in what
    assert "ACCELERATE_USE_CPU=1" in remedy and "PYTORCH_ENABLE_MPS_FALLBACK=1" in remedy


def test_torch_says_so_in_these_words(call, recipe_file, monkeypatch):
    monkeypatch.setattr(stage, "pretrain", lambda *_: torch.eye(2).to_sparse().median())
    code, _, err = call("pretrain", recipe_file)
    assert code == 2 and "error: SparseCPU: torch has no aten::median" in err


def test_what_is_not_implemented_by_us_is_a_bug_and_shows_where(call, recipe_file, monkeypatch):
    def fails(*_):
        raise NotImplementedError("a method of ours")

    monkeypatch.setattr(stage, "pretrain", fails)
    with pytest.raises(NotImplementedError, match="of ours"):
        call("pretrain", recipe_file)


def test_random_numbers_of_any_accelerator_go_on(monkeypatch):
    """Its state, of 44 bytes as on MPS, is behind the CPU's; one that was saved on a CPU leaves it alone."""

    class There:
        state = torch.arange(44, dtype=torch.uint8)

        @classmethod
        def get_rng_state(cls):
            return cls.state

        @classmethod
        def set_rng_state(cls, state):
            cls.state = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: There)
    saved, on_cpu = (resume._random(torch.device(kind)) for kind in ("mps", "cpu"))
    There.state, drawn = torch.zeros(44, dtype=torch.uint8), torch.rand(3)
    resume._set_random(on_cpu, torch.device("mps"))
    assert not There.state.any() and torch.equal(torch.rand(3), drawn)
    resume._set_random(saved, torch.device("mps"))
    assert torch.equal(There.state, torch.arange(44, dtype=torch.uint8)) and torch.equal(torch.rand(3), drawn)


def test_what_torch_does_not_tell_of_a_device_is_none():
    for kind in ("cpu", "mps", "meta"):
        assert devices.memory(torch.device(kind)) is None and devices.peak(torch.device(kind)) is None
    assert devices.name(torch.device("cpu")) and devices.name(torch.device("mps")).endswith(" mps")
    assert devices.clock(torch.device("cpu")) <= devices.clock(torch.device("cpu"))
