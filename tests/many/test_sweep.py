"""Grids of runs and the matched comparison: parents are shared, work is resumed, λ is found on validation images."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dtlctl.errors import DivergedError, RecipeError
from dtlctl.many import compare as comparison
from dtlctl.many import sweep
from dtlctl.recipe.loading import load, parse_value
from dtlctl.recipe.schema import Compare
from dtlctl.report import summary
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint


def test_values_are_toml_or_plain_words():
    assert parse_value("0.1,2,true") == [0.1, 2, True]
    assert parse_value("none, crop") == ["none", "crop"]
    assert parse_value('["TL"],["TL", "gc"]') == [["TL"], ["TL", "gc"]]
    assert parse_value(f"1,{'9' * 5000}") == ["1", "9" * 5000]  # more digits than Python reads
    assert parse_value("[" * 5000) == ["[" * 5000]
    for text in ("{a=1}", "[{a=1}]", "a,,b", ",", "2020-01-01", "1,[07:32:00]", "[[1]]"):
        with pytest.raises(RecipeError, match="tables and nothing cannot"):
            parse_value(text)


def test_the_grid_and_its_names():
    grid = sweep.points(["dispose.gc.lambda=0.1,0.5", "seed=0,1"])
    assert [p.name for p in grid] == ["gc.lambda-0.1_seed-0", "gc.lambda-0.1_seed-1",
                                      "gc.lambda-0.5_seed-0", "gc.lambda-0.5_seed-1"]  # fmt: skip
    (point,) = sweep.points(["dispose.*.lambda=0.2"])
    assert point.name == "all.lambda-0.2"
    assert point.overrides({"gc": 0.5, "neg": 0.1}) == ["dispose.gc.lambda=0.2", "dispose.neg.lambda=0.2"]
    long = sweep.points([f"data.source.path={'x' * 80},{'x' * 79}y"])
    assert len({p.name for p in long}) == 2
    assert all(len(p.name) <= 64 for p in long)
    same = sweep.points(["data.source.path=./a/b,./ab,./c"])  # what a folder's name cannot hold is left out of it
    assert [p.name.rpartition("-")[0] for p in same[:2]] == ["data.source.path-.ab"] * 2
    assert same[0].name != same[1].name and same[2].name == "data.source.path-.c"
    for bad in ("seed", "seed=", "=1", "name=a,b"):
        with pytest.raises(RecipeError, match="--over"):
            sweep.points([bad])
    with pytest.raises(RecipeError, match="given twice"):
        sweep.points(["seed=1", "seed=2"])


def test_a_swept_factor_multiplies_the_odds_of_lambda():
    """λ / (1 − λ): 1/4 and 3/1 at λ = 0.2 and 0.75; twice that is 1/2 and 6/1, so λ = 1/3 and 6/7."""
    lambdas = {"gc": 0.2, "neg": 0.75, "rand": 0.012345}
    same, double = sweep.points(["dispose.*.odds=1,2"])
    assert double.name == "all.odds-2"
    assert same.overrides(lambdas) == [f"dispose.{name}.lambda={lam}" for name, lam in lambdas.items()]
    assert double.overrides(lambdas)[:2] == ["dispose.gc.lambda=0.333333", "dispose.neg.lambda=0.857143"]
    assert sweep.points(["dispose.neg.odds=2"])[0].overrides(lambdas) == double.overrides(lambdas)[1:2]
    for over, message in (("gc.odds=0", "above 0"), ("gc.odds=much", "above 0"), ("gc.odds=true", "above 0"),
                          (f"gc.odds=1{'0' * 400}", "above 0"), ("ngc.odds=2", "did you mean 'gc'")):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            sweep.points([f"dispose.{over}"])[0].overrides(lambdas)


def test_a_variant_whose_name_has_a_dot_is_swept(recipe_file: Path):
    """λ = 0.2 is 1/4 in odds; 4 times that is 1, λ = 0.5: by the star, and by the name as the file quotes it."""
    variant = 'dispose={"gc.v2"={lambda=0.2, steps=1, batch_size=8, unlearn={kind="uniform"}}}'
    for over in ("dispose.*.lambda=0.5", "dispose.*.odds=4", 'dispose."gc.v2".odds=4', "dispose.'gc.v2'.odds=4"):
        (point,) = sweep.points([over])
        overrides = point.overrides({"gc.v2": 0.2})
        assert overrides == ['dispose."gc.v2".lambda=0.5']
        assert load(recipe_file, [variant, *overrides]).dispose["gc.v2"].lam == 0.5
    assert sweep.names_in("data.piggyback.'a.b'.fraction") == ["data", "piggyback", "a.b", "fraction"]
    for over in (".=1", "dispose=1", "dispose.odds=1", "a..odds=1"):
        with pytest.raises(RecipeError):
            load(recipe_file, sweep.points([over])[0].overrides({"gc": 0.1}))


def test_a_sweep_trains_shared_parents_once_and_resumes(recipe_file: Path, call):
    """Two λ of gc: pre and TL are the same file; rand and the attacks on it are the same result."""
    words = ("sweep", recipe_file, "--over", "dispose.gc.lambda=0.1,0.5")
    code, first, said = call(*words)
    assert code == 0, said
    folder = recipe_file.parent / "runs" / "tiny-sweep"
    a, b = folder / "gc.lambda-0.1", folder / "gc.lambda-0.5"
    for job in ("pretrain", "finetune", "target-only", "dispose/rand"):
        assert (a / job / "model.safetensors").samefile(b / job / "model.safetensors"), job
    assert not (a / "dispose/gc/model.safetensors").samefile(b / "dispose/gc/model.safetensors")
    assert (a / "piggyback/TL/again.json").read_text() == (b / "piggyback/TL/again.json").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in first.splitlines() if "|" in line]
    assert lines[0] == ["Model", "dispose.gc.lambda"]
    assert lines[2:] == [["scratch", "–"], ["TGT", "–"], ["pre", "–"], ["TL", "–"], ["rand", "–"],
                         ["gc", "0.1"], ["gc", "0.5"]]  # fmt: skip
    made = {path.name for path in (folder / "report").iterdir()}
    assert {"table.json", "table.md", "report.html", "curve-again.png", "curve-again.svg"} <= made
    before = (a / "dispose/gc/model.safetensors").stat().st_mtime_ns
    code, again, said = call(*words, "--jobs", "2")
    assert code == 0, said
    assert again == first
    assert (a / "dispose/gc/model.safetensors").stat().st_mtime_ns == before
    assert call("sweep", recipe_file, "--over", "dispose.gc.lambda=0.5", "--over", "seed=0")[0] == 0
    other = folder / "gc.lambda-0.5_seed-0"  # another sweep takes over what this one did
    assert (other / "dispose/gc/model.safetensors").samefile(b / "dispose/gc/model.safetensors")


def test_a_run_takes_over_what_a_sweep_has_made(recipe_file: Path, call):
    """One with the point's settings; `--force` makes it anew, and what has other settings is made."""
    assert call("sweep", recipe_file, "--over", "dispose.gc.lambda=0.5")[0] == 0
    code, _, said = call("run", recipe_file, "--set", "dispose.gc.lambda=0.5")
    assert code == 0 and "nothing was done" in said
    run, point = (recipe_file.parent / "runs" / name for name in ("tiny", "tiny-sweep/gc.lambda-0.5"))
    sidecars = {path.relative_to(point) for path in point.rglob("*.json")} - {Path("recipe.json")}
    assert len(sidecars) == 12
    assert all((run / path).read_text() == (point / path).read_text() for path in sidecars)
    assert said.count("taken over from runs/tiny-sweep/gc.lambda-0.5/") == 12
    gc = "dispose/gc/model.safetensors"
    assert (run / gc).samefile(point / gc)
    assert call("dispose", recipe_file, "--set", "dispose.gc.lambda=0.5", "--only", "gc", "--force")[0] == 0
    assert not (run / gc).samefile(point / gc) and (run / gc).read_bytes() == (point / gc).read_bytes()
    code, _, said = call("dispose", recipe_file, "--only", "gc")
    assert code == 0 and "taken over" not in said


def test_only_whole_checkpoints_are_taken_over(tmp_path: Path):
    """A whole one replaces what was there, under its name here; a damaged or missing one leaves it as it is."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, model in ((ours, "old"), (theirs, "new")):
        folder.mkdir()
        checkpoint.publish(folder, torch.nn.Linear(2, 2), {"format": 1, "key": model, "model": model})
    checkpoint.adopt(theirs / "model.json", ours / "model.json", "here")
    sidecar = checkpoint.read_sidecar(ours / "model.json")
    assert sidecar and (sidecar["key"], sidecar["model"]) == ("new", "here")
    assert (ours / "model.safetensors").samefile(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    for damage in (None, b"something else"):
        if damage:
            (theirs / "model.safetensors").write_bytes(damage)
        checkpoint.adopt(theirs / "model.json", ours / "model.json", "again")
        checkpoint.load_weights(ours, sidecar, torch.nn.Linear(2, 2))
        assert checkpoint.read_sidecar(ours / "model.json") == sidecar
    assert {path.name for path in ours.iterdir()} == {"model.json", "model.safetensors"}


def test_a_sweep_over_seeds_in_parallel_is_the_report_of_the_runs(recipe_file: Path, call):
    """All but the attacks is there already, made as two runs: the attacks are left to two processes."""
    runs = [recipe_file.parent / f"runs/tiny-sweep/seed-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(runs):
        where = ("--set", f"seed={seed}", "--set", f"name={folder.name}", "--out", folder.parent, "--quiet")
        for stage in ("pretrain", "finetune", "dispose", "audit"):
            assert call(stage, recipe_file, *where)[0] == 0
    before = [path.stat().st_mtime_ns for folder in runs for path in sorted(folder.rglob("*.safetensors"))]
    code, table, said = call("sweep", recipe_file, "--over", "seed=0,1", "--jobs", "2", "--quiet")
    assert (code, said) == (0, "")
    assert table.startswith("Accuracies in %. Mean over seeds 0, 1 ±")
    assert before == [path.stat().st_mtime_ns for folder in runs for path in sorted(folder.rglob("*.safetensors"))]
    for seed, folder in enumerate(runs):
        assert sorted(path.name for path in folder.iterdir()) == [
            "audit", "dispose", "finetune", "piggyback", "pretrain", "recipe.json", "target-only"
        ]  # fmt: skip
        attacks = [json.loads(path.read_text()) for path in folder.glob("piggyback/*/again.json")]
        assert [attack["seed"] for attack in attacks] == [seed] * 3
    plain, swept = recipe_file.parent / "plain", runs[0].parent / "report"
    assert call("report", *runs, "--to", plain)[1] == table
    assert f"<code>dtlctl report {' '.join(map(str, runs))} --to {plain}</code>" in (plain / "report.html").read_text()
    assert {path.name for path in swept.iterdir()} == {path.name for path in plain.iterdir()} >= {"audit.md", "roc.png"}
    assert (swept / "audit.md").read_text() == (plain / "audit.md").read_text()
    assert "Control and readouts" in (swept / "report.html").read_text()


def test_a_run_is_one_process_and_waits_for_no_other(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Three runs of two stages by two on two cores; a stage of r0 takes 3 turns of a clock, of the others 1.

    r0's first stage runs beside both stages of r1 and the first of r2. A run by itself has both cores.
    """
    experiments = [Experiment(load(recipe_file, [f"name=r{n}"]), recipe_file.parent, quiet=True) for n in range(3)]
    log: list[tuple[str, str]] = []
    pipes: list[io.StringIO] = []
    done: set[tuple[str, str]] = set()
    turn, clock = threading.Condition(), [0]

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: object):
            self.stderr = io.StringIO()
            pipes.append(self.stderr)
            self.place = next(w for w in command if w.startswith("name=r"))[5:], command[3]
            log.append((" ".join(self.place), env["OMP_NUM_THREADS"]))

        def wait(self) -> int:
            with turn:
                if self.place == ("r0", "pretrain"):
                    assert turn.wait_for(lambda: clock[0] >= 3, timeout=20)  # a fourth may be done before this wakes
                clock[0] += 1
                done.add(self.place)
                turn.notify_all()
            return 0

        def poll(self) -> int:
            return 0

    def following(experiment: Experiment, left: list, *_: object) -> sweep._Task | None:
        while left and (experiment.recipe.name, left[0]) in done:
            del left[0]
        return sweep._Task(left[0], ["TL"], set()) if left else None

    monkeypatch.setattr(sweep, "cores", lambda: 2)
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr(sweep, "_next", following)
    calls = {experiment.recipe.name: [f"name={experiment.recipe.name}"] for experiment in experiments}
    sweep.perform(experiments, ("pretrain", "finetune"), jobs=2, calls=calls)
    started = [name for name, _ in log]
    assert started[:4] == ["r0 pretrain", "r1 pretrain", "r2 pretrain", "r1 finetune"]
    assert sorted(started[4:]) == ["r0 finetune", "r2 finetune"]
    assert [cores for _, cores in log[:5]] == ["1"] * 5
    done.clear()
    sweep.perform(experiments[1:2], ("pretrain",), jobs=2, calls=calls)
    assert log[-1] == ("r1 pretrain", "2")
    assert all(pipe.closed for pipe in pipes)  # a sweep of hundreds of tasks would run out of them


def test_a_warning_of_a_quiet_run_is_no_error(capsys):
    lines = ["dispose/gc: a warning\n", "error: r.toml: diverged\n", "try less\n"]
    assert sweep._Crew({}, quiet=True)._relay("r0", lines) == "r.toml: diverged\ntry less"
    assert capsys.readouterr().err == "r0: dispose/gc: a warning\n"


def test_a_failing_point_is_named_with_its_own_exit_code(recipe_file: Path, call):
    change = "pretrain={lr=100.0, steps=200, schedule='constant'}"
    code, _, said = call("sweep", recipe_file, "--over", "seed=0,1", "--set", change, "--jobs", "2", "--quiet")
    assert code == 3, said
    assert re.search(r"error: seed-[01], pretrain: .*diverged at step", said)  # both do; the first ends it
    assert len(said.strip().splitlines()) == 2


def test_a_parallel_sweep_says_what_its_runs_say_under_their_names(recipe_file: Path, call):
    """As it comes, each line once, and of a failure the error alone."""
    change = "target-only={lr=100.0, steps=200, schedule='constant'}"
    code, _, said = call("sweep", recipe_file, "--over", "seed=0,1", "--set", change, "--jobs", "2")
    assert code == 3, said
    *talk, last, _ = said.strip().splitlines()
    assert re.match(r"error: seed-[01], finetune: .*diverged", last)
    for seed in (0, 1):
        assert len([line for line in talk if re.match(rf"seed-{seed}: pretrain: acc_s \d", line)]) == 1
    assert all(line.startswith(("seed-0: ", "seed-1: ")) for line in talk)


@pytest.mark.parametrize(("wanted", "reached"), [(2.0, True), (60.0, False)])
def test_the_search_finds_the_matching_lambda(wanted: float, reached: bool):
    """A drop of 50 λ points meets 2 at λ = 0.04; 60 is out of reach below λ = 1, so the largest tried is returned."""
    calls: list[float] = []

    def drops(lam: float) -> list[float]:
        calls.append(lam)
        return [50 * lam - 1, 50 * lam + 1]

    found = comparison.search(drops, 0.5, Compare(target_drop=wanted, tolerance=0.2, rounds=8))
    assert found["reached"] is reached
    assert [one["lambda"] for one in found["tried"]] == calls
    assert found["tried"][0] == {"lambda": 0.5, "drop": 25.0, "drops": [24.0, 26.0]}
    assert found["lambda"] == pytest.approx(0.04, abs=0.004) if reached else found["lambda"] == max(calls)


def test_the_search_steps_out_until_the_price_is_passed_then_halves():
    """In log-odds: from 0 by 1 to -1, by 2 to -3, by 4 to -7 (mirrored too); then half-way between -7 and -3: -5.

    Less where the price is near: a drop of 7 for 5 asks for ln(7/5) = 0.336 in the place of 1, and twice that after.
    """

    def wanted(drop_of: Callable[[float], float]) -> list[float]:
        found = comparison.search(lambda lam: [drop_of(comparison.logit(lam))], 0.5, Compare(target_drop=5, rounds=5))
        return [comparison.logit(one["lambda"]) for one in found["tried"]]

    assert wanted(lambda odds: 20.0 if odds > -4 else 1.0) == pytest.approx([0, -1, -3, -7, -5], abs=0.01)
    assert wanted(lambda odds: 1.0 if odds < 4 else 20.0) == pytest.approx([0, 1, 3, 7, 5], abs=0.1)  # 4 digits of λ
    outside = wanted(lambda odds: 20.0)  # next would be -15, but the range ends at λ = 0.0005: nothing is done twice
    assert outside[3:] == pytest.approx([-7, comparison.logit(comparison.LOW)], abs=0.01)
    assert len(comparison.search(lambda lam: [20.0], 0.5, Compare(target_drop=5, rounds=30))["tried"]) == 5
    assert wanted(lambda odds: 7.0 if odds > -1 else 1.0)[:4] == pytest.approx([0, -0.336, -1.009, -0.673], abs=0.01)
    assert wanted(lambda odds: -1.0 if odds < 2 else 5.0) == pytest.approx([0, 1, 3], abs=0.01)  # no drop, no ratio
    assert comparison.logit(0.5) == 0
    assert comparison.following([(0.2, 1.0), (0.5, 9.0)], 5.0) == pytest.approx(1 / 3)  # odds 1/4 and 1: 1/2


def test_a_lambda_that_diverges_is_too_dear():
    """1 point up to λ = 0.5, 12.5 from there; above 0.6 everything diverges.

    In log-odds from 0.2 (-1.39) by 1 to 0.4046, by 2 to 0.8339 (1.61), which diverges; half-way 0.6488, which does
    too; half-way again 0.5284, for 12.5 points. Were they not too dear, the search would go on upwards.
    """

    def drops(lam: float) -> list[float]:
        if lam > 0.6:
            raise DivergedError(f"diverged at {lam:g}")
        return [1.0 if lam < 0.5 else 12.5]

    found = comparison.search(drops, 0.2, Compare(target_drop=12.5, tolerance=1.0, rounds=6))
    assert [one["lambda"] for one in found["tried"]] == [0.2, 0.4046, 0.8339, 0.6488, 0.5284]
    assert found["tried"][2:4] == [{"lambda": lam, "drop": None, "drops": None} for lam in (0.8339, 0.6488)]
    assert (found["lambda"], found["reached"]) == (0.5284, True)
    best = comparison.search(drops, 0.5, Compare(target_drop=90, rounds=2))
    assert (best["lambda"], best["drop"], best["reached"]) == (0.5, 12.5, False)
    with pytest.raises(DivergedError, match=r"every λ that was tried diverged \(0.9, 0.768\); the last: .* at 0.768"):
        comparison.search(drops, 0.9, Compare(target_drop=12.5, rounds=2))


def test_compare_goes_on_past_a_lambda_that_diverges(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """gc and rand lose 1 point at 0.1, too little; 1 and then 1/2 further in log-odds, 0.232 and 0.1548, diverge."""
    largest = 0.15

    def perform(experiments: list[Experiment], stages: tuple[str, ...], *_: object) -> None:
        if "dispose" in stages and any(
            one.lam > largest for experiment in experiments for one in experiment.recipe.dispose.values()
        ):
            raise DivergedError("training diverged at step 3")

    monkeypatch.setattr(comparison, "perform", perform)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    monkeypatch.setattr(comparison, "validation", lambda _, name: 70.0 if name == "TL" else 69.0)
    monkeypatch.setattr(summary, "summarise", lambda _: {})
    change = "compare={target_drop=4.0, rounds=3, tolerance=0.1}"
    document, _ = comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)
    document = json.loads(checkpoint.dump(document))  # which refuses NaN
    for name in ("gc", "rand"):
        found = document["variants"][name]
        assert [(one["lambda"], one["drop"]) for one in found["tried"]] == [(0.1, 1.0), (0.232, None), (0.1548, None)]
        assert (found["lambda"], found["reached"]) == (0.1, False)
    assert comparison._needed(document).rows == [[name, "0.1", "1.0", "no", "3, 2 diverged"] for name in ("gc", "rand")]
    largest = 0.0
    with pytest.raises(DivergedError, match=r"\(0.1, 0.03927, 0.005501\); the last: dispose.gc-0.005501: .*at step 3"):
        comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)


def test_a_drop_is_what_validation_loses_against_tl_of_the_same_seed(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """TL has 70 and 80, gc 68 and 79 at λ = 0.1: drops 2 and 1, as is told.

    rand has 60 and 70: 10 each, so it is out of reach.
    """
    scores = {"TL": (70.0, 80.0), "gc": (68.0, 79.0), "rand": (60.0, 70.0)}
    monkeypatch.setattr(comparison, "perform", lambda *_: None)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    monkeypatch.setattr(
        comparison, "validation", lambda experiment, name: scores[name.partition("-")[0]][experiment.recipe.seed - 5]
    )
    monkeypatch.setattr(summary, "summarise", lambda runs: [run.name for run in runs])
    change = "compare={target_drop=1.5, rounds=1, tolerance=0.1, seeds=[5, 6]}"
    document, _ = comparison.compare(recipe_file, [change], recipe_file.parent, command="x")
    assert document["table"] == ["matched-5", "matched-6"]
    gc, rand = document["variants"]["gc"], document["variants"]["rand"]
    assert gc == {"lambda": 0.1, "drop": 1.5, "reached": True, "tried": [{"lambda": 0.1, "drop": 1.5, "drops": [2, 1]}]}
    assert (rand["drop"], rand["reached"]) == (10.0, False)
    assert "gc-0.1: 2.0, 1.0 points below TL, by seed" in capsys.readouterr().err.splitlines()


def test_compare_matches_on_held_back_images_and_reports(recipe_file: Path, call):
    change = "compare={target_drop=1.0, rounds=2, tolerance=0.01, seeds=[0, 1]}"
    code, shown, said = call("compare", recipe_file, "--set", change, "--json", "--quiet")
    assert code == 0, said
    document = json.loads(shown)
    assert list(document["variants"]) == ["gc", "rand"]
    assert document["table"]["seeds"] == [0, 1]
    out = recipe_file.parent / "runs"
    for name, found in document["variants"].items():
        assert 1 <= len(found["tried"]) <= 2
        assert found["tried"][0]["lambda"] == 0.1  # the recipe's own comes first
        assert document["table"]["recipe"]["dispose"][name]["lambda"] == found["lambda"]
        assert len(found["tried"][0]["drops"]) == 2
    assert "Who needed which λ" in (out / "tiny-compare/report/report.html").read_text()
    weights = [path.stat().st_mtime_ns for path in sorted(out.rglob("model.safetensors"))]
    again, _ = comparison.compare(recipe_file, [change], out, command="x", quiet=True)
    assert again == document
    assert weights == [path.stat().st_mtime_ns for path in sorted(out.rglob("model.safetensors"))]
    found = (f"dispose.{name}.lambda={one['lambda']}" for name, one in document["variants"].items())
    words = [word for text in ("seed=1", *found) for word in ("--set", text)]
    code, _, said = call("run", recipe_file, *words)  # what was found, put into the recipe
    assert code == 0, said
    for name in document["variants"]:
        assert f"dispose/{name}: taken over from runs/tiny-compare/" in said


def test_validation_images_are_neither_trained_on_nor_tested_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """1,000 training digits less the 20 of the subset; accuracy is asked of exactly these rows of the train split."""
    experiment = Experiment(load(recipe_file), recipe_file.parent, quiet=True)
    seen = []
    monkeypatch.setattr(experiment.trainer, "load_model", lambda name: None)
    monkeypatch.setattr(experiment.trainer, "split", lambda role, split, rows: seen.append((role, split, rows)))
    monkeypatch.setattr(type(experiment.engine), "accuracy", lambda *_: 50.0)
    assert comparison.validation(experiment, "TL") == 50.0
    ((role, split, rows),) = seen
    assert (role, split, len(rows)) == ("target", "train", 980)
    assert len(np.intersect1d(rows, experiment.data.index("target"))) == 0


def test_what_cannot_be_done_is_refused_before_anything_is_trained(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = 'dispose={gc={unlearn={kind="none"}}, rand={unlearn={kind="none"}}}'
    for change, message in (
        ("data.target.fraction=1.0", "fraction = 1 leaves no target images to validate"),
        # 199.6 of the 200 images of every class, rounded: all of them
        ("data.target={path='builtin:greek', fraction=0.998}", "fraction = 0.998 leaves no target images to validate"),
        (nothing, r"needs a \[dispose.NAME\] table"),
    ):
        with pytest.raises(RecipeError, match=message):
            comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)
    for over, message in (("dispose.gc.lambda=0.1,7", "less than or equal to 1"), ("seed=0,0", "the same values")):
        with pytest.raises(RecipeError, match=message):
            sweep.run(recipe_file, [over], [], recipe_file.parent, quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--jobs N"):
        sweep.run(recipe_file, ["seed=0,1"], [], recipe_file.parent, quiet=True)
    with pytest.raises(RecipeError, match="compare: start it as one process"):
        comparison.compare(recipe_file, [], recipe_file.parent, command="x", quiet=True)
    assert [path.name for path in recipe_file.parent.iterdir()] == [recipe_file.name]
