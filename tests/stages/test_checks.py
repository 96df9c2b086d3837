"""A disposal with a price: what its run looks at, keeps and resumes from."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dtlctl.attacks import features
from dtlctl.console import stop
from dtlctl.errors import RecipeError, Stopped, counted
from dtlctl.objectives import balance
from dtlctl.recipe.loading import load
from dtlctl.recipe.settings import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.stages import checks
from dtlctl.stages.runner import run
from dtlctl.training.price import Price, price, price_apart

pytestmark = pytest.mark.usefixtures("begun")


@pytest.fixture(autouse=True)
def after_each_step(monkeypatch: pytest.MonkeyPatch):
    """These disposals are short: a check after each step."""
    monkeypatch.setattr(balance, "APART", 1)


PRICED = "dispose={gc={price=2.0, repair=0.0, steps=24, batch_size=8, lr=0.02, unlearn={kind='gradient-collision'}}}"


def experiment(file: Path, out: str = "runs", *changes: str) -> Experiment:
    return Experiment(load(file, [PRICED, *changes]), file.parent / out, quiet=True)


def dispose(one: Experiment) -> None:
    run(one, ("dispose",), only=("gc",))


def sidecar(one: Experiment, path: str) -> dict:
    return json.loads((one.folder / path / "model.json").read_text())


@pytest.mark.parametrize("looked_at", [1000, 50])
def test_a_price_is_measured_on_target_images_that_nothing_trains_on(recipe_file: Path, monkeypatch, looked_at: int):
    """The metric is the paired price of TL and the variant on the rows that the fraction leaves out, made anew here.

    Every row of the history has the λ that its ratio and the gradients give. What is aimed at is what all images can
    resolve, though 50 of them may be all that a look in the first 70 % sees: their half width, by the root of how many.
    """
    monkeypatch.setattr(checks, "LOOKED_AT", looked_at)
    one = experiment(recipe_file)
    dispose(one)
    found = sidecar(one, "dispose/gc")["metrics"]
    held = one.data.held_back("target")
    assert len(held) and not np.isin(held, one.data.index("target")).any()
    right = [
        one.engine.correct(one.trainer.load_model(name), "target", one.trainer.split("target", "train", held))
        for name in ("TL", "gc")
    ]
    cost = price(*right)
    assert (found["price"], found["price_low"], found["price_high"]) == (cost.points, cost.low, cost.high)
    assert found["price_images"] == len(held)
    rows = [row for row in sidecar(one, "dispose/gc")["history"] if "lambda" in row]
    assert len(rows) == 24
    tl = one.engine.correct(
        one.trainer.load_model("TL"), "target", one.trainer.split("target", "train", one.data.held_back("target"))
    )
    for number, row in enumerate(rows):
        seen = len(held) if row["step"] >= balance.ON_ALL * 24 else min(looked_at, len(held))
        wanted = balance.aim(2.0, row["price_half_width"] * math.sqrt(seen / len(held)))
        whole = 100 * tl.mean()
        assert row["ratio"] == balance.ratio(rows[:number], row["step"] / 24, row["price"], wanted, whole)
    assert len({row["ratio"] for row in rows}) > 1 and len({row["lambda"] for row in rows}) > 20
    assert all(balance.LEAST <= row["lambda"] <= balance.SPARE for row in rows)


def test_on_its_way_the_price_is_that_of_the_mean_of_the_last_weights(recipe_file: Path, monkeypatch):
    """Made anew from the weights before each step: m <- m + (w - m) / 5 for 24 steps, whose twentieth is below 5."""
    means: list[dict[str, torch.Tensor]] = []
    watched: list[checks.Checks] = []
    follow = checks.Checks.follow

    def followed(self, student):
        follow(self, student)
        weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        before = means[-1] if means else weights
        means.append({name: tensor.lerp(weights[name], 0.2) if tensor.is_floating_point() else weights[name]
                      for name, tensor in before.items()})  # fmt: skip
        watched.append(self)

    monkeypatch.setattr(checks.Checks, "follow", followed)
    one = experiment(recipe_file)
    dispose(one)
    found = watched[-1].averaged.module.state_dict()
    assert all(torch.allclose(found[name], tensor) for name, tensor in means[-1].items() if tensor.is_floating_point())
    row = next(row for row in sidecar(one, "dispose/gc")["history"] if row["step"] == 20)
    model, held = one.trainer.load_model("gc"), one.data.held_back("target")
    model.load_state_dict(means[19])
    tl, ours = (one.trainer.right(m, "target", "train", held) for m in (one.trainer.load_model("TL"), model))
    assert row["price"] == price(tl, ours).points


def test_a_priced_disposal_that_is_stopped_goes_on_to_the_same_weights(recipe_file: Path, monkeypatch):
    whole, cut = experiment(recipe_file), experiment(recipe_file, "cut")
    shutil.copytree(whole.folder, cut.folder)
    dispose(whole)
    steps = iter([0] * 11 + [143])
    monkeypatch.setattr(stop, "pending", lambda: next(steps, 0))
    with pytest.raises(Stopped):
        dispose(cut)
    again = experiment(recipe_file, "cut")
    dispose(again)
    ours, theirs = (sidecar(one, "dispose/gc") for one in (whole, again))
    assert ours["weights_sha256"] == theirs["weights_sha256"]
    assert ours["history"] == theirs["history"]


def test_without_images_to_measure_a_price_on_nothing_trains(recipe_file: Path):
    one = experiment(recipe_file, "elsewhere", "data.target.fraction=1.0")
    with pytest.raises(RecipeError, match=r"dispose.gc.price: .* nothing trains on, .*data.target.fraction .* 0.8"):
        run(one, ("pretrain", "finetune", "dispose"))
    assert not one.folder.exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{price=1.0, lambda=0.1, steps=4}", "leave one out"),
        ("{price=1.0, repair=0.5, steps=4}", "repair"),
        ("{price=1.0, steps=4, unlearn={kind='none'}}", "no lambda to find"),
        ("{price=1.0, steps=4, unlearn={kind='negative-ce'}}", "has no bound, so no price would hold; write lambda"),
        ("{price=0, steps=4}", "greater than 0"),
    ],
)
def test_a_price_that_contradicts_the_rest_is_refused(recipe_file: Path, table: str, message: str):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(recipe_file, [f"dispose={{gc={table}}}"])


def test_who_says_neither_price_nor_lambda_gets_the_default_price(recipe_file: Path):
    gc = ["dispose.gc.price=3.0", "dispose.gc.repair=0.0"]
    recipe = load(recipe_file, ["dispose.other={steps=4, batch_size=8}", *gc])
    assert (recipe.dispose["other"].price, recipe.dispose["other"].lam) == (1.0, None)
    assert (recipe.dispose["gc"].price, recipe.dispose["gc"].lam) == (3.0, None)


GIVEN = (
    "dispose={gc={init='TL', lambda=0.5, steps=%d, batch_size=8, lr=%g, batch_norm='frozen', "
    "unlearn={kind='random-labels'}, retain={kind='distill'}, settle=%d}}"
)


def test_a_given_lambda_is_watched_too(recipe_file: Path, monkeypatch):
    """Each of six checks has λ, the price on the target's test images against TL, and the probe, here of 3 classes."""
    monkeypatch.setattr(checks, "PROBED_CLASSES", 3)
    one = experiment(recipe_file, "runs", GIVEN % (6, 0.02, 40))
    dispose(one)
    made = sidecar(one, "dispose/gc")
    assert [row["lambda"] for row in made["history"]] == [0.5] * 6
    right = {m: one.engine.correct(one.trainer.load_model(m), "target", one.trainer.split("target", "test"))
             for m in ("TL", "gc")}  # fmt: skip
    n = len(right["TL"])
    places = np.linspace(0, n - 1, min(n, 100)).round().astype(int)
    assert made["history"][-1]["price"] == price(right["TL"][places], right["gc"][places]).points
    for name, key in (("TL", "source_probe_tl"), ("gc", "source_probe")):
        labels = one.data.images("source", "test").labels
        own = np.flatnonzero((labels == 0) | (labels == 4) | (labels == 9))
        places = own[np.linspace(0, len(own) - 1, min(len(own), 100)).round().astype(int)]
        batches = list(one.trainer.split("source", "test", places))
        seen = features.read(one.trainer.load_model(name).eval(), [batch.x for batch in batches])
        expected = features.least_squares(np.concatenate([*seen.values()], 1), labels[places])
        assert made["metrics"][key] == expected
    assert made["metrics"]["source_probe_tl"] > 60  # three digits


@pytest.mark.parametrize(("lr", "settle", "end"), [(1e-9, 4, 5), (1e-9, 7, 8), (0.5, 4, 20)])
def test_a_disposal_ends_where_nothing_moves(recipe_file: Path, lr: float, settle: int, end: int):
    """Twenty steps, a check after each: at next to no step size four more checks say what the first one said."""
    one = experiment(recipe_file, "runs", GIVEN % (20, lr, settle))
    dispose(one)
    made = sidecar(one, "dispose/gc")
    last = made["history"][-1]["step"]
    assert last == end if lr < 1e-3 else last > settle + 1
    model = one.trainer.load_model("gc")
    right = one.engine.correct(model, "target", one.trainer.split("target", "test"))
    assert made["metrics"]["acc_t"] == pytest.approx(100 * right.mean())


def test_the_quick_probe_by_hand():
    """A feature that is the class: every image is told. Noise: as good as chance. No number: 0."""
    labels = np.arange(200) % 2
    assert features.least_squares(np.stack([labels, labels * 0.0], 1), labels) == 100
    noise = np.random.default_rng(0).normal(size=(200, 3))
    assert 30 < features.least_squares(noise, labels) < 70
    assert features.least_squares(np.full((200, 3), np.nan), labels) == 0


def test_settle_and_repair_exclude_each_other(recipe_file: Path):
    with pytest.raises(RecipeError, match="settle = 3: it would end before repair"):
        load(recipe_file, ["dispose.gc.settle=3"])


def test_a_short_disposal_has_fewer_checks(recipe_file: Path, monkeypatch):
    """A check costs as much as some steps: of 24 steps there are checks after 10 and 20, and where a row is due."""
    monkeypatch.setattr(balance, "APART", 10)
    one = experiment(recipe_file)
    dispose(one)
    assert {row["step"] for row in sidecar(one, "dispose/gc")["history"]} >= {10, 20, 24}
    looked = [row["step"] for row in sidecar(one, "dispose/gc")["history"] if "ratio" in row]
    assert len(looked) < 24


def test_a_tl_from_outside_is_measured_on_images_that_it_cannot_have_learned(recipe_file: Path):
    """Its accuracy is that on the test images; the variant's is on those held back, which nothing here trains on."""
    one = experiment(recipe_file)
    tensors = one.trainer.load_model("TL").plain_state("target")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, recipe_file.parent / "tl.safetensors")
    other = experiment(recipe_file, "outside", f"finetune={{weights='{recipe_file.parent}/tl.safetensors'}}")
    run(other, ("finetune", "dispose"), only=("TL", "gc"))
    held = other.data.held_back("target")
    student = other.trainer.load_model("gc")
    before, after = (
        other.engine.correct(model, "target", other.trainer.split("target", split, rows))
        for model, split, rows in ((one.trainer.load_model("TL"), "test", None), (student, "train", held))
    )
    found, cost = sidecar(other, "dispose/gc")["metrics"], price_apart(before, after)
    assert (found["price"], found["price_low"], found["price_high"]) == (cost.points, cost.low, cost.high)
    assert found["price_images"] == len(held)


@pytest.mark.parametrize(("cost", "end"), [
    (Price(0.0, -92.4, 92.4, 1, 0.0), "not told from the 2 allowed (about 2,135 would tell)"),
    (Price(2.0, 1.5, 2.5, 2000, 0.01), "not told from the 2 allowed"),
    (Price(1.0, 0.5, 1.5, 2000, 0.01), "within the 2 allowed"),
    (Price(3.0, 2.5, 3.5, 2000, 0.01), "above the 2 allowed; more epochs may cost less")])  # fmt: skip
def test_whether_a_price_is_kept_is_said(cost: Price, end: str):
    """One image tells 2 points from 0 +- 92.4 where there are 46.2^2 of it: 2,134.4. No number tells 2 from 2."""
    said = list[str]()
    one = SimpleNamespace(
        allowed=2.0, apart=False, probe_of_tl=9.0, disposal=SimpleNamespace(student=None), _probe=lambda student: 5.0,
        _price=lambda student, few: cost, lam=lambda: 0.1,
        job=SimpleNamespace(title="dispose/gc", model="gc", settings=Dispose()),
        experiment=SimpleNamespace(processes=SimpleNamespace(say=said.append)),
    )  # fmt: skip
    metrics = checks.Checks.found(one)  # type: ignore[arg-type]
    assert metrics["price"] == cost.points and metrics["lambda"] == 0.1
    held = f"{counted(cost.images, 'target image')} held back"
    told = f"{cost.points:.1f} points [{cost.low:.1f}, {cost.high:.1f}] on {held}"
    assert said == [f"dispose/gc: costs {told}, {end}"]
