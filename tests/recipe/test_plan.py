"""What a result depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtlctl.attacks.attackers import Full
from dtlctl.attacks.registry import ATTACKS
from dtlctl.objectives.retain import Distill
from dtlctl.objectives.unlearn import GradientCollision, RandomLabels
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import Job, jobs
from dtlctl.recipe.settings import Dispose, Pretrain
from dtlctl.strict import Algorithm

ATTACKERS = 'piggyback.attackers=[{kind="full", lr=[0.1], steps=20}]'


def job(recipe_file: Path, title: str, *overrides: str) -> tuple[Job[Any], Any]:
    recipe = load(recipe_file, list(overrides))
    return next(job for job in jobs(recipe) if job.title == title), recipe


@pytest.mark.parametrize(
    ("mended", "stale"),
    [
        (GradientCollision, {"dispose/gc"}),
        (RandomLabels, {"dispose/rand"}),
        (Distill, {"dispose/gc", "dispose/rand"}),
        (Dispose, {"dispose/gc", "dispose/rand"}),
        (Pretrain, {"pretrain"}),
        (Full, {"piggyback/TL/again"}),
    ],
)
def test_a_mended_part_makes_its_results_anew_and_no_others(
    recipe_file: Path, monkeypatch, mended: type[Algorithm], stale: set[str]
):
    titles = ("pretrain", "finetune", "dispose/gc", "dispose/rand", "piggyback/TL/again", "audit/TL")
    found = {title: job(recipe_file, title, ATTACKERS) for title in titles}
    before = {title: one.described(recipe) for title, (one, recipe) in found.items()}
    monkeypatch.setattr(mended, "revision", mended.revision + 1)
    assert {title for title, (one, recipe) in found.items() if one.described(recipe) != before[title]} == stale


def test_a_mended_membership_attack_makes_its_audits_anew(recipe_file: Path, monkeypatch):
    one, recipe = job(recipe_file, "audit/TL")
    before = one.described(recipe)
    monkeypatch.setitem(ATTACKS, "entropy", ATTACKS["entropy"]._replace(revision=2))  # not one of this audit's
    assert one.described(recipe) == before
    monkeypatch.setitem(ATTACKS, "loss", ATTACKS["loss"]._replace(revision=2))
    assert one.described(recipe) != before


@pytest.mark.parametrize(("processes", "size"), [(1, 50), (2, 50), (4, 48)])
def test_a_batch_of_fewer_images_than_it_asks_for_depends_on_who_shares_it(
    recipe_file: Path, processes: int, size: int
):
    """50 images are one batch, or two parts of 25, or four of 12: then it is another experiment, with another key."""
    one, _ = job(recipe_file, "dispose/rand", "dispose.rand.batch_size=64")
    assert one.batches({"source": 50, "target": 500}, processes) == {"source": size}
    one, _ = job(recipe_file, "dispose/rand", "dispose.rand.batch_size=64", 'dispose.rand.retain={kind="target-ce"}')
    assert one.batches({"source": 50, "target": 500}, processes) == {"source": size, "target": 64}
    one, _ = job(recipe_file, "pretrain", "pretrain.batch_size=64")
    assert one.batches({"source": 50}, processes) == {"source": 50}
    one, _ = job(recipe_file, "audit/TL")
    assert one.batches({"source": 50}, processes) == {}


def test_keys_of_training_that_are_left_out_change_no_result(recipe_file: Path):
    """What was trained before there were such keys need not be trained again."""
    pre, recipe = job(recipe_file, "pretrain")
    new = {"patience", "held_out", "layer_decay", "optimizer", "label_smoothing"}
    assert not pre.described(recipe)["settings"].keys() & new
    pre, recipe = job(recipe_file, "pretrain", "pretrain.patience=3")
    assert pre.described(recipe)["settings"].keys() & new == {"patience", "held_out"}


def test_draws_count_where_a_price_decides_about_them(recipe_file: Path):
    for keys, counts in (("lambda=0.1, draws=5", False), ("price=1.0, repair=0.0", True)):
        gc, recipe = job(recipe_file, "dispose/gc", f"dispose.gc={{{keys}}}")
        assert ("draws" in gc.described(recipe)["settings"]) is counts


def test_references_beside_a_model_from_outside_are_in_the_key(recipe_file: Path):
    """No parent tells of their training, where `pre` or TL is adopted; a `pre` that is trained here does."""
    rmia = ("audit.references=2", 'audit.attacks=["rmia"]')

    def described(*overrides: str) -> Any:
        one, recipe = job(recipe_file, "audit/TL", *rmia, *overrides)
        return one.described(recipe)

    for adopted in ("pretrain.weights=a", "finetune.weights=a"):
        assert described(adopted) != described(adopted, "pretrain.lr=0.2") != described(adopted, "pretrain.seed=1")
        assert "referenced" not in described(adopted, "audit.references=0", "audit.attacks=[loss]")["settings"]
    assert described() == described("pretrain.lr=0.2") and "referenced" not in described()["settings"]
