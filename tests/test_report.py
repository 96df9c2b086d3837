"""Tables come from sidecars; means and intervals over seeds are those of the t distribution."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from dtlctl import report
from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.loading import load
from dtlctl.plan import jobs


def digest(name: str) -> str:
    """Stands for the hash of a model's weights."""
    return sha256(name.encode()).hexdigest()


def fake_run(recipe_file: Path, name: str, seed: int, acc_t: float) -> Path:
    """A run's folder with made-up sidecars: TL has the given accuracy, every attack half of it."""
    recipe = load(recipe_file, [f"name={name}", f"seed={seed}"])
    folder = recipe_file.parent / name
    for job in jobs(recipe):
        metrics = {
            "piggyback": {"acc_pl": acc_t / 2},
            "audit": {"loss": {"auc": 0.75}},
        }.get(job.stage, {"acc_t": acc_t if job.model == "TL" else 10.0, "acc_s": 20.0})
        sidecar = {"format": 1, "metrics": metrics, **job.described(recipe), "parent": {}}
        if job.parent:
            sidecar["parent"] = {job.parent: digest(job.parent)}
        if job.stage not in ("piggyback", "audit"):
            sidecar["weights_sha256"] = digest(job.model)
        (folder / job.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / job.path).write_text(json.dumps(sidecar))
    (folder / "recipe.json").write_text(json.dumps(recipe.resolved()))
    return folder


def rows(table: dict) -> dict[str, dict]:
    return {row["model"]: row for row in table["rows"]}


def test_means_and_intervals_over_seeds(recipe_file: Path):
    """70, 72, 77: mean 73, deviation sqrt(13) = 3.606, t(0.975, 2) = 4.3027: 4.3027 * 3.606 / sqrt(3) = 8.957."""
    runs = [fake_run(recipe_file, f"r{seed}", seed, acc) for seed, acc in enumerate((70.0, 72.0, 77.0))]
    table = report.summarise(runs)
    tl = rows(table)["TL"]
    assert table["seeds"] == [0, 1, 2]
    assert tl["acc_t"] == pytest.approx(73)
    assert tl["acc_t_ci"] == pytest.approx(8.957, abs=1e-3)
    assert tl["piggyback"]["again"] == pytest.approx(36.5)
    assert tl["piggyback_ci"]["again"] == pytest.approx(8.957 / 2, abs=1e-3)
    assert rows(table)["gc"]["acc_t_ci"] == 0
    shown = next(line for line in report.markdown(table).splitlines() if line.startswith("| TL"))
    assert [cell.strip() for cell in shown.split("|")[3:5]] == ["73.0 ± 9.0", "36.5 ± 4.5"]


def test_one_run_has_no_intervals_and_differences_are_in_points(recipe_file: Path):
    """TL 70, all others 10: gc is 60 points below TL and level with TGT."""
    table = report.summarise([fake_run(recipe_file, "only", 3, 70.0)])
    assert table["seeds"] == [3]
    assert "acc_t_ci" not in rows(table)["TL"]
    lines = [line.split("|") for line in report.markdown(table).splitlines() if line.startswith("| gc")]
    assert [cell.strip() for cell in lines[0][1:-1]] == ["gc", "20.0", "10.0", "35.0", "0.750"]
    assert [cell.strip() for cell in lines[1][1:-1]] == ["gc", "+0.0", "-60.0", "+0.0"]


def test_results_of_another_recipe_or_another_parent_are_left_out(recipe_file: Path):
    folder = fake_run(recipe_file, "stale", 0, 70.0)
    variant = json.loads((folder / "dispose/gc/model.json").read_text())
    variant["settings"]["lambda"] = 0.9
    (folder / "dispose/gc/model.json").write_text(json.dumps(variant))
    attack = json.loads((folder / "piggyback/TL/again.json").read_text())
    attack["parent"] = {"TL": digest("an earlier TL")}
    (folder / "piggyback/TL/again.json").write_text(json.dumps(attack))
    table = rows(report.summarise([folder]))
    assert "gc" not in table  # nor the attacks on it
    assert table["TL"]["piggyback"] == {}
    assert table["TL"]["acc_t"] == 70.0


def test_runs_that_differ_in_more_than_the_seed_are_refused(recipe_file: Path):
    first = fake_run(recipe_file, "a", 0, 70.0)
    second = fake_run(recipe_file, "b", 1, 70.0)
    document = json.loads((second / "recipe.json").read_text())
    document["finetune"]["lr"] = 0.5
    (second / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=r"b: its recipe differs from .*a in more than the seed"):
        report.summarise([first, second])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"recipe\.json: not a run's recipe"):
        report.summarise([tmp_path])


def test_files_are_written(recipe_file: Path, dtlctl):
    folder = fake_run(recipe_file, "one", 0, 70.0)
    result = dtlctl("report", folder, "--to", "out", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((recipe_file.parent / "out" / "table.json").read_text())
    assert (recipe_file.parent / "out" / "piggyback.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (recipe_file.parent / "out" / "piggyback.svg").read_text()
    assert dtlctl("report", folder, folder).returncode == 2
