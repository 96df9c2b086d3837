"""The command line from end to end on a recipe that trains in seconds."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dtlctl.cli.app import main
from dtlctl.errors import CheckpointError, DivergedError, RecipeError
from dtlctl.model import networks
from dtlctl.objectives import balance
from dtlctl.objectives.disposal import Disposal
from dtlctl.objectives.retain import Distill
from dtlctl.objectives.unlearn import GradientCollision
from dtlctl.recipe.loading import load
from dtlctl.recipe.settings import Dispose, Pretrain
from dtlctl.run.experiment import Experiment
from dtlctl.stages import dispose as stage
from dtlctl.stages import piggyback
from dtlctl.stages.runner import run
from dtlctl.storage import checkpoint
from dtlctl.training.failures import remedy


def new_experiment(recipe_file: Path, *overrides: str) -> Experiment:
    return Experiment(load(recipe_file, list(overrides)), recipe_file.parent / "runs", quiet=True)


def weights(experiment: Experiment, folder: str) -> str:
    return json.loads((experiment.folder / folder / "model.json").read_text())["weights_sha256"]


def test_run_makes_every_artefact_and_prints_the_table(recipe_file: Path, forked, call):
    first = forked("run", recipe_file)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Accuracies in %, seed 0.\n\n| Model ")
    assert "s; 1 of 12)" in first.stderr and "s; 12 of 12)" in first.stderr
    folder = recipe_file.parent / "runs" / "tiny"
    made = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert made == {
        "recipe.json",
        *(f"{m}/model.{s}" for m in ("pretrain", "finetune", "target-only", "dispose/gc", "dispose/rand")
          for s in ("safetensors", "json")),
        *(f"piggyback/{m}/again.json" for m in ("scratch", "TL", "gc")),
        *(f"audit/{m}.json" for m in ("pre", "TL", "gc", "rand")),
        *(f"report/{n}" for n in ("table.json", "table.md", "report.html", "audit.md", "verdict.json")),
        *(f"report/{n}.{s}" for n in ("piggyback", "tradeoff-again", "roc") for s in ("png", "svg")),
    }  # fmt: skip
    table = json.loads((folder / "report" / "table.json").read_text())
    assert [row["model"] for row in table["rows"]] == ["scratch", "TGT", "pre", "TL", "gc", "rand"]
    tl = json.loads((folder / "finetune" / "model.json").read_text())
    assert table["rows"][3]["acc_t"] == tl["metrics"]["acc_t"]
    assert tl["parent"] == {"pre": json.loads((folder / "pretrain" / "model.json").read_text())["weights_sha256"]}
    assert tl["data"]["target"]["images"] == 20  # 1,000 training digits, 2 %: two a class
    assert tl["processes"] == 1

    assert "dtlctl 0" in first.stderr
    code, out, err = call("run", recipe_file)
    assert (code, out) == (0, first.stdout)
    assert "everything is up to date" in err and "dtlctl 0" not in err  # no engine was started


def test_a_stage_names_the_command_that_is_missing(recipe_file: Path, call):
    code, out, err = call("dispose", recipe_file, "--quiet")
    assert code == 4
    assert f"run: dtlctl finetune {recipe_file}\n" in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert call("audit", recipe_file, "-q", "--set", "audit.models=[]")[:2] == (0, "")  # no job, no path, no line


def test_the_command_that_is_missing_is_for_this_run(recipe_file: Path, call):
    """Without the changes and the place of this call it would make another run's model, and the error would stay."""
    changes = ("--set", "seed=7", "--set", "data.source.fraction = 0.2", "--out", recipe_file.parent / "else where")
    code, _, err = call("dispose", recipe_file, *changes)
    assert code == 4
    remedy = err.strip().partition("run: dtlctl ")[2]
    assert shlex.split(remedy) == ["finetune", *map(str, (recipe_file, *changes))]


def test_what_an_attack_took_counts_its_attackers_too(finished: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Which take 1,000 s by this clock, and one step of the paper's setting next to nothing."""
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(piggyback, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    experiment = Experiment(load(finished, ['piggyback={steps=1, attackers=[{kind="knn"}]}']), finished.parent / "runs")
    run(experiment, ("piggyback",), only=("TL",))
    assert re.search(r"piggyback/TL/again: .* \(10\d\d s\)", capsys.readouterr().err)


def test_a_change_redoes_only_what_depends_on_it(finished: Path):
    assert run(new_experiment(finished), ("pretrain", "finetune", "dispose", "piggyback")) == []
    changed = run(new_experiment(finished, "dispose.gc.lambda=0.2"), ("pretrain", "finetune", "dispose", "piggyback"))
    assert [job.title for job in changed] == ["dispose/gc", "piggyback/gc/again"]
    stale = new_experiment(finished, "pretrain.lr=0.05")
    with pytest.raises(CheckpointError, match="pre was made from other settings or data; run: dtlctl pretrain"):
        run(stale, ("finetune",), only=("TL",))


def test_what_is_up_to_date_is_named_where_work_goes_on(recipe_file: Path, capsys):
    one = Experiment(load(recipe_file), recipe_file.parent / "runs", quiet=True)
    run(one, ("pretrain",))
    one.processes.quiet = False
    for said in (1, 0):  # nothing is left to do the second time
        run(one, ("pretrain", "finetune"), only=("pre", "TL"))
        assert capsys.readouterr().err.count("up to date: pretrain\n") == said


def test_a_model_whose_weights_are_gone_is_made_again_and_no_other(finished: Path, call):
    """To the same bits, so that what comes from it is still up to date."""
    folder = finished.parent / "runs/tiny"
    gone, kept = folder / "finetune/model.safetensors", folder / "dispose/gc/model.safetensors"
    before, there = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    code, plan, _ = call("check", finished)
    assert code == 0 and [line.split()[0] for line in plan.splitlines() if line.endswith(" s")] == ["finetune"]
    code, _, said = call("finetune", finished)
    assert code == 0 and f"finetune: runs/tiny/{gone.relative_to(folder)} is missing; the model is made again" in said
    assert gone.read_bytes() == before
    code, _, said = call("dispose", finished)
    assert code == 0 and "nothing was done" in said and kept.stat().st_mtime_ns == there


def test_the_same_seed_gives_the_same_weights_and_another_does_not(finished: Path, recipe_file: Path):
    results = []
    for name, seed in (("tiny", 0), ("b", 0), ("c", 1)):  # the first is there
        experiment = new_experiment(recipe_file, f"name={name}", f"seed={seed}")
        run(experiment, ("pretrain", "finetune", "dispose"))
        results.append([weights(experiment, f) for f in ("pretrain", "finetune", "dispose/gc", "dispose/rand")])
    assert results[0] == results[1]
    assert not set(results[0]) & set(results[2])


@pytest.mark.usefixtures("begun")
def test_repair_ends_with_the_retaining_loss_alone(recipe_file: Path):
    """6 steps with repair = 0.5: the unlearning loss is reported for the first three only."""
    experiment = new_experiment(recipe_file)
    run(experiment, ("pretrain", "finetune", "dispose"), only=("pre", "TL", "gc"))
    history = json.loads((experiment.folder / "dispose/gc/model.json").read_text())["history"]
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert ["unlearn" in row for row in history] == [True, True, True, False, False, False]


@pytest.mark.usefixtures("begun")
def test_a_row_of_the_history_is_of_unlearning_or_of_repair(recipe_file: Path, monkeypatch):
    """20 steps, a check after each, repair from round(20 * 0.55) = 11 on. NEG's loss is minus the source loss:
    so are means over the same steps."""
    monkeypatch.setattr(balance, "APART", 1)
    change = 'dispose={neg={lambda=0.1, steps=20, batch_size=8, lr=0.02, repair=0.45, unlearn={kind="negative-ce"}}}'
    experiment = new_experiment(recipe_file, change)
    run(experiment, ("pretrain", "finetune", "dispose"), only=("pre", "TL", "neg"))
    made = json.loads((experiment.folder / "dispose/neg/model.json").read_text())
    assert [row["step"] for row in made["history"]] == list(range(1, 21))
    driven, repaired = made["history"][:11], made["history"][11:]
    assert all(row["unlearn"] == pytest.approx(-row["source_loss"], abs=1e-6) for row in driven)
    assert not any("unlearn" in row for row in repaired)
    assert made["metrics"]["source_loss_unlearned"] == driven[-1]["source_loss"]


@pytest.mark.usefixtures("begun")
def test_lambda_zero_and_no_unlearning_are_the_same(recipe_file: Path):
    """Eq. 1 at lambda = 0 is the retaining loss, whatever the unlearning loss; chunks = 1 on both sides."""
    none = 'none={init="TL", steps=4, batch_size=8, lr=0.02, unlearn={kind="none"}, retain={kind="distill"}}'
    changes = f"dispose={{rand={{lambda=0.0}}, {none}}}"
    experiment = new_experiment(recipe_file, changes)
    run(experiment, ("dispose",), only=("rand", "none"))
    assert weights(experiment, "dispose/rand") == weights(experiment, "dispose/none")


@pytest.mark.parametrize("retain", ['{kind="distill", on="both"}', '{kind="target-ce"}', '{kind="a-gem"}'])
@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("unlearn", ["gradient-collision", "uniform", "negative-ce", "null-space"])
def test_every_pair_of_losses_trains(recipe_file: Path, retain: str, unlearn: str):
    change = f'dispose={{rand={{batch_size=32, unlearn={{kind="{unlearn}"}}, retain={retain}}}}}'
    experiment = new_experiment(recipe_file, change)
    done = run(experiment, ("pretrain", "finetune", "dispose"), only=("pre", "TL", "rand"))
    assert [job.model for job in done] == ["rand"]


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(
    ("start", "anew"), [("fresh_stages=1", "2"), ("fresh_stages=3", "012"), ('init="fresh"', "012s")]
)
def test_a_disposal_starts_from_tl_but_for_what_is_drawn_anew(recipe_file: Path, start: str, anew: str):
    """ResNet-8 has stages 0, 1, 2 after its stem; heads go with the stages that they read."""
    experiment = new_experiment(recipe_file, f"dispose={{rand={{{start}}}}}")
    (job,) = experiment.chosen(("dispose",), ("rand",))
    heads = {"source": 10, "target": 10}
    student = stage._student(experiment, job.settings, heads, "dispose", {"global_batch_norm": True}).state_dict()
    tl = experiment.trainer.load_model("TL").state_dict()
    fresh = experiment.trainer.new_model(heads, "dispose/init").state_dict()
    drawn = tuple(f"backbone.stages.{number}." for number in anew if number != "s")
    for name, tensor in student.items():
        new = "s" in anew or name.startswith(("heads.", *drawn))
        assert torch.equal(tensor, (fresh if new else tl)[name]), name
    assert any(not torch.equal(tl[name], fresh[name]) for name in student if "stages.0" in name)


def test_more_fresh_stages_than_there_are_is_one_line(recipe_file: Path):
    with pytest.raises(
        RecipeError, match=r"dispose\.rand\.fresh_stages: 4, but resnet8 has 3 stages; write 3 or less$"
    ):
        new_experiment(recipe_file, "dispose={rand={fresh_stages=4}}")


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("before", "key"), [(99.0, "lambda"), (99.0, "price"), (0.0, "")])
def test_gradient_collision_that_lowers_the_source_loss_is_told(recipe_file: Path, monkeypatch, capsys, before, key):
    """Whatever the source loss becomes, it is less than 99 nats and more than 0; what it was is in the sidecar too.

    What to enlarge is what the recipe gives: who gives a price has no lambda to set."""
    monkeypatch.setattr(stage.Disposal, "source_loss_of_teacher", lambda *_: before)
    experiment = new_experiment(recipe_file, *["dispose={gc={price=2.0, repair=0.0}}"] * (key == "price"))
    run(experiment, ("dispose",), only=("gc",))
    told = capsys.readouterr().err
    assert ("dispose/gc: gradient collision lowered the source loss, from 99.00" in told) == bool(key)
    assert (f"try a larger {key} or lr" in told) == bool(key)
    metrics = json.loads((experiment.folder / "dispose/gc/model.json").read_text())["metrics"]
    assert metrics["source_loss_tl"] == before and 0 < metrics["source_loss_unlearned"] < 99


@pytest.mark.usefixtures("begun")
def test_tls_source_loss_is_that_of_train_mode_and_leaves_it_alone(recipe_file: Path):
    experiment = new_experiment(recipe_file)
    model, batches = (
        experiment.trainer.load_model("pre").eval(),
        experiment.trainer.batches("source", 8, "dispose/source"),
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = {"chunks": 2, "batch_norm": "train", "images": 100, "label_seed": 0}
    disposal = Disposal(0.5, GradientCollision(), Distill(), model, model, **more)
    found = disposal.source_loss_of_teacher([batches[0], batches[1]])
    assert not model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.train()
    parts = [(b.x[rows], b.y[rows]) for b in (batches[0], batches[1]) for rows in (slice(0, 4), slice(4, 8))]
    losses = [-model(x, "source").log_softmax(1)[range(4), y].mean().item() for x, y in parts]
    assert found == pytest.approx(sum(losses) / 4, abs=1e-5)


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_tls_source_loss_is_that_of_a_disposal_that_stands_still(recipe_file: Path, batch_norm: str):
    """At a step size of next to nothing the student is TL in all 8 steps, which see the batches that TL was shown."""
    experiment = new_experiment(
        recipe_file, f'dispose={{gc={{steps=8, lr=1e-9, repair=0.0, batch_norm="{batch_norm}"}}}}'
    )
    run(experiment, ("pretrain", "finetune", "dispose"), only=("pre", "TL", "gc"))
    made = json.loads((experiment.folder / "dispose/gc/model.json").read_text())
    losses = [row["source_loss"] for row in made["history"]]
    assert len(losses) == 8
    assert made["metrics"]["source_loss_tl"] == pytest.approx(sum(losses) / 8, abs=1e-4)


def test_the_diagnosis_looks_at_the_end_of_unlearning():
    """Rows of driving, then repair; 4.8 nats at the end of driving, whatever repair makes of it."""
    rows = [{"source_loss": 3.0, "unlearn": 1.0}, {"source_loss": 4.8, "unlearn": 0.1}, {"source_loss": 2.0}]
    assert stage.diagnose(rows, 2.8) == {"source_loss_tl": 2.8, "source_loss_unlearned": 4.8}
    assert stage.diagnose(rows[2:], 2.8) == {}


def test_divergence_publishes_nothing(recipe_file: Path):
    experiment = new_experiment(recipe_file, "pretrain.lr=100", "pretrain.steps=200", "pretrain.schedule=constant")
    with pytest.raises(DivergedError, match=r"^pretrain: training diverged at step \d+.*\n.*smaller lr"):
        run(experiment, ("pretrain",))
    assert not list(experiment.folder.rglob("model.*"))


def test_a_remedy_of_divergence_names_keys_that_the_table_has():
    """A price finds lambda; a table of pre-training has neither, and one that clips at 1 cannot clip at 1 instead."""
    given = Dispose.model_validate({"lambda": 0.1, "clip": 0.5})
    assert remedy(given) == "a smaller lr or another lambda"
    assert remedy(Dispose()) == "a smaller lr, clip = 1.0 or another price"
    assert remedy(Dispose.model_validate({"unlearn": {"kind": "none"}})) == "a smaller lr or clip = 1.0"
    assert remedy(Pretrain(epochs=1)) == "a smaller lr or clip = 1.0"
    assert remedy(Pretrain(weights="x")) == "other weights"


def test_a_damaged_checkpoint_is_refused_with_both_hashes(recipe_file: Path):
    experiment = new_experiment(recipe_file)
    run(experiment, ("pretrain",))
    file = experiment.folder / "pretrain" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"SHA-256 [0-9a-f]{64} where model.json says [0-9a-f]{64}"):
        run(new_experiment(recipe_file), ("finetune",), only=("TL",))


def test_a_sidecar_that_is_no_json_is_named(recipe_file: Path):
    experiment = new_experiment(recipe_file)
    run(experiment, ("pretrain",))
    (experiment.folder / "pretrain" / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json: not a readable sidecar"):
        run(new_experiment(recipe_file), ("pretrain",))


def test_weights_of_another_model_are_refused(tmp_path: Path):
    small = networks.build("resnet8", {"source": 10}, width=4)
    checkpoint.publish(tmp_path, small, {"format": checkpoint.FORMAT})
    sidecar = checkpoint.read_sidecar(tmp_path / "model.json")
    assert sidecar is not None
    with pytest.raises(CheckpointError, match="does not fit the model"):
        checkpoint.load_weights(tmp_path, sidecar, networks.build("resnet8", {"source": 10}, width=8))
    same = networks.build("resnet8", {"source": 10}, width=4)
    checkpoint.load_weights(tmp_path, sidecar, same)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])


def test_publishing_leaves_no_temporary_file_and_a_full_disk_the_old_checkpoint(tmp_path: Path, monkeypatch):
    model = networks.build("resnet8", {"source": 10}, width=4)
    checkpoint.publish(tmp_path, model, {"format": checkpoint.FORMAT})
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.publish(tmp_path, model, {"format": checkpoint.FORMAT})
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    checkpoint.load_weights(tmp_path, checkpoint.read_sidecar(tmp_path / "model.json") or {}, model)


def test_unwritable_output_and_bad_options_have_their_exit_codes(recipe_file: Path, call):
    (recipe_file.parent / "file").write_text("")
    code, _, err = call("run", recipe_file, "--out", "file/below")
    assert code == 4
    assert "cannot be written" in err
    assert len(err.strip().splitlines()) == 1
    for wrong in (
        ("run", recipe_file, "--set", "dispose.gc.lambda=1.5"),
        ("run", recipe_file, "--set", "name=../x"),
        ("dispose", recipe_file, "--only", "gcc"),
        ("run", recipe_file, "--nonsense"),
        ("run", "missing.toml"),
    ):
        assert call(*wrong)[0] == 2, wrong
    code, _, err = call("pretrain", recipe_file, "--set", "data.source.path=./nowhere")
    assert code == 4
    assert "nowhere" in err


def test_check_plans_without_training(recipe_file: Path, call):
    code, out, err = call("check", recipe_file, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["parameters"] > 4000
    assert [row["title"] for row in plan["jobs"]][:4] == ["pretrain", "target-only", "finetune", "dispose/gc"]
    assert not (recipe_file.parent / "runs").exists()
    assert "stages" in call("check", recipe_file)[1]


def test_help_answers_without_torch(monkeypatch, capsys):
    import subprocess
    import sys

    code = "import sys; sys.argv=['dtlctl','--help']\nfrom dtlctl.cli.app import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch','datasets','accelerate','matplotlib'} & sys.modules.keys(), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    monkeypatch.setattr(sys, "argv", ["dtlctl", "dispose", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "--only" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_named(recipe_file: Path, call):
    code, _, err = call("pretrain", recipe_file, "--set", 'track.with=["aim"]')
    assert code == 2 and "track.with: aim is not installed" in err and len(err.strip().splitlines()) <= 2


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_rows_of_the_sidecar_and_nothing_is_written_without_the_key(recipe_file: Path, call):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("pretrain", recipe_file)[0] == 0
    folder = recipe_file.parent / "runs" / "tiny"
    assert not (folder / "track").exists()
    code, _, err = call("pretrain", recipe_file, "--force", "--set", 'track.with=["tensorboard"]')
    assert code == 0, err
    found = EventAccumulator(str(folder / "track" / "tiny"))
    found.Reload()
    rows = json.loads((folder / "pretrain/model.json").read_text())["history"]
    for name in ("loss", "lr", "acc_s"):
        expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(event.step, event.value) for event in found.Scalars(f"pretrain/{name}")] == expected


def test_pre_training_stops_where_held_out_images_say_so(recipe_file: Path, capsys):
    """One of each digit's seven images is held out; at next to no step size no epoch is better than the first.

    60 images in batches of 20 are 3 steps: the best row is that of step 3, and two epochs later it stops.
    """
    table = "pretrain={epochs=9, batch_size=20, lr=1e-9, patience=2, held_out=0.2}"
    experiment = new_experiment(recipe_file, table, "data.source.fraction=0.0695")
    (job,) = experiment.chosen(("pretrain",))
    kept, held = experiment.trainer.rows(job)
    labels = experiment.data.images("source", "train").labels
    assert (len(kept), len(held)) == (60, 10)
    assert np.bincount(labels[held]).tolist() == [1] * 10 and not set(kept) & set(held)
    assert sorted([*kept, *held]) == experiment.data.index("source").tolist()
    same, shared = "pretrain.seed=0", ("seed=1", "pretrain.seed=0")  # one pre-training for every seed of the recipe
    others = [new_experiment(recipe_file, table, "data.source.fraction=0.0695", *s) for s in ([same], shared)]
    assert [other.trainer.rows(job)[1].tolist() for other in others] == [held.tolist()] * 2
    run(experiment, ("pretrain",))
    made = json.loads((experiment.folder / "pretrain/model.json").read_text())
    assert (made["metrics"]["kept_step"], made["history"][-1]["step"]) == (3, 9)
    model = experiment.trainer.load_model("pre")
    right = experiment.engine.correct(model, "source", experiment.trainer.split("source", "train", held))
    assert 100 * right.mean() == pytest.approx(made["metrics"]["held_out"])
