"""An attacker who searches: he learns where it pays, goes on where he was stopped, leaves a recipe of what he found."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from dtlctl.attacks import search as searching
from dtlctl.attacks.attackers import Attacker, Full, Knn, LastBlock, Probe
from dtlctl.attacks.search import Point, reusable, search
from dtlctl.attacks.tuning import Evaluation, Trial
from dtlctl.errors import RecipeError, Stopped
from dtlctl.recipe import network_demands
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import jobs
from dtlctl.run.experiment import Experiment
from dtlctl.stages.piggyback import Repetition
from dtlctl.stages.runner import run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_optuna = pytest.mark.skipif(not find_spec("optuna"), reason="the extra optuna is not installed")
TABLE = '[{kind="full", lr=[0.01, 0.1], steps=8}, {kind="last-block", lr=[0.1], steps=8}, {kind="probe", C=[0.1]}]'
SEARCH = (f"piggyback.attackers={TABLE}", "piggyback.search={trials=6}")


def answers(worth: Callable[[Point], float]) -> Callable[[list[Point], int], list[Trial]]:
    """Trials whose accuracy on held-out images is what the point is worth."""
    return lambda points, _: [Trial(point[1], 0, [Evaluation(1, worth(point), 1.0)]) for point in points]


def peak(point: Point) -> float:
    """90 % for `full` with Adam at a rate of 0.02, 20 points less for every power of ten; nobody else gets above 20."""
    attacker, setting = point
    right = attacker.kind == "full" and setting.optimizer == "adam"
    return 90 - 20 * abs(math.log10(setting.rate / 0.02)) if right else 20.0


@needs_optuna
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_learns_where_it_pays(seed: int):
    """Of ten random trials about one in four is `full` with Adam; the last 20 of 60 are nearly all of this kind."""
    points, tried = search([Full(), Probe(), Knn()], ["stage1", "embedding"], 60, seed, answers(peak))
    found = [trial.best.accuracy for trial in tried if trial.best]
    assert len(points) == len(found) == 60
    assert sum(found[-20:]) / 20 > sum(found[:10]) / 10 + 20
    assert max(found) > 85
    best = points[found.index(max(found))][0]
    assert (best.kind, best.optimizer) == ("full", "adam") and 0.01 < best.lr[0] < 0.04


@needs_optuna
def test_a_diverged_trial_counts_as_nothing_found_and_is_no_reason_to_stop():
    def diverging(points: list[Point], _: int) -> list[Trial]:
        return [Trial(s, 0, [] if s.rate > 0.05 else [Evaluation(1, 50.0, 1.0)]) for _, s in points]

    points, tried = search([Full()], [], 40, 0, diverging)
    assert len(tried) == 40
    assert sum(s.rate > 0.05 for _, s in points[-20:]) < sum(s.rate > 0.05 for _, s in points[:20])


@needs_optuna
def test_the_same_seed_and_the_same_answers_lead_to_the_same_search():
    first, again, other = (
        [setting for _, setting in search([Full(), Probe()], ["embedding"], 20, seed, answers(peak))[0]]
        for seed in (3, 3, 4)
    )
    assert first == again != other
    shorter = search([Full(), Probe()], ["embedding"], 8, 3, answers(peak))[0]
    assert [setting for _, setting in shorter] == first[:8]


@needs_optuna
def test_what_is_suggested_is_a_recipe_whose_grid_is_that_one_setting():
    """For every kind: within the lists that its table gives, and read back from TOML to the same grid."""
    every = [kind() for kind in get_args(get_args(Attacker)[0])]
    points, _ = search(every, ["stage1", "embedding"], 120, 0, answers(lambda _: 50.0))
    assert {attacker.kind for attacker, _ in points} == {attacker.kind for attacker in every}
    for attacker, setting in points:
        (table,) = tomllib.loads(reusable([attacker.table()]))["attackers"]
        read: Any = TypeAdapter(Attacker).validate_python(table)
        assert read == attacker
        assert setting in read.grid(["stage1", "embedding"]) and len({s.rate for s in read.grid(["embedding"])}) == 1
        usual: Any = type(attacker)()
        assert min(getattr(usual, usual.tried)) <= setting.rate <= max(getattr(usual, usual.tried))
        assert setting.amount in usual.amounts()
    assert reusable([{"kind": "knn"}, {"kind": "knn"}]) == 'attackers = [{ kind = "knn" }]'


def sidecar(experiment: Experiment) -> dict[str, Any]:
    return json.loads((experiment.folder / "piggyback/scratch/again.json").read_text())["metrics"]


@needs_optuna
def test_a_search_goes_on_where_it_was_stopped_and_its_winner_is_a_recipe(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped at the fourth of six trials; then three are not made again, and nothing is lost by it."""
    whole, parts = (
        Experiment(load(recipe_file, [*SEARCH, f"name={name}"]), recipe_file.parent, quiet=True)
        for name in ("whole", "parts")
    )
    run(whole, ("piggyback",), only=("scratch",))
    attempt, made = Repetition.attempt, []

    def stopping(self: Repetition, *point: Any) -> Trial:
        if len(made) == 3:
            raise Stopped(15)
        made.append(point)
        return attempt(self, *point)

    with monkeypatch.context() as patch:
        patch.setattr(Repetition, "attempt", stopping)
        with pytest.raises(Stopped):
            run(parts, ("piggyback",), only=("scratch",))
    more: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(Repetition, "attempt", lambda self, *point: (more.append(point), attempt(self, *point))[1])
        run(parts, ("piggyback",), only=("scratch",))
    assert len(more) == 3
    found, expected = sidecar(parts), sidecar(whole)
    assert "attack_seconds" in expected and "attack_seconds" not in found
    assert found == {key: value for key, value in expected.items() if key in found}
    assert len(found["trials"]) == 6 and all(trial["table"]["kind"] == trial["kind"] for trial in found["trials"])

    (chosen,), line = found["chosen"], found["winner"]
    assert chosen["val"] == max(trial["val"] for trial in found["trials"])
    again = Experiment(
        load(recipe_file, [f"piggyback.{line}", "name=again"]), recipe_file.parent, quiet=True
    )  # fmt: skip
    run(again, ("piggyback",), only=("scratch",))
    (same,) = sidecar(again)["chosen"]
    assert same["val"] >= chosen["val"]  # a probe chooses its stage again
    if chosen["stage"] is None:
        assert same["acc_pl"] == chosen["acc_pl"]


def test_a_result_depends_on_the_search_and_without_one_is_as_before(recipe_file: Path):
    def described(*changes: str) -> dict[str, Any]:
        recipe = load(recipe_file, list(changes))
        return next(job.described(recipe) for job in jobs(recipe) if job.path == "piggyback/TL/again.json")

    grid, six, seven = described(SEARCH[0]), described(*SEARCH), described(SEARCH[0], "piggyback.search={trials=7}")
    assert "search" not in grid["settings"] and len({json.dumps(one) for one in (grid, six, seven)}) == 3
    assert six["settings"]["search"] == {"trials": 6} and "search" in six["revisions"]
    assert not {"weight_decay", "augment", "head"} & grid["settings"]["attackers"][0].keys()
    fitted = described('piggyback.attackers=[{kind="full", head="fitted"}]')
    assert fitted["settings"]["attackers"][0]["head"] == "fitted"
    elsewhere = 'piggyback.attackers=[{kind="probe", datasets=["other"]}]'
    more = "data.piggyback.other={like='target'}"
    assert described(elsewhere, SEARCH[1], more) == described(more)
    with pytest.raises(RecipeError, match=r"piggyback\.search: .*attackers"):
        load(recipe_file, [SEARCH[1]])


def test_without_optuna_a_search_is_refused_before_anything_trains(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network_demands, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"^[^\n]*piggyback\.search: [^\n]*pip install 'dtlctl\[optuna\]'[^\n]*$"):
        Experiment(load(recipe_file, list(SEARCH)), recipe_file.parent)
    Experiment(load(recipe_file, [SEARCH[0]]), recipe_file.parent)


def test_the_space_is_that_of_the_classes():
    augments = ("none", "crop", "crop-flip", "resized-crop-flip")
    head = ("drawn", "fitted")
    assert {"optimizer": ("sgd", "adam", "adamw"), "head": head, "augment": augments} == searching.CHOICES
    assert LastBlock().table() == {"kind": "last-block"}


def test_a_layered_rate_is_kept_with_the_optimizer_that_it_is_for():
    """What is suggested is a table that a recipe may hold: layer_decay stands beside adamw alone."""
    asked = Full(optimizer="adamw", layer_decay=0.5, lr=[0.001, 0.01])
    for optimizer, kept in (("adamw", 0.5), ("sgd", None)):
        said = {"0.optimizer": optimizer, "0.head": "drawn", "0.augment": "none", "attacker": 0, "0.steps": 40}
        answer = lambda name, *_, said=said, **__: said.get(name, 0.002 if "lr" in name else None)  # noqa: E731
        decay = lambda name, *_, **__: 0.001 if "decay" in name else 0.002  # noqa: E731
        trial = SimpleNamespace(suggest_categorical=answer, suggest_int=answer, suggest_float=decay)
        found, setting = searching.suggested(trial, [asked], [])
        assert (found.layer_decay, setting.optimizer) == (kept, optimizer)
        Full(**{**found.table(), "kind": "full"})
