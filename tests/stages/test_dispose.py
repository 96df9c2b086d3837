"""A disposal as a whole: what is said before it, and how often it is drawn."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from dtlctl.console import stop
from dtlctl.errors import DivergedError, RecipeError, Stopped
from dtlctl.objectives import balance
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment
from dtlctl.stages import checks, dispose
from dtlctl.stages.runner import run
from dtlctl.training import resume
from dtlctl.training.engine import Engine

STAGES = ("pretrain", "finetune", "dispose")
NEW = "dispose.new={price=2.0, steps=2, batch_size=8, lr=0.02}"
MADE = ("pre", "TL", "new")
pytestmark = pytest.mark.usefixtures("begun")


@pytest.fixture(autouse=True)
def after_each_step(monkeypatch: pytest.MonkeyPatch):
    """These disposals are short: a check after each step."""
    monkeypatch.setattr(balance, "APART", 1)


def experiment(file: Path, out: str, *changes: str) -> Experiment:
    return Experiment(load(file, [*changes]), file.parent / out, quiet=True)


def sidecar(one: Experiment, path: str) -> dict:
    return json.loads((one.folder / path / "model.json").read_text())


def costing(monkeypatch: pytest.MonkeyPatch, *prices: tuple[float, float]) -> list[dict[str, torch.Tensor]]:
    """Makes the draws of a disposal cost these points, with the low ends of their intervals, in the order in which they
    are finished; returns where their weights will be."""
    given, weights, found = iter(prices), list[dict[str, torch.Tensor]](), checks.Checks.found

    def costs(self) -> dict[str, float]:
        if self.job.model != "new":
            return found(self)
        points, low = next(given)
        weights.append({name: p.detach().clone() for name, p in self.disposal.student.named_parameters()})
        return {**found(self), "price": points, "price_low": low}

    monkeypatch.setattr(checks.Checks, "found", costs)
    return weights


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Distance of two networks, by the norm of the first."""
    whole = [torch.cat([p.detach().flatten() for p in weights.values()]) for weights in (one, other)]
    return float((whole[0] - whole[1]).norm() / whole[0].norm())


@pytest.mark.parametrize(
    ("prices", "kept"),
    [
        ([(5.0, 3.0), (1.5, -0.5)], 1),  # the second is not told from 2
        ([(5.0, 3.0), (4.5, 2.5), (4.8, 2.8)], 1),  # all are above: the cheapest of as many as are allowed
        ([(5.0, 3.0), (20.0, 15.0), (1.0, 0.0)], 2),  # one that is far off costs a draw, no more
        ([(4.0, 2.0)], 0),
        ([(9.5, 7.1)], 0),  # more than luck
    ],
)
def test_a_missed_price_is_drawn_anew_and_the_cheapest_kept(recipe_file: Path, monkeypatch, capsys, prices, kept: int):
    """A price of 2 is missed where the low end of the interval is above it, and by luck up to 5 points above it."""
    weights = costing(monkeypatch, *prices)
    one = experiment(recipe_file, "runs", NEW)
    one.processes.quiet = False
    run(one, STAGES, only=MADE)
    assert len(weights) == len(prices)
    made, published = sidecar(one, "dispose/new"), dict(one.trainer.load_model("new").named_parameters())
    assert apart(weights[kept], published) == 0
    assert all(apart(weights[0], other) > 0.5 for other in weights[1:])  # other networks, not one after two steps
    assert made["metrics"]["price"] == prices[kept][0]
    assert [one["price"] for one in made["metrics"].get("draws", [])] == [p for p, _ in prices if len(prices) > 1]
    said = capsys.readouterr().err
    assert said.count("of at most 3 begins; the cheapest is kept") == len(prices) - 1
    assert ("keeps the cheapest of" in said) == (len(prices) > 1)
    one.processes.quiet = True
    run(one, STAGES, only=MADE)  # done: nothing is drawn


@pytest.mark.parametrize("keys", ["init='TL', price=2.0", "lambda=0.5", "price=2.0, draws=1"])
def test_what_no_draw_changes_is_drawn_once(recipe_file: Path, monkeypatch, keys: str):
    weights = costing(monkeypatch, (5.0, 3.0))
    run(experiment(recipe_file, "runs", f"dispose={{new={{steps=2, batch_size=8, {keys}}}}}"), STAGES, only=MADE)
    assert len(weights) == 1


def test_a_second_draw_that_diverges_does_not_lose_the_first(recipe_file: Path, monkeypatch):
    weights, drawn = costing(monkeypatch, (5.0, 3.0), (1.0, 0.0)), dispose._drawn

    def diverges(experiment, job, draw: int):
        if draw == 1:
            time.sleep(2)
            raise DivergedError("training diverged")
        return drawn(experiment, job, draw)

    monkeypatch.setattr(dispose, "_drawn", diverges)
    one = experiment(recipe_file, "runs", NEW)
    run(one, STAGES, only=MADE)
    assert apart(weights[1], dict(one.trainer.load_model("new").named_parameters())) == 0
    made = sidecar(one, "dispose/new")
    first, second, third = made["metrics"]["draws"]
    assert (first["price"], second, third["price"]) == (5.0, {"failed": "training diverged"}, 1.0)
    assert made["wall_seconds"] > 2


def test_a_second_draw_that_misses_the_bound_on_exactness_does_not_lose_the_first(recipe_file: Path, monkeypatch):
    """Whoever holds the bound may still be the cheapest; where the first misses it, the recipe is at fault."""
    weights, cosines = costing(monkeypatch, (5.0, 3.0), (4.0, 2.5)), iter([0.99, 0.5, 0.98, 0.7])
    monkeypatch.setattr(dispose.Disposal, "cosine_to_float64", lambda *_: next(cosines))
    bound = "dispose.new.unlearn={kind='gradient-collision', chunks=2, cosine=0.9}"
    one = experiment(recipe_file, "runs", NEW, bound)
    run(one, STAGES, only=MADE)
    assert apart(weights[1], dict(one.trainer.load_model("new").named_parameters())) == 0
    found = sidecar(one, "dispose/new")["metrics"]
    assert found["collision_cosine"] == 0.98 and "0.5000" in found["draws"][1]["failed"]
    with pytest.raises(RecipeError, match=r"cosine of 0\.7000"):
        run(one, STAGES, only=MADE, force=True)


def test_a_second_draw_that_is_stopped_goes_on_and_the_first_is_not_made_again(recipe_file: Path, monkeypatch, capsys):
    prices = ((5.0, 3.0), (1.0, 0.0))
    monkeypatch.setattr(resume, "AT_END", 0.0)
    costing(monkeypatch, *prices, *prices[:1], *prices)
    whole, cut = (experiment(recipe_file, out, NEW, "dispose.new.steps=24") for out in ("runs", "cut"))
    shutil.copytree(whole.folder, cut.folder)
    run(whole, STAGES, only=MADE)
    taken, step = [], Engine._step
    monkeypatch.setattr(Engine, "_step", lambda *given: (taken.append(1), step(*given)))
    monkeypatch.setattr(stop, "pending", lambda: 143 if len(taken) == 30 else 0)
    with pytest.raises(Stopped):
        run(cut, STAGES, only=MADE)
    assert {file.name for file in cut.folder.rglob("state*.safetensors")} == {
        "state.safetensors",
        "state-1.safetensors",
    }
    taken.append(1)
    again = experiment(recipe_file, "cut", NEW, "dispose.new.steps=24")
    again.processes.quiet = False
    run(again, STAGES, only=MADE)
    assert len(taken) == 31 + 18  # the rest of the second draw
    said = capsys.readouterr().err
    assert "dispose/new: goes on from step 24 of 24" in said and "dispose/new/draw-2: goes on from step 6 of 24" in said
    ours, theirs = (sidecar(one, "dispose/new") for one in (whole, again))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["history"] == theirs["history"] and ours["metrics"] == theirs["metrics"]
    assert not list(again.folder.rglob("state*.safetensors"))


def test_the_state_of_one_draw_is_not_taken_for_that_of_another(recipe_file: Path, monkeypatch):
    """A copy of the first draw's state in the place of the second's would make the second draw the first again."""
    monkeypatch.setattr(resume, "AT_END", 0.0)
    prices = (5.0, 3.0), (1.0, 0.0)
    costing(monkeypatch, *prices, *prices)
    whole, mixed = (experiment(recipe_file, out, NEW) for out in ("whole", "mixed"))
    run(whole, STAGES, only=MADE)
    drawn = dispose._drawn

    def copies(experiment, job, draw: int):
        if draw == 1:
            folder = experiment.results.scratch(job)
            shutil.copy(folder / "state.safetensors", folder / "state-1.safetensors")
        return drawn(experiment, job, draw)

    monkeypatch.setattr(dispose, "_drawn", copies)
    run(mixed, STAGES, only=MADE)
    ours, theirs = (sidecar(one, "dispose/new") for one in (whole, mixed))
    assert ours["weights_sha256"] == theirs["weights_sha256"] and ours["history"] == theirs["history"]


@pytest.mark.parametrize(("tl", "tgt", "told"), [(31.5, 34.5, 1), (34.5, 34.5, 1), (40.0, 34.5, 0)])
def test_a_source_that_brought_nothing_is_told_before_the_disposal(
    recipe_file: Path, capsys, tl: float, tgt: float, told: int
):
    """Once, before the first of two variants; the accuracies are written into the sidecars here."""
    rand = "dispose.rand={lambda=0.5, steps=1, batch_size=8, unlearn={kind='uniform'}}"
    one = experiment(recipe_file, "runs", rand, "dispose.gc={price=2.0, repair=0.0, steps=3}")
    for path, accuracy in (("finetune", tl), ("target-only", tgt)):
        file = one.folder / path / "model.json"
        made = json.loads(file.read_text())
        made["metrics"]["acc_t"] = accuracy
        file.write_text(json.dumps(made))
    one.processes.quiet = False
    run(one, STAGES)
    assert capsys.readouterr().err.count("publish TGT") == told
