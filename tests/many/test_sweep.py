"""Grids of runs: parents are shared, work is resumed, and every process has its share of the machine."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dtlctl.errors import DivergedError, RecipeError
from dtlctl.many import sweep
from dtlctl.recipe.loading import load
from dtlctl.recipe.overrides import parse_value
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint
from tests.reliability.fork import Started


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
    assert point.overrides == ["dispose.*.lambda=0.2"]
    long = sweep.points([f"data.source.path={'x' * 80},{'x' * 79}y"])
    assert len({p.name for p in long}) == 2
    assert all(len(p.name) <= 64 for p in long)
    same = sweep.points(["data.source.path=./a/b,./ab,./c"])  # what a folder's name cannot hold is left out of it
    assert [p.name.rpartition("-")[0] for p in same[:2]] == ["data.source.path-.ab"] * 2
    assert same[0].name != same[1].name and same[2].name == "data.source.path-.c"
    case = sweep.points(["data.source.path=a,A"])  # one folder on some file systems
    assert len({p.name.lower() for p in case}) == 2
    for bad in ("seed", "seed=", "=1", "name=a,b"):
        with pytest.raises(RecipeError, match="--over"):
            sweep.points([bad])
    with pytest.raises(RecipeError, match="given twice"):
        sweep.points(["seed=1", "seed=2"])


@pytest.mark.parametrize("text", ["a" * 90, "../" * 30 + "x", "λ" * 70, "", "-._", "b." * 40])
def test_any_text_makes_a_name_that_a_recipe_may_have(recipe_file: Path, text: str):
    names = {sweep.folder_name(text, {"of": number}, hashed=number > 0) for number in range(3)}
    assert all(load(recipe_file, [f"name={name}"]).name == name for name in names)
    assert len(names) == 3


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


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
def test_the_lines_of_a_plan_make_the_sweep(recipe_file: Path, call):
    """Each is a command of its own, for a cluster; the pre-training that the points share is made by the first."""
    words = ["sweep", recipe_file, "--over", "dispose.gc.lambda=0.1,0.5"]
    code, planned, _ = call(*words, "--plan")
    assert code == 0
    lines = [shlex.split(line) for line in planned.splitlines()]
    assert [line[:2] for line in lines] == [["dtlctl", "pretrain"], ["dtlctl", "run"], ["dtlctl", "run"]]
    folder = recipe_file.parent / "runs" / "tiny-sweep"
    assert not folder.exists()
    for line in (lines[0], lines[2], lines[1]):
        assert call(*line[1:])[0] == 0
    a, b = (folder / f"gc.lambda-{lam}" for lam in ("0.1", "0.5"))
    assert (a / "pretrain/model.safetensors").samefile(b / "pretrain/model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}
    assert call(*words)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("model.safetensors")}


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


def import_nothing(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Start the processes of a sweep, but for the first ones, from the server that has imported what they need."""
    start, count = sweep._start, itertools.count()

    def begin(*given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if next(count) >= after:
                patch.setattr("subprocess.Popen", Started)
            return start(*given)

    monkeypatch.setattr(sweep, "_start", begin)


def test_a_sweep_over_seeds_in_parallel_is_the_report_of_the_runs(
    _finished: Path, recipe_file: Path, call, monkeypatch: pytest.MonkeyPatch
):
    """All but the attacks is there already, made as two runs: the attacks are left to two processes.

    What they say is said under their names, as it comes, each line once. One of them is started as a sweep does it; the
    other has nothing to import.
    """
    import_nothing(monkeypatch, after=1)
    runs = [recipe_file.parent / f"runs/tiny-sweep/seed-{seed}" for seed in (0, 1)]
    shutil.copytree(_finished, runs[0], ignore=shutil.ignore_patterns("piggyback"))
    where = ("--set", "seed=1", "--set", f"name={runs[1].name}", "--out", runs[1].parent, "--quiet")
    for stage in ("pretrain", "finetune", "dispose", "audit"):
        assert call(stage, recipe_file, *where)[0] == 0
    before = [path.stat().st_mtime_ns for folder in runs for path in sorted(folder.rglob("*.safetensors"))]
    code, table, said = call("sweep", recipe_file, "--over", "seed=0,1", "--jobs", "2")
    assert code == 0, said
    told = [line for line in said.splitlines() if "acc_pl" in line]
    assert len(told) == 6 and all(
        sum(line.startswith(f"seed-{seed}: piggyback/{model}/again: ") for line in told) == 1
        for seed in (0, 1)
        for model in ("scratch", "TL", "gc")
    ), said
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

    def following(experiment: Experiment, left: list, *_: object) -> sweep.Task | None:
        while left and (experiment.recipe.name, left[0]) in done:
            del left[0]
        return sweep.Task(left[0], ["TL"], set()) if left else None

    monkeypatch.setattr(sweep, "cores", lambda: 2)
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr(sweep, "_next", following)
    for experiment in experiments:
        experiment.words = ["--set", f"name={experiment.recipe.name}"]
    sweep.perform(experiments, ("pretrain", "finetune"), jobs=2)
    started = [name for name, _ in log]
    assert started[:4] == ["r0 pretrain", "r1 pretrain", "r2 pretrain", "r1 finetune"]
    assert sorted(started[4:]) == ["r0 finetune", "r2 finetune"]
    assert [cores for _, cores in log[:5]] == ["1"] * 5
    done.clear()
    sweep.perform(experiments[1:2], ("pretrain",), jobs=2)
    assert log[-1] == ("r1 pretrain", "2")
    assert all(pipe.closed for pipe in pipes)  # a sweep of hundreds of tasks would run out of them


def started(experiments: list[Experiment], jobs: int, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of the processes of a sweep of one stage, in order; the first lasts until the others end."""
    seen: list[str | None] = []
    done, others = set(), threading.Event()

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: object):
            self.stderr, self.name = io.StringIO(), next(w for w in command if w.startswith("name="))[5:]
            seen.append(env.get("CUDA_VISIBLE_DEVICES"))

        def wait(self) -> int:
            if self.name == "r0":
                assert others.wait(timeout=20)
            done.add(self.name)
            if len(done) == len(experiments) - 1:
                others.set()
            return 0

        def poll(self) -> int:
            return 0

    def following(one: Experiment, left: list, *_: object) -> sweep.Task | None:
        return None if one.recipe.name in done else sweep.Task("pretrain", [], set())

    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr(sweep, "_next", following)
    for one in experiments:
        one.words = ["--set", f"name={one.recipe.name}"]
    sweep.perform(experiments, ("pretrain",), jobs=jobs)
    return seen


def test_every_process_of_a_sweep_has_a_gpu_of_its_own(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """r0 keeps the first of two GPUs; r1, r2 and r3, one after the other, have the second. Three at a time on one."""
    experiments = [Experiment(load(recipe_file, [f"name=r{n}"]), recipe_file.parent, quiet=True) for n in range(4)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for listed, seen in (
        (None, ["0", "1", "1", "1"]),
        ("5, GPU-8932f937", ["5", "GPU-8932f937", "GPU-8932f937", "GPU-8932f937"]),
        ("3", ["3"] * 4),
        ("", [""] * 4),
        ("-1", ["-1"] * 4),
    ):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if listed is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert started(experiments, 2, monkeypatch) == seen, listed
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,-1,2")  # what follows -1 is not seen
    assert started(experiments[:3], 3, monkeypatch) == ["0", "1", "0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert started(experiments, 2, monkeypatch) == [None] * 4


def test_a_warning_of_a_quiet_run_is_no_error(capsys: pytest.CaptureFixture[str]):
    lines = "import sys; sys.stderr.write('dispose/gc: a warning\\nerror: r.toml: diverged\\ntry less\\n'); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", lines], stderr=subprocess.PIPE, text=True)
    with pytest.raises(DivergedError, match=r"^r0: r\.toml: diverged\ntry less$"):
        sweep._wait(process, "r0", "dispose")
    assert capsys.readouterr().err == "r0: dispose/gc: a warning\n"


def test_a_failing_point_is_named_with_its_own_exit_code(recipe_file: Path, call, monkeypatch: pytest.MonkeyPatch):
    import_nothing(monkeypatch)
    change = "pretrain={lr=100.0, steps=200, schedule='constant'}"
    code, _, said = call("sweep", recipe_file, "--over", "seed=0,1", "--set", change, "--jobs", "2", "--quiet")
    assert code == 3, said
    assert re.search(r"error: seed-[01]: pretrain: .*diverged at step", said)  # both do; the first ends it
    assert len(said.strip().splitlines()) == 2


def test_an_error_says_which_setting_it_is_of(recipe_file: Path, call):
    """Before anything is trained, and while one run after the other is: the second rate is too large."""
    (recipe_file.parent / "bare").mkdir()
    code, _, said = call("sweep", recipe_file, "--over", "data.source.path=builtin:digits,./bare")
    assert code == 4 and 'error: data.source.path="./bare": data.source.path: ./bare holds no image' in said
    steps = "pretrain={lr=0.1, steps=200, schedule='constant'}"
    code, _, said = call("sweep", recipe_file, "--set", steps, "--over", "pretrain.lr=0.001,100", "--quiet")
    assert code == 3 and said.startswith("error: pretrain.lr-100: pretrain: training diverged at step"), said


def test_what_cannot_be_done_is_refused_before_anything_is_trained(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    for over, message in (
        ("dispose.gc.lambda=0.1,7", "less than or equal to 1"),
        ("seed=0,0", "the same values"),
        ("dispose.*.odds=0,1", "dispose.gc.odds: 0 is no factor"),
        ("dispose.ngc.odds=2", "did you mean 'gc'"),
        (".=1", "not valid TOML"),
        ("#seed=1,2", "write key.path=value"),
        ("dispose=1", "dispose: it takes a table, not 1"),
        ("dispose.odds=1", "dispose.odds"),
        ("a..odds=1", "not valid TOML"),
    ):
        with pytest.raises(RecipeError, match=message):
            sweep.run(recipe_file, [over], [], recipe_file.parent, quiet=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--jobs N"):
        sweep.run(recipe_file, ["seed=0,1"], [], recipe_file.parent, quiet=True)
    assert [path.name for path in recipe_file.parent.iterdir()] == [recipe_file.name]
