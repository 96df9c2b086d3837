"""The audit stage from end to end, what it refuses, and what the report makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from dtlctl.attacks import membership
from dtlctl.attacks.registry import ATTACKS, REFERENCED
from dtlctl.errors import DataError, RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.settings import AttackName
from dtlctl.report import audit, files, summary, tables
from dtlctl.run.experiment import Experiment
from dtlctl.stages import audit as auditing
from dtlctl.stages import data_demands, reference
from dtlctl.stages.runner import run

pytestmark = pytest.mark.usefixtures("begun")
EVERYTHING = (
    'audit={attacks=["loss", "entropy", "modified-entropy", "max-softmax", "adv-dist", "grad-w", "grad-x", "wb", '
    '"rmia", "lira"], modes=["as-is", "reprobe"], repeats=2, '
    " wb_repeats=1, adv_steps=2, references=2, relearn_steps=4, images=40}"
)


def new_experiment(recipe_file: Path, *overrides: str) -> Experiment:
    return Experiment(load(recipe_file, list(overrides)), recipe_file.parent / "runs", quiet=True)


def pretrained(recipe_file: Path, *overrides: str) -> Experiment:
    experiment = new_experiment(recipe_file, *overrides)
    with experiment.results.opened():
        run(experiment, ("pretrain",))
    return experiment


def metrics(experiment: Experiment, model: str) -> dict:
    return json.loads((experiment.folder / "audit" / f"{model}.json").read_text())["metrics"]


def test_a_recipe_may_name_just_the_attacks_that_there_are():
    assert {*get_args(AttackName)} == {*ATTACKS, *REFERENCED}


def test_every_attack_in_both_modes(recipe_file: Path, tmp_path: Path):
    """100 members and 797 others at hand: 100 of each, 20 for the head, 40 attacked, 24 judged a split."""
    experiment = pretrained(recipe_file, EVERYTHING)
    run(experiment, ("audit",), only=("pre",))
    found = metrics(experiment, "pre")
    names = {*experiment.recipe.audit.attacks, "adv-dist-l2"}
    assert names == audit._results(found, "as-is").keys() == found["reprobe"].keys()
    assert found["members"] == found["others"] == 40
    assert found["source_head"] == "trained"
    assert found["loss"]["tpr_at_0.01"] is None
    assert found["relearning"]["steps"] == 0  # the pre-trained model has nothing to relearn
    assert 0 < found["entropy_readout"]["share_of_log_k"] < 1
    assert set(found["cost"]) == {"as-is", "reprobe"}
    files.write(summary.summarise([experiment.folder]), tmp_path / "out", "dtlctl report", [experiment.folder])
    page = (tmp_path / "out" / "audit.md").read_text()
    assert "not to be resolved by fewer than 1000 non-members" in page
    assert "nan" not in page.lower().replace("dominan", "")
    assert tables.render(audit.tables(audit.read([experiment.folder]))) == page
    assert (tmp_path / "out" / "roc.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_every_precision_can_be_audited(recipe_file: Path, precision: str):
    """The paper's attacks in both modes, once training is done."""
    change = (
        'audit={attacks=["loss", "adv-dist", "grad-w", "grad-x", "wb"], modes=["as-is", "reprobe"], repeats=2, '
        "wb_repeats=1, adv_steps=2, images=40}"
    )
    experiment = pretrained(recipe_file, change, f'precision="{precision}"', "dispose.gc.unlearn.cosine=0.1")
    run(experiment, ("audit",), only=("pre",))
    found = metrics(experiment, "pre")
    names = {*experiment.recipe.audit.attacks, "adv-dist-l2"}
    assert names == audit._results(found, "as-is").keys() == found["reprobe"].keys()


def test_too_few_images_are_counted(recipe_file: Path):
    experiment = pretrained(recipe_file, "data.source.fraction=0.01", "pretrain.batch_size=4")
    message = "10 members and 797 non-members make 10 pairs of one class, too few; 20 are needed"
    with pytest.raises(DataError, match=message):
        run(experiment, ("audit",), only=("pre",))
    experiment = new_experiment(recipe_file, "data.target.fraction=0.01")
    (job,) = [job for job in experiment.jobs if job.title == "audit/TL"]
    with pytest.raises(DataError, match=r'audit/TL: 10 members and .* more target images.*leave "target" out of audit'):
        auditing.groups(experiment, job, "target")


def test_fewer_images_than_processes_are_refused_before_anything_trains(recipe_file: Path, monkeypatch):
    """Of 20 pairs 4 are for the new head: a fifth process has none, and many networks refuse to see no image."""
    few, modes = "data.source.fraction=0.02", 'audit.modes=["as-is", "reprobe"]'
    for changes, count in (((few, modes), 5), ((few, modes), 4), ((few,), 5)):
        experiment = new_experiment(recipe_file, *changes)
        monkeypatch.setenv("WORLD_SIZE", str(count))
        jobs = [job for job in experiment.jobs if job.stage == "audit"]
        if count == 5 and modes in changes:
            with pytest.raises(RecipeError, match=r"audit/.*: 5 processes cannot share 4 images; start 4 or f"):
                data_demands.check(experiment, jobs)
        else:
            data_demands.check(experiment, jobs)
        monkeypatch.delenv("WORLD_SIZE")


def test_members_and_others_have_the_same_classes(recipe_file: Path, monkeypatch):
    """A long tail to train on, even classes in the test: digit d has 8 (d + 1) images in the subset of 440."""
    experiment = pretrained(recipe_file, 'audit={attacks=["loss"], repeats=2, images=1000, relearn_steps=0}')
    (job,) = [job for job in experiment.jobs if job.title == "audit/pre"]
    labels = experiment.data.images("source", "train").labels
    answers = experiment.data.images("source", "test").labels
    tail = np.concatenate([np.flatnonzero(labels == digit)[: 8 * (digit + 1)] for digit in range(10)])
    monkeypatch.setattr(experiment.data, "index", lambda role: np.sort(tail))
    groups, matched = auditing.groups(experiment, job)
    for members, others in ((groups.members, groups.others), (groups.head_members, groups.head_others)):
        assert (np.bincount(labels[members], minlength=10) == np.bincount(answers[others], minlength=10)).all()
    pairs = sum(min(8 * (digit + 1), int((answers == digit).sum())) for digit in range(10))
    assert matched == {"pairs": pairs, "members_left_out": 440 - pairs, "others_left_out": 797 - pairs,
                       "classes_left_out": 0, "copies": 0}  # fmt: skip
    assert len(groups.members) + len(groups.head_members) == pairs > 400
    assert not set(groups.members) & set(groups.head_members) and set(groups.members) <= set(tail)


@pytest.mark.parametrize(("copies", "refused"), [(5, False), (8, True)])
@pytest.mark.parametrize("trained_on", [True, False])
def test_non_members_that_are_members_are_left_out_or_refused(
    recipe_file: Path, monkeypatch, copies, refused, trained_on
):
    """Of 797 test images 1 % are 7.97: five copies of training images are left out, eight end the audit.

    A member is an image of the subset that is trained on: copies of the rest of the train split are no members.
    """
    experiment = pretrained(recipe_file)
    (job,) = [job for job in experiment.jobs if job.title == "audit/pre"]
    images, subset = experiment.data.images, experiment.data.index("source")
    rest = np.setdiff1d(np.arange(len(images("source", "train").labels)), subset)

    def copied(role: str, split: str):
        found = images(role, split)
        hashes = np.array(found.hashes)
        if split == "test":
            hashes[:copies] = images(role, "train").hashes[(subset if trained_on else rest)[:copies]]
        return found._replace(hashes=hashes)

    monkeypatch.setattr(experiment.data, "images", copied)
    if refused and trained_on:
        with pytest.raises(DataError, match=r"audit/pre: data\.source: 8 of 797 non-members are members"):
            auditing.groups(experiment, job)
        return
    groups, matched = auditing.groups(experiment, job)
    assert matched["copies"] == (5 if trained_on else 0)
    assert bool({*range(5)} & {*groups.others, *groups.head_others}) <= (not trained_on)


def test_non_members_that_only_the_target_was_trained_on_are_left_out(recipe_file: Path, monkeypatch):
    """Of every model but `pre`: it alone was never fine-tuned on the target."""
    experiment = pretrained(recipe_file)
    jobs = {job.title: job for job in experiment.jobs}
    images, subset = experiment.data.images, experiment.data.index("target")

    def copied(role: str, split: str):
        found = images(role, split)
        hashes = np.array(found.hashes)
        if (role, split) == ("target", "train"):
            hashes[subset[:5]] = images("source", "test").hashes[:5]
        return found._replace(hashes=hashes)

    monkeypatch.setattr(experiment.data, "images", copied)
    assert [auditing.groups(experiment, jobs[f"audit/{model}"])[1]["copies"] for model in ("pre", "TL")] == [0, 5]


def test_classes_of_one_split_alone_are_left_out_and_told(recipe_file: Path, monkeypatch, capsys):
    """No 9 is trained on: nothing of the 79 or so nines in the test split is attacked, and it is said."""
    experiment = pretrained(recipe_file)
    (job,) = [job for job in experiment.jobs if job.title == "audit/pre"]
    labels, subset = experiment.data.images("source", "train").labels, experiment.data.index("source")
    monkeypatch.setattr(experiment.data, "index", lambda role: subset[labels[subset] != 9])
    experiment.processes.quiet = False
    groups, matched = auditing.groups(experiment, job)
    auditing.say_left_out(experiment, job, matched)
    assert matched["classes_left_out"] == 1
    assert 9 not in experiment.data.images("source", "test").labels[groups.others]
    assert "the splits hold their classes in other shares, 1 in one alone" in capsys.readouterr().err


def test_rmia_finds_the_references_by_split_and_row(recipe_file: Path):
    """Whichever group is looked at first."""
    experiment = pretrained(recipe_file, EVERYTHING)
    (job,) = [job for job in experiment.jobs if job.title == "audit/pre"]
    head = auditing.Head(experiment, job, "source")
    groups, model, attack = head.groups, head.model, head.referenced("rmia")
    first, second = (
        [attack.observe(view, 0)["rmia"] for view in order(head.views())]
        for order in (tuple, lambda views: tuple(reversed(views)))
    )
    assert all((one == other).all() for one, other in zip(first, reversed(second), strict=True))
    known = reference.answers(experiment, 2)
    images = experiment.data.images("source", "test")
    row = int(groups.others[5])
    x = torch.from_numpy(np.array(images.pixels[row : row + 1])) / 255
    own = float(model(x, "source").detach().softmax(1)[0, images.labels[row]])
    (out,) = 1 / (1 + np.exp(-known.out["test"][row]))
    assert known.a == 0.3
    assert float(first[1][5]) == pytest.approx(own / ((1.3 * out + 0.7) / 2), rel=1e-4)


def test_lira_has_one_deviation_for_members_and_others_and_for_all_processes(recipe_file: Path, monkeypatch):
    """Of two of 897 images the strangers say 0 and 6, of the rest 0 and 0: the mean variance is 2 * 3² / 897.

    It is known to an attacker who does not know who is a member.
    """
    experiment = pretrained(recipe_file, EVERYTHING.replace("references=2", "references=4"))
    (job,) = [job for job in experiment.jobs if job.title == "audit/pre"]
    answers = [[0.0] * 897, [0.0] * 897, *[[6.0 if image in (2, 4) else 0.0 for image in range(897)]] * 2]
    monkeypatch.setattr(reference, "_reference", lambda _, number, *rest: answers[number])
    reference.answers.cache_clear()
    head = auditing.Head(experiment, job, "source")
    views, known = head.views(), reference.answers(experiment, 4)
    reference.answers.cache_clear()
    assert known.variance == pytest.approx(2 * 3**2 / 897)
    score = head.referenced("lira").observe
    for split, rows, view in zip(reference.SPLITS, head.groups[:2], views, strict=True):
        own = auditing.signals.scaled(view.logits, view.labels).numpy()
        expected = (own - known.out[split][rows].mean(1)) / (18 / 897) ** 0.5
        assert score(view, 0)["lira"].tolist() == pytest.approx(expected.tolist())


def test_answers_come_from_the_one_of_a_pair_that_never_saw_the_image(recipe_file: Path, monkeypatch):
    """Reference n says n of every image: of each pair the one counts whose half it is not in. a is the first one's."""
    experiment = pretrained(recipe_file, EVERYTHING.replace("references=2", "references=4"))
    monkeypatch.setattr(reference, "_reference", lambda _, number, *rest: [float(number)] * (100 + 797))
    seen = []
    monkeypatch.setattr(reference.signals, "offline_a", lambda *given: seen.append(given) or 0.7)
    reference.answers.cache_clear()
    found = reference.answers(experiment, 4)
    reference.answers.cache_clear()
    halves = [set(reference._half(experiment, number, 897).tolist()) for number in range(4)]
    for place, row in enumerate(experiment.data.index("source").tolist()):
        assert found.out["train"][row].tolist() == [n for n in range(4) if place not in halves[n]]
    assert found.out["test"][7].tolist() == [n for n in range(4) if 107 not in halves[n]]
    ((own, out, member),) = seen
    assert found.a == 0.7 and set(own.tolist()) == {0.0} and set(out.flatten().tolist()) == {2.0, 3.0}
    assert set(np.flatnonzero(member).tolist()) == halves[0]


def test_who_of_the_targets_images_was_trained_on_is_asked_through_the_target_head(recipe_file: Path):
    """20 target images are members, as many of its test images are not; `pre` has no target head to ask."""
    change = 'audit={attacks=["loss", "rmia"], references=2, modes=["target"], repeats=2, relearn_steps=0}'
    experiment = new_experiment(recipe_file, change)
    with experiment.results.opened():
        run(experiment, ("pretrain", "finetune", "audit"), only=("pre", "TL"))
    assert "target" not in metrics(experiment, "pre")
    (job,) = [job for job in experiment.jobs if job.title == "audit/TL"]
    groups, _ = auditing.groups(experiment, job, "target")
    assert groups.members.tolist() == sorted(experiment.data.index("target").tolist()) and len(groups.others) == 20
    model, scores = experiment.trainer.load_model("TL").eval(), []
    for split, rows in (("train", groups.members), ("test", groups.others)):
        images = experiment.data.images("target", split)
        x, y = torch.from_numpy(images.pixels[rows]) / 255, torch.from_numpy(images.labels[rows])
        scores.append(-torch.nn.functional.cross_entropy(model(x, "target"), y, reduction="none").detach().numpy())
    found = metrics(experiment, "TL")["target"]
    assert found["loss"]["auc"] == pytest.approx(membership.auc(*scores))
    assert "rmia" not in found and "loss" not in metrics(experiment, "TL")
    (table,) = [
        t for t in audit.tables(audit.read([experiment.folder])) if t.note.startswith("Target head") and "AUC" in t.note
    ]
    assert [row[0] for row in table.rows] == ["pre", "TL"] and table.rows[0][1] == "–"


def test_cka_shows_the_stages_that_a_variant_kept(recipe_file: Path):
    """One tiny step from TL changes hardly more than batch statistics; a new network is like it in no stage."""
    experiment = new_experiment(recipe_file, "audit.cka=true", "dispose.rand.steps=1", "dispose.rand.lr=1e-9")
    with experiment.results.opened():
        run(experiment, ("pretrain", "finetune", "dispose", "audit"), only=("pre", "TGT", "TL", "rand"))
    assert "cka" not in metrics(experiment, "pre") and set(metrics(experiment, "TL")["cka"]) == {
        "TGT",
        "pre",
        "scratch",
    }
    found = metrics(experiment, "rand")["cka"]
    assert list(found["TL"]) == ["stage1", "stage2", "stage3", "embedding"]
    assert min(found["TL"].values()) > 0.97 > max(found["scratch"].values()) > 0
    (table,) = [t for t in audit.tables(audit.read([experiment.folder])) if t.heading == "Where the source still is"]
    assert table.columns == ["Model", "Compared with", "stage1", "stage2", "stage3", "embedding"]
    assert [row[:2] for row in table.rows[3:]] == [["rand", other] for other in ("TL", "TGT", "pre", "scratch")]


def test_cka_is_made_again_for_another_tgt_from_outside_wherever_it_lies(begun: Path, recipe_file: Path):
    """The file at the same place became another; the same file lies elsewhere."""

    def key() -> str:
        experiment = new_experiment(recipe_file, "audit.cka=true", f"target-only.weights='{tgt}'")
        return experiment.results.key(next(job for job in experiment.jobs if job.title == "audit/TL"))

    tgt = shutil.copy(begun / "target-only/model.safetensors", recipe_file.parent / "tgt.safetensors")
    before = key()
    tgt = shutil.move(tgt, recipe_file.parent / "elsewhere.safetensors")
    assert key() == before
    shutil.copy(begun / "pretrain/model.safetensors", tgt)
    assert key() != before


def test_splits_that_were_prepared_differently_are_refused(recipe_file: Path, monkeypatch):
    """Test images a third darker than training images: no attack on the model is needed to tell them apart."""
    experiment = pretrained(recipe_file)
    original = experiment.data.images

    def darker(role: str, split: str):
        images = original(role, split)
        if split == "train":
            return images
        return images._replace(pixels=(np.asarray(images.pixels) * 0.67).astype(np.uint8))

    monkeypatch.setattr(experiment.data, "images", darker)
    with pytest.raises(DataError, match=r"train and test images differ without any model \(AUC (0\.[89]|1)") as error:
        run(experiment, ("audit",), only=("pre",), force=True)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "start", ['init="fresh", lambda=0.0, unlearn={kind="none"}', 'fresh_stages=1, unlearn={kind="null-space"}']
)
def test_a_head_that_was_never_trained_is_said_to_be_so(recipe_file: Path, start: str):
    change = f"dispose={{rand={{steps=2, batch_size=30, {start}}}}}"
    experiment = new_experiment(recipe_file, change)
    with experiment.results.opened():
        run(experiment, ("pretrain", "finetune", "dispose", "audit"), only=("pre", "TL", "rand"))
    assert metrics(experiment, "rand")["source_head"] == "never trained"
    assert metrics(experiment, "TL")["source_head"] == "trained"


def test_the_audits_shown_are_those_of_the_recipe(finished: Path, recipe_file: Path):
    """Neither audit.md nor the table has audits with other repeats, of a variant at another λ, or of one that is gone.

    The recipe is what the last command had; changed back, all are there again.
    """
    first, text = new_experiment(recipe_file), recipe_file.read_text()
    without_rand = text[: text.index("[dispose.rand]")] + text[text.index("[piggyback]") :]
    for changed, changes, shown in (
        (text, ["dispose.gc.lambda=0.9"], ["pre", "TL", "rand"]),
        (text, ["audit.repeats=3"], []),
        (text, ['audit.models=["TL", "gc"]'], ["TL", "gc"]),
        (without_rand, [], ["pre", "TL", "gc"]),
        (text, [], ["pre", "TL", "gc", "rand"]),
    ):
        recipe_file.write_text(changed)
        with new_experiment(recipe_file, *changes).results.opened():
            table = summary.summarise([first.folder])
        assert [one.model for one in audit.read([first.folder])] == shown, changes
        assert [row["model"] for row in table["rows"] if "audit_auc" in row] == shown


def test_two_processes_find_what_one_finds(recipe_file: Path, forked):
    change = 'audit={attacks=["loss", "grad-w"], modes=["as-is", "reprobe"], repeats=2, relearn_steps=0}'
    pretrained(recipe_file, change)
    found = []
    for processes in (1, 2):
        result = forked("audit", recipe_file, "--only", "pre", "--set", change, "--force", processes=processes)
        assert result.returncode == 0, result.stderr
        sidecar = json.loads((recipe_file.parent / result.stdout.strip()).read_text())
        assert sidecar["processes"] == processes
        found.append(sidecar["metrics"])
    for one, two in ((m[0], m[1]) for m in (found, [f["reprobe"] for f in found])):
        for attack in ("loss", "grad-w"):
            assert two[attack]["auc"] == pytest.approx(one[attack]["auc"], abs=0.01)


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_out_of_date_when_any_attack_says_something_else(recipe_file: Path, tmp_path: Path):
    """The table holds the AUC of the loss alone; audit.md and the curves hold all attacks."""
    experiment = pretrained(recipe_file)
    run(experiment, ("audit",), only=("pre",))
    files.write(table := summary.summarise([experiment.folder]), tmp_path / "out", "dtlctl report", [experiment.folder])
    assert files.is_current(summary.summarise([experiment.folder]), tmp_path / "out")
    path = experiment.folder / "audit" / "pre.json"
    sidecar = json.loads(path.read_text())
    sidecar["metrics"]["blind"]["auc"] = 0.123
    path.write_text(json.dumps(sidecar))
    changed = summary.summarise([experiment.folder])
    assert changed["rows"] == table["rows"]
    assert not files.is_current(changed, tmp_path / "out")
    files.write(changed, tmp_path / "out", "dtlctl report", [experiment.folder])
    assert "0.123" in (tmp_path / "out" / "audit.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_name_in_two_places_both_show_their_audits(recipe_file: Path, tmp_path: Path):
    experiment = pretrained(recipe_file)
    run(experiment, ("audit",), only=("pre",))
    other = tmp_path / "elsewhere" / experiment.folder.name
    shutil.copytree(experiment.folder, other)
    files.write(summary.summarise([other]), tmp_path / "out", "dtlctl report", [experiment.folder, other])
    lines = (tmp_path / "out" / "audit.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("| pre")]
    assert rows == [["pre", other.name]] * 8  # twice in balanced accuracy, AUC, TPR at 1 % and readouts each
