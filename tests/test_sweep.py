"""Grids of runs and the matched comparison: parents are shared, work is resumed, λ is bisected on validation images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dtlctl import matching, sweep
from dtlctl.errors import RecipeError
from dtlctl.experiment import Experiment
from dtlctl.loading import load, parse_value
from dtlctl.recipe import Compare


def test_values_are_toml_or_plain_words():
    assert parse_value("0.1,2,true") == [0.1, 2, True]
    assert parse_value("none, crop") == ["none", "crop"]
    assert parse_value('["TL"],["TL", "gc"]') == [["TL"], ["TL", "gc"]]
    for text in ("{a=1}", "a,,b", ","):
        with pytest.raises(RecipeError, match="tables and nothing cannot"):
            parse_value(text)


def test_the_grid_and_its_names():
    grid = sweep.points(["dispose.gc.lambda=0.1,0.5", "seed=0,1"])
    assert [p.name for p in grid] == ["gc.lambda-0.1_seed-0", "gc.lambda-0.1_seed-1",
                                      "gc.lambda-0.5_seed-0", "gc.lambda-0.5_seed-1"]  # fmt: skip
    (point,) = sweep.points(["dispose.*.lambda=0.2"])
    assert point.name == "all.lambda-0.2"
    assert point.overrides(["gc", "neg"]) == ["dispose.gc.lambda=0.2", "dispose.neg.lambda=0.2"]
    long = sweep.points([f"data.source.path={'x' * 80},{'x' * 79}y"])
    assert len({p.name for p in long}) == 2
    assert all(len(p.name) <= 64 for p in long)
    for bad in ("seed", "seed=", "=1", "name=a,b"):
        with pytest.raises(RecipeError, match="--over"):
            sweep.points([bad])
    with pytest.raises(RecipeError, match="given twice"):
        sweep.points(["seed=1", "seed=2"])


def test_a_sweep_trains_shared_parents_once_and_resumes(recipe_file: Path, dtlctl):
    """Two λ of gc: pre and TL are the same file; rand and the attacks on it are the same result."""
    call = ("sweep", recipe_file, "--over", "dispose.gc.lambda=0.1,0.5")
    first = dtlctl(*call)
    assert first.returncode == 0, first.stderr
    folder = recipe_file.parent / "runs" / "tiny-sweep"
    a, b = folder / "gc.lambda-0.1", folder / "gc.lambda-0.5"
    for job in ("pretrain", "finetune", "target-only", "dispose/rand"):
        assert (a / job / "model.safetensors").samefile(b / job / "model.safetensors"), job
    assert not (a / "dispose/gc/model.safetensors").samefile(b / "dispose/gc/model.safetensors")
    assert (a / "piggyback/TL/again.json").read_text() == (b / "piggyback/TL/again.json").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in first.stdout.splitlines() if "|" in line]
    assert lines[0] == ["Model", "dispose.gc.lambda"]
    assert lines[2:] == [["scratch", "–"], ["TGT", "–"], ["pre", "–"], ["TL", "–"], ["rand", "–"],
                         ["gc", "0.1"], ["gc", "0.5"]]  # fmt: skip
    made = {path.name for path in (folder / "report").iterdir()}
    assert {"table.json", "table.md", "report.html", "curve-again.png", "curve-again.svg"} <= made
    before = (a / "dispose/gc/model.safetensors").stat().st_mtime_ns
    again = dtlctl(*call, "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert (a / "dispose/gc/model.safetensors").stat().st_mtime_ns == before


def test_a_sweep_over_seeds_in_parallel_is_the_report_of_the_runs(recipe_file: Path, dtlctl):
    result = dtlctl("sweep", recipe_file, "--over", "seed=0,1", "--jobs", "2", "--quiet")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith("Accuracies in %. Mean over seeds 0, 1 ±")
    alone = dtlctl("run", recipe_file, "--set", "seed=1", "--quiet", "--json")
    (row,) = [row for row in json.loads(alone.stdout)["rows"] if row["model"] == "gc"]
    sidecar = recipe_file.parent / "runs/tiny-sweep/seed-1/dispose/gc/model.json"
    assert json.loads(sidecar.read_text())["metrics"]["acc_t"] == row["acc_t"]


def test_a_failing_point_is_named_with_its_own_exit_code(recipe_file: Path, dtlctl):
    change = "pretrain={lr=100.0, steps=200, schedule='constant'}"
    for jobs in ("1", "2"):
        result = dtlctl("sweep", recipe_file, "--over", "seed=0,1", "--set", change, "--jobs", jobs, "--quiet")
        assert result.returncode == 3, result.stderr
        assert "diverged at step" in result.stderr


@pytest.mark.parametrize(("wanted", "reached"), [(2.0, True), (60.0, False)])
def test_bisection_finds_the_matching_lambda(wanted: float, reached: bool):
    """A drop of 50 λ points meets 2 at λ = 0.04; 60 is out of reach below λ = 1, so the largest tried is returned."""
    calls: list[float] = []

    def drops(lam: float) -> list[float]:
        calls.append(lam)
        return [50 * lam - 1, 50 * lam + 1]

    found = matching.search(drops, 0.5, Compare(target_drop=wanted, tolerance=0.2, rounds=8))
    assert found["reached"] is reached
    assert [one["lambda"] for one in found["tried"]] == calls
    assert found["tried"][0] == {"lambda": 0.5, "drop": 25.0, "drops": [24.0, 26.0]}
    assert found["lambda"] == pytest.approx(0.04, abs=0.004) if reached else found["lambda"] == max(calls)
    assert matching.between(0.1, 0.9) == pytest.approx(0.5)
    assert matching.between(0.2, 0.5) == pytest.approx(1 / 3)  # odds 1/4 and 1: 1/2 in between


def test_compare_matches_on_held_back_images_and_reports(recipe_file: Path, dtlctl):
    change = ("--set", "compare={target_drop=1.0, rounds=2, tolerance=0.01, seeds=[0, 1]}")
    result = dtlctl("compare", recipe_file, *change, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["variants"]) == ["gc", "rand"]
    assert document["table"]["seeds"] == [0, 1]
    folder = recipe_file.parent / "runs" / "tiny-compare"
    for name, found in document["variants"].items():
        assert 1 <= len(found["tried"]) <= 2
        assert found["tried"][0]["lambda"] == 0.1  # the recipe's own comes first
        assert document["table"]["recipe"]["dispose"][name]["lambda"] == found["lambda"]
        assert len(found["tried"][0]["drops"]) == 2
    lab = Experiment(load(recipe_file, ["name=matched-1", "seed=1"]), folder, quiet=True)
    labels = lab.images("target", "train").labels
    assert len(np.intersect1d(lab.index("target"), np.setdiff1d(np.arange(len(labels)), lab.index("target")))) == 0
    assert "Who needed which λ" in (folder / "report" / "report.html").read_text()
    again = dtlctl("compare", recipe_file, *change, "--json", "--quiet")
    assert again.stdout == result.stdout


def test_compare_refuses_what_it_cannot_do(recipe_file: Path, dtlctl):
    whole = dtlctl("compare", recipe_file, "--set", "data.target.fraction=1.0")
    assert whole.returncode == 2
    assert "leaves no target images to validate" in whole.stderr
    nothing = 'dispose={gc={unlearn={kind="none"}}, rand={unlearn={kind="none"}}}'
    none = dtlctl("compare", recipe_file, "--set", nothing)
    assert (none.returncode, "needs a [dispose.NAME] table" in none.stderr) == (2, True)
    assert dtlctl("sweep", recipe_file, "--over", "dispose.gc.lambda=0.1,7").returncode == 2
    assert dtlctl("sweep", recipe_file, "--over", "seed=0,0").returncode == 2
