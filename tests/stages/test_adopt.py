"""Networks that exist already stand where the run would have trained its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import STAGES, jobs
from dtlctl.run.experiment import Experiment
from dtlctl.stages import preview
from dtlctl.stages.runner import run


def new(recipe_file: Path, *changes: str, out: str = "runs") -> Experiment:
    recipe = load(recipe_file, list(changes))
    return Experiment(recipe, recipe_file.parent / out, source=str(recipe_file), quiet=True)


def sidecar(experiment: Experiment, place: str) -> dict[str, Any]:
    return json.loads((experiment.folder / place).read_text())


@pytest.fixture
def trained(begun: Path, recipe_file: Path) -> Experiment:
    """pre and TL, and their files as torchvision would name the tensors: pre.safetensors and tl.safetensors."""
    experiment = new(recipe_file, out="first")
    shutil.move(begun, experiment.folder)
    for model, head in (("pre", "source"), ("TL", "target")):
        tensors = experiment.trainer.load_model(model).plain_state(head)
        save_file({n: t.contiguous() for n, t in tensors.items()}, recipe_file.parent / f"{model.lower()}.safetensors")
    return experiment


def test_from_an_adopted_pre_everything_is_as_from_the_trained_one(trained: Experiment, recipe_file: Path):
    """The same weights and accuracy, and the same TL; the file's hash and what is guessed are in the sidecar."""
    file = recipe_file.parent / "pre.safetensors"
    second = new(recipe_file, f"pretrain={{weights='{file}'}}")
    run(second, STAGES[:2], only=("pre", "TL"))
    for place in ("pretrain/model.json", "finetune/model.json"):
        ours, theirs = sidecar(second, place), sidecar(trained, place)
        assert ours["weights_sha256"] == theirs["weights_sha256"]
        assert ours["metrics"]["acc_s"] == theirs["metrics"]["acc_s"]
    made = sidecar(second, "pretrain/model.json")
    assert len(made["weights"]["sha256"]) == 64 and made["history"] == [] and made["batch"] == {}
    taken, order = [note["text"] for note in made["notes"]["weights"]]
    assert "data.source" in taken and "audits rest on that" in taken and "nothing names them" in order
    assert run(second, STAGES[:2], only=("pre", "TL")) == []


@pytest.mark.usefixtures("undrawn")
def test_an_adopted_tl_needs_no_pre(trained: Experiment, recipe_file: Path, call):
    """All stages and the report; the source head is fitted on features, which leaves the backbone as it is."""
    file = recipe_file.parent / "tl.safetensors"
    changes = (f"finetune={{weights='{file}'}}", "target-only={steps=2, batch_size=10}", "audit.relearn_steps=2",
               "piggyback.models=['scratch', 'TL', 'gc']")  # fmt: skip
    words = [word for change in changes for word in ("--set", change)]
    code, _, err = call("run", recipe_file, *words, "-q")
    assert code == 0, err
    table = json.loads((recipe_file.parent / "runs/tiny/report/table.json").read_text())
    assert [row["model"] for row in table["rows"]] == ["scratch", "TGT", "TL", "gc", "rand"]
    experiment = new(recipe_file, *changes)
    assert not (experiment.folder / "pretrain").exists() and not (experiment.folder / "audit/pre.json").exists()
    made, before = sidecar(experiment, "finetune/model.json"), sidecar(trained, "finetune/model.json")
    assert made["metrics"]["acc_t"] == before["metrics"]["acc_t"] and made["metrics"]["acc_s"] > 30
    assert sidecar(experiment, "audit/TL.json")["metrics"]["source_head"] == "fitted here"
    assert sidecar(experiment, "audit/gc.json")["metrics"]["source_head"] == "fitted here"
    assert not any("audit_auc" in row for row in table["rows"])
    assert made["heads"] == {"target": 10, "source": 10} and made["parent"] == {}
    assert any("fitted on its frozen features" in note["text"] for note in made["notes"]["weights"])
    tensors, own = load_file(file), experiment.trainer.load_model("TL").plain_state("target")
    assert all(torch.equal(tensors[name], own[name]) for name in tensors)
    plan = preview.plan(load(recipe_file, list(changes)), experiment.folder.parent)
    row = next(row for row in plan["jobs"] if row["title"] == "finetune")
    assert (row["state"], row["weights"], row["seconds"]) == ("done", str(file), [0, 0])
    tensors["fc.bias"][0] += 1
    save_file(tensors, file)
    plan = preview.plan(load(recipe_file, list(changes)), experiment.folder.parent)
    assert {row["title"] for row in plan["jobs"] if row["state"] == "done"} == {
        "target-only",
        "piggyback/scratch/again",
    }
    assert "is adopted, not trained" in preview.text(plan)


@pytest.mark.usefixtures("undrawn")
def test_references_are_attacked_and_stand_beside(trained: Experiment, recipe_file: Path, call):
    """The same file as TL's gets exactly what TL gets; a reference has no accuracy of its own and is not audited."""
    file = recipe_file.parent / "tl.safetensors"
    changes = (f"reference.known={{weights='{file}'}}", f"finetune={{weights='{file}'}}", "target-only={steps=2}",
               "piggyback.models=['scratch', 'TL', 'known']", "audit.models=['TL']")  # fmt: skip
    head, _, tail = recipe_file.read_text().partition("[dispose.gc]")
    recipe_file.write_text(head + tail[tail.index("[piggyback]") :])
    code, out, err = call("run", recipe_file, *[w for c in changes for w in ("--set", c)], "--json", "-q")
    assert code == 0, err
    rows = {row["model"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["scratch", "TGT", "TL", "known"]
    assert rows["known"]["piggyback"] == rows["TL"]["piggyback"] and "acc_t" not in rows["known"]
    assert "recovered" not in rows["known"]


def test_what_has_no_head_for_the_target_or_names_others_is_told(trained: Experiment, recipe_file: Path):
    tensors = load_file(recipe_file.parent / "tl.safetensors")
    bare = recipe_file.parent / "bare.safetensors"
    save_file({n: t for n, t in tensors.items() if not n.startswith("fc.")}, bare)
    with pytest.raises(CheckpointError, match=r"finetune: .*no head"):
        run(new(recipe_file, f"finetune={{weights='{bare}'}}"), STAGES[:2], only=("TL",))
    names = [f"c{number}" for number in range(10)]
    table = f"{{weights='{recipe_file.parent / 'tl.safetensors'}', classes={names}}}"
    with pytest.raises(CheckpointError, match=r"finetune: .*no class '0'"):
        run(new(recipe_file, f"finetune={table}"), STAGES[:2], only=("TL",))
    experiment = new(recipe_file, f"pretrain={table}")  # of the source it is fitted anew
    run(experiment, ("pretrain",))
    _, note = sidecar(experiment, "pretrain/model.json")["notes"]["weights"]
    assert "no class '0'" in note["text"] and "fitted" in note["text"]


@pytest.mark.parametrize(("rolled", "told"), [(0, False), (1, True)])
def test_a_head_in_another_order_is_no_better_than_chance_and_told(
    trained: Experiment, recipe_file: Path, rolled: int, told: bool
):
    file = recipe_file.parent / "pre.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].roll(rolled, 0) for name in ("fc.weight", "fc.bias")}, file)
    experiment = new(recipe_file, f"pretrain={{weights='{file}'}}")
    run(experiment, ("pretrain",))
    notes = [note["text"] for note in sidecar(experiment, "pretrain/model.json")["notes"]["weights"]]
    assert any("chance" in note and "order of its classes" in note for note in notes) is told


def test_nothing_is_trained_before_all_weights_fit(recipe_file: Path):
    with pytest.raises(CheckpointError, match=r"reference\.public\.weights: nowhere.* does not exist"):
        new(recipe_file, "reference.public={weights='nowhere.safetensors'}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["finetune.classes=['a']"], "give weights too"),
        (["finetune.weights='a'", "pretrain.weights='b'"], "TL is finetune.weights"),
        (["finetune.weights='a'", "audit.models=['pre']"], "unknown model 'pre'"),
        (["reference.TL={weights='a'}"], "reference.TL: the name belongs"),
        (["reference.GC={weights='a'}"], "dispose.gc: the name belongs"),
        (["reference.a={weights='a'}", "audit.models=['a']"], "a never saw the source"),
        (["pretrain={weights='a', epochs=1, steps=2}"], "not both"),
        (["model.mean=[0.5]"], "model.mean"),
        (["pretrain.optimizer='adamw'"], "lr = 0.1 is a step for SGD"),
    ],
)
def test_contradictions_in_the_recipe(recipe_file: Path, changes: list[str], words: str):
    with pytest.raises(RecipeError, match=words):
        load(recipe_file, changes)


def test_tgt_has_a_length_of_its_own_where_finetune_says_none(recipe_file: Path):
    """That of a recipe without [finetune], 50 epochs; else finetune's, whose weights are not TGT's."""
    plan = {job.model: job for job in jobs(load(recipe_file, ["finetune.weights='a'"]))}
    assert (plan["TGT"].settings.steps, plan["TGT"].settings.epochs) == (4, None)
    recipe_file.write_text(recipe_file.read_text().replace("[finetune]\nsteps = 4", "[finetune]\nweights = 'a'"))
    plan = {job.model: job for job in jobs(load(recipe_file))}
    assert plan["TGT"].settings.epochs == 50 and plan["TGT"].weights is None and "pre" not in plan


def test_references_of_rmia_need_a_length_that_an_adopted_pre_does_not(recipe_file: Path):
    changes = ["audit.attacks=['rmia']", "audit.references=2"]
    load(recipe_file, ["pretrain.weights='a'", *changes])
    recipe_file.write_text(recipe_file.read_text().replace("[pretrain]\nsteps = 12", "[pretrain]\nweights = 'a'"))
    load(recipe_file)
    with pytest.raises(RecipeError, match=r"audit\.references are trained"):
        load(recipe_file, changes)


def test_keys_of_what_is_trained_are_those_of_a_recipe_without_weights(recipe_file: Path):
    """No weights, and no other mean and std: the same description as if these keys did not exist."""
    recipe = load(recipe_file)
    described = jobs(recipe)[0].described(recipe)
    assert (
        not {"weights", "classes", "optimizer", "label_smoothing"} & described["settings"].keys()
        and "mean" not in described["architecture"]
    )
    recipe = load(recipe_file, ["model.mean=[0.5, 0.5, 0.5]"])
    assert jobs(recipe)[0].described(recipe)["architecture"]["mean"] == [0.5, 0.5, 0.5]
