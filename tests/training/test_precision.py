"""TF32 belongs to the work: whoever computes with a model does it in that model's precision, and nobody else."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dtlctl.errors import RecipeError
from dtlctl.model import networks
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment
from dtlctl.stages.runner import run


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def outside():
    """What the process had before: an unusual pair, which must be there afterwards."""
    before = switches()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
    yield
    assert switches() == (True, False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Watch:
    """The switches at every forward and backward pass of any convolution."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: set[tuple[bool, bool]] = set()
        self.passes = dict.fromkeys(("forward", "backward"), 0)
        plain = nn.Conv2d.forward

        def forward(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
            self._note("forward")
            y = plain(module, x)
            if y.requires_grad:
                y.register_hook(lambda _: self._note("backward"))
            return y

        monkeypatch.setattr(nn.Conv2d, "forward", forward)

    def _note(self, which: str) -> None:
        self.passes[which] += 1
        self.seen.add(switches())

    def taken(self) -> set[tuple[bool, bool]]:
        seen, self.seen = self.seen, set()
        return seen


@pytest.mark.parametrize(("name", "allowed"), [("tf32", True), ("float32", False), ("bfloat16", False)])
def test_inside_the_switches_are_as_asked_and_afterwards_as_before(name, allowed):
    with networks.precision(name):
        assert switches() == (allowed, allowed)
        with networks.precision("float32"):
            assert switches() == (False, False)
        assert switches() == (allowed, allowed)
    with pytest.raises(KeyError), networks.precision(name):
        raise KeyError


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one way to say it")
def test_a_process_that_uses_torch_s_newer_names_is_overruled_and_left_alone():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    torch.backends.fp32_precision, conv.fp32_precision, matmul.fp32_precision = "tf32", "none", "tf32"
    try:
        with networks.precision("float32"):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False


def test_two_experiments_that_take_turns_each_compute_in_their_own_precision(recipe_file, tmp_path, monkeypatch):
    """Pre-training, fine-tuning, disposal, piggybacking and audit, forwards and backwards; then by hand."""
    changes = ['audit.attacks=["loss","grad-w"]', "audit.relearn_steps=1"]
    experiments = {
        name: Experiment(load(recipe_file, [f'precision="{name}"', f'name="{name}"', *changes]), tmp_path, quiet=True)
        for name in ("float32", "tf32")
    }
    watch, made = Watch(monkeypatch), {"pretrain": ["pre"], "finetune": ["TL"], "audit": ["pre", "TL", "gc"]}
    made |= {"dispose": ["gc"], "piggyback": ["gc"]}
    for stage in ("pretrain", "finetune", "dispose", "piggyback", "audit"):
        for name, experiment in experiments.items():
            assert run(experiment, [stage], only=made[stage])
            assert watch.taken() == {(name == "tf32",) * 2}, (stage, name)
    models = {name: experiment.trainer.load_model("TL") for name, experiment in experiments.items()}
    for name, experiment in experiments.items():
        experiment.trainer.measured(models[name], {"acc_s": ("source", "source")})["acc_s"]
        assert watch.taken() == {(name == "tf32",) * 2}
    assert min(watch.passes.values()) > 100


def test_opening_an_experiment_sets_nothing(opened):
    assert opened('precision="tf32"').engine and switches() == (True, False)


BOUND = 'dispose.one.unlearn={kind="gradient-collision", cosine=%s}'


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
def test_a_collision_is_measured_against_the_recipe_s_bound(opened, precision):
    """Measured on the first batch; written down; in full precision it is 1 to seven digits."""
    experiment = opened(f'precision="{precision}"', "dispose.gc.unlearn.cosine=0.3", BOUND % 0.3)
    run(experiment, ["pretrain", "finetune", "dispose"], only=["pre", "TL", "one"])
    cosine = experiment.results.require("one")["metrics"]["collision_cosine"]
    assert (0.3 <= cosine < 0.99999) if precision == "bfloat16" else cosine > 0.999999


def test_a_collision_below_its_bound_stops_before_it_trains(opened):
    experiment = opened('precision="bfloat16"', "dispose.gc.unlearn.cosine=0.3", BOUND % 1)
    with pytest.raises(RecipeError) as caught:
        run(experiment, ["pretrain", "finetune", "dispose"], only=["pre", "TL", "one"])
    assert re.match(
        r"dispose/one: the collision's gradient in bfloat16 has a cosine of 0\.\d{4} to that in float64 on the first "
        r'batch, below unlearn.cosine = 1\nset precision = "float32", or a lower bound',
        str(caught.value),
    )
    assert not (experiment.folder / "dispose/one/model.json").exists()


@pytest.mark.usefixtures("begun")
def test_without_a_bound_nothing_is_measured_and_bfloat16_is_refused(opened, recipe_file):
    experiment = opened()
    run(experiment, ["pretrain", "finetune", "dispose"], only=["pre", "TL", "one"])
    assert "collision_cosine" not in experiment.results.require("one")["metrics"]
    with pytest.raises(RecipeError, match=r"dispose.gc.unlearn: a collision in bfloat16 .* as cosine = 0.99"):
        load(recipe_file, ['precision="bfloat16"'])
    load(recipe_file, ['precision="bfloat16"', *(f'dispose.{v}.unlearn={{kind="uniform"}}' for v in ("gc", "one"))])
