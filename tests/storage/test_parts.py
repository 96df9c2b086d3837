"""A stop during attacks costs what was at work: finished trials, attacks and references are not made again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtlctl.attacks import signals
from dtlctl.attacks.tuning import Evaluation, Setting, Trial
from dtlctl.errors import CheckpointError, DivergedError, Stopped
from dtlctl.many import sweep
from dtlctl.recipe.loading import load
from dtlctl.run.earlier import Earlier
from dtlctl.run.experiment import Experiment
from dtlctl.run.trainer import Trainer
from dtlctl.stages import audit as auditing
from dtlctl.stages import reference
from dtlctl.stages.piggyback import Repetition
from dtlctl.stages.runner import run
from dtlctl.storage.parts import Parts
from dtlctl.training.engine import Engine

ATTACKERS = (
    'piggyback.attackers=[{kind="full", lr=[0.01, 0.1], steps=4}, {kind="probe", stage="embedding", C=[0.1, 1.0]}]',
    "piggyback.attack_seeds=2",
)
RMIA = 'audit={attacks=["loss", "rmia", "grad-x"], modes=["as-is"], repeats=2, references=2, relearn_steps=0}'


def new_experiment(recipe_file: Path, *overrides: str) -> Experiment:
    return Experiment(load(recipe_file, list(overrides)), recipe_file.parent, quiet=True)


def stop(*_: Any) -> None:
    raise Stopped(15)


def never(*_: Any) -> None:
    raise AssertionError("made again")


def metrics(experiment: Experiment, path: str) -> dict[str, Any]:
    found = json.loads((experiment.folder / path).read_text())["metrics"]
    return {k: v for k, v in found.items() if k not in ("trials_per_minute", "attack_seconds", "cost")}


def test_tuned_attackers_go_on_where_they_were_stopped(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Stopped before the first final of four: the one setting and 4 trials are there, and nothing is lost by it."""
    whole, parts = (
        new_experiment(recipe_file, *ATTACKERS, "name=whole"),
        new_experiment(recipe_file, *ATTACKERS, "name=parts"),
    )
    parts.processes.quiet = False
    run(whole, ("piggyback",), only=("scratch",))
    with monkeypatch.context() as patch:
        patch.setattr(Repetition, "finish", stop)
        with pytest.raises(Stopped):
            run(parts, ("piggyback",), only=("scratch",))
    kept = {path.name for path in (parts.folder / "piggyback/scratch/again.resume").iterdir()}
    assert {"single.json", *(f"trial-0-{n}.json" for n in range(4))} <= kept
    assert not any(name.startswith(("final", "trial-1")) for name in kept)

    said = "piggyback/scratch/again: goes on with 5 finished parts\n"
    assert "goes on" not in capsys.readouterr().err
    attempt, seeds = Repetition.attempt, []
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train", never)
        patch.setattr(Repetition, "attempt", lambda self, *point: (seeds.append(self.seed), attempt(self, *point))[1])
        run(parts, ("piggyback",), only=("scratch",))
    assert seeds == [1] * 4
    assert said in capsys.readouterr().err
    costs = [json.loads((one.folder / "piggyback/scratch/again.json").read_text())["metrics"] for one in (parts, whole)]
    assert ["attack_seconds" in one for one in costs] == [False, True]
    assert metrics(parts, "piggyback/scratch/again.json") == metrics(whole, "piggyback/scratch/again.json")
    assert not (parts.folder / "piggyback/scratch/again.resume").exists()


def test_a_result_that_was_cut_short_is_not_kept(tmp_path: Path):
    trial = Trial(Setting("full", "sgd", 0.1), 0, [Evaluation(4, 50.0, 0.1 + 0.2)])
    for cut_short in (True, False):
        (task,) = Parts(tmp_path, "key").each("trial", Trial, [lambda: trial], lambda cut=cut_short: cut)
        assert task() == trial
        assert (tmp_path / "trial-0.json").exists() != cut_short


def test_what_is_kept_comes_back_to_the_bit_and_for_its_key_alone(tmp_path: Path):
    final = Trial(Setting("probe", "logistic", 1e-3), 1, [Evaluation(0, 100 / 3, 0.1 + 0.2)], 1e-17)
    made = []
    for key, count in (("key", 1), ("key", 1), ("other", 2)):
        kept = Parts(tmp_path, key)
        (task,) = kept.each("final", Trial, [lambda: (made.append(1), final)[1]], lambda: False)
        found = task()
        assert found == final and type(found.evaluations[0]) is Evaluation and type(found.seed) is int
        assert len(made) == count


@pytest.mark.parametrize(
    "text", ['{"key": "key", "part": [1, 2]}', "{", "[]", '{"part": {}}', "[" * 100_000, '{"key": "key", "part": NaN}']
)
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, text: str):
    (tmp_path / "trial-0.json").write_text(text)
    (task,) = Parts(tmp_path, "key").each("trial", Trial, [never], lambda: False)
    with pytest.raises(CheckpointError, match=r"trial-0.json: cannot be used: .*; delete it to make it again"):
        task()


@pytest.mark.parametrize("part", [{"auc": float("nan")}, [0.5, float("inf")]])
def test_a_number_that_is_not_finite_is_not_kept_as_something_else(tmp_path: Path, part: Any):
    alone: Any = SimpleNamespace(agree=lambda code: code, by_main=lambda work: work())
    with pytest.raises(DivergedError, match=r"loss.json: a number of this result is not finite"):
        Parts(tmp_path, "key").common(alone, "loss", Any, lambda: part)
    assert not list(tmp_path.iterdir())


def test_a_reference_must_have_said_something_finite_of_every_image(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that says it of one image fewer is not used; a reference that answers nan is not kept."""
    experiment = new_experiment(recipe_file, RMIA)
    run(experiment, ("pretrain", "audit"), only=("pre",))
    (experiment.folder / "audit/pre.json").unlink()
    path = experiment.folder / "audit/references/1.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "part": document["part"][1:]}))
    with pytest.raises(CheckpointError, match=r"references/1.json: cannot be used: .*; delete it to make it again"):
        run(new_experiment(recipe_file, RMIA), ("audit",), only=("pre",))
    path.unlink()
    scaled = signals.scaled
    monkeypatch.setattr(signals, "scaled", lambda *given: scaled(*given) * float("nan"))
    with pytest.raises(DivergedError, match="are not finite"):
        run(new_experiment(recipe_file, RMIA), ("audit",), only=("pre",))
    assert not path.exists()


def test_an_audit_goes_on_where_it_was_stopped(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped in the last of three attacks: the others, with their references, are not made again, nor for TL."""
    whole, parts = new_experiment(recipe_file, RMIA, "name=whole"), new_experiment(recipe_file, RMIA, "name=parts")
    for experiment in (whole, parts):
        run(experiment, ("pretrain", "finetune"), only=("pre", "TL"))
    run(whole, ("audit",), only=("pre", "TL"))
    judge, judged = auditing.Head._judge, []

    def judging(head: Any, attack: Any, name: str, seen: Any) -> dict[str, Any]:
        if name == "grad-x" and not judged.count(name):
            judged.append(name)
            raise Stopped(15)
        judged.append(name)
        return judge(head, attack, name, seen)

    monkeypatch.setattr(auditing.Head, "_judge", judging)
    with pytest.raises(Stopped):
        run(parts, ("audit",), only=("pre",))
    assert judged == ["blind", "loss", "rmia", "grad-x"]
    assert {path.name for path in (parts.folder / "audit/references").iterdir()} == {"0.json", "1.json"}
    judged[:] = ["grad-x"]
    monkeypatch.setattr(Engine, "train", never)
    again = new_experiment(recipe_file, RMIA, "name=parts")  # as another process would see it
    run(again, ("audit",), only=("pre", "TL"))
    assert judged == ["grad-x", "blind", "grad-x", "blind", "loss", "rmia", "grad-x"]
    for model in ("pre", "TL"):
        assert metrics(again, f"audit/{model}.json") == metrics(whole, f"audit/{model}.json")


def test_every_image_is_unknown_to_one_reference_of_each_pair(recipe_file: Path):
    """Five images: halves of two and three, the other way round for the second; the next pair draws anew."""
    experiment = new_experiment(recipe_file)
    pairs = [[reference._half(experiment, 2 * pair + n, 5) for n in range(2)] for pair in range(4)]
    for first, second in pairs:
        assert sorted([*first, *second]) == list(range(5)) and len(first) == 2
    assert len({tuple(first) for first, _ in pairs}) > 1


def test_references_of_other_runs_are_taken_over_if_they_fit(recipe_file: Path):
    """The key is of the pre-training and the seed: a run of another seed has no use for them."""
    first, second, third = (
        new_experiment(recipe_file, RMIA, *more) for more in ((), ("name=second",), ("name=third", "seed=1"))
    )
    run(first, ("pretrain", "audit"), only=("pre",))
    (first.folder / "audit/references/damaged.json").write_text("no JSON")  # of another run: it is none of ours
    for other, left in ((second, 0), (third, 2)):
        run(other, ("pretrain",))
        assert reference.missing(other, 2) == 2
        with other.results.opened():
            Earlier([first.folder]).take(other, next(job for job in other.jobs if job.title == "audit/TL"))
        assert reference.missing(other, 2) == left


def test_a_sweep_trains_its_references_once(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    trained, train = [], reference._reference
    monkeypatch.setattr(
        reference,
        "_reference",
        lambda experiment, number, *rest: trained.append(number) or train(experiment, number, *rest),
    )
    few = [RMIA, 'audit.models=["pre", "TL"]', 'piggyback.models=["TL"]']
    sweep.run(
        recipe_file, ["dispose.rand.lambda=0.1,0.2", "finetune.lr=0.01,0.02"], few, recipe_file.parent, quiet=True
    )
    assert trained == [0, 1]


def test_a_trial_is_read_as_it_was_made(tmp_path: Path):
    """Whole numbers too, or the last trainings that are named after them would be made again after every stop."""
    made = Trial(Setting("compressed", None, 5, "embedding", 8), 0, [Evaluation(0, 50.0, 1.0)])
    kept = [
        Parts(tmp_path, "key").each("trial", Trial, [lambda: made], lambda: False)[0]().document() for _ in range(2)
    ]
    assert json.dumps(kept[1]) == json.dumps(kept[0]) == json.dumps(made.document())


def test_a_model_that_answers_nan_is_not_audited(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights may be finite, and their sums not; who published such a model before that was refused is told so."""
    experiment = new_experiment(recipe_file, 'audit.modes=["reprobe"]')
    run(experiment, ("pretrain",))
    load_model = Trainer.load_model

    def broken(self: Experiment, name: str, **options: Any) -> Any:
        model = load_model(self, name, **options)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.weight.fill_(3e38)
        return model

    monkeypatch.setattr(Trainer, "load_model", broken)
    with pytest.raises(DivergedError, match=r"^audit/pre: the model's answers to \d+ of \d+ images.* are not finite"):
        run(experiment, ("audit",), only=("pre",))


@pytest.mark.parametrize("attack", ["grad-w", "wb"])
def test_a_model_of_finite_answers_and_endless_gradients_is_not_audited(attack: str, recipe_file: Path, monkeypatch):
    """A head 1e30 as large answers with numbers below 1e32, and squares of its gradients are beyond float32."""
    experiment = new_experiment(recipe_file, f'audit.attacks=["{attack}"]', "audit.images=40", "audit.wb_repeats=1")
    run(experiment, ("pretrain",))
    load_model = Trainer.load_model

    def steep(self: Experiment, name: str, **options: Any) -> Any:
        model = load_model(self, name, **options)
        model.heads["source"].weight.data.mul_(1e30)
        return model

    monkeypatch.setattr(Trainer, "load_model", steep)
    with pytest.raises(DivergedError, match=r"^audit/pre: .* to \d+ of 40 images, or their gradients, are not finite"):
        run(experiment, ("audit",), only=("pre",))


def test_a_part_of_another_key_is_replaced_by_what_another_folder_has_for_ours(tmp_path: Path):
    for folder, key, part in (("own", "old", 1), ("theirs", "new", 2)):
        Parts(tmp_path / folder, key)._write("0", part)
    own = Parts(tmp_path / "own", "new")
    own.adopt(tmp_path / "theirs")
    assert own._read("0", int) == 2
