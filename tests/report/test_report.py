"""Tables come from sidecars; means and intervals over seeds are those of the t distribution."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from dtlctl.attacks.attackers import Attacker, Frozen
from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import jobs
from dtlctl.report import audit, figures, files, results, summary, tables, templates
from dtlctl.report.intervals import Figure, Number, share
from dtlctl.report.results import ATTACKS
from dtlctl.storage import checkpoint


def digest(name: str) -> str:
    """Stands for the hash of a model's weights."""
    return sha256(name.encode()).hexdigest()


SIZES = {"class_images": [100] * 10}
AUDIT = {
    "source_head": "trained",
    "blind": {"auc": 0.5},
    "entropy_readout": {"nats": 1.0, "share_of_log_k": 0.5},
    "relearning": {"goal": 90.0, "steps": None, "budget": 200, "curve": []},
}


def fake_run(recipe_file: Path, name: str, seed: int, acc_t: float, *changes: str) -> Path:
    """A run's folder with made-up sidecars: TL has the given accuracy, every attack half of it."""
    recipe = load(recipe_file, [f"name={name}", f"seed={seed}", *changes])
    folder = recipe_file.parent / name
    for job in jobs(recipe):
        metrics = {
            "piggyback": {"acc_pl": 5.0 if job.model == "scratch" else acc_t / 2},
            "audit": {**AUDIT, "loss": {"auc": 0.75}},
        }.get(job.stage, {"acc_t": acc_t if job.model == "TL" else 10.0, "acc_s": 20.0})
        tables = {role: recipe.data.of(role).model_dump(mode="json") for role in job.roles}
        sidecar = {
            "format": 1, "metrics": metrics, "precision": "float32", **job.described(recipe), "parent": {},
            "data": {job.dataset: {"test_images": 1000}} if job.stage == "piggyback" else {},
            "datasets": {role: {"table": table, **SIZES} for role, table in tables.items()},
        }  # fmt: skip
        if job.stage == "dispose":  # ten passes over the source
            sidecar |= {"history": [{"step": 100}], "batch": {"source": 64}, "data": {"source": {"images": 640}}}
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
    table = summary.summarise(runs)
    tl = rows(table)["TL"]
    assert table["seeds"] == [0, 1, 2]
    assert tl["acc_t"] == pytest.approx(73)
    assert tl["acc_t_ci"] == pytest.approx(8.957, abs=1e-3)
    assert tl["piggyback"]["again"] == pytest.approx(36.5)
    assert tl["piggyback_ci"]["again"] == pytest.approx(8.957 / 2, abs=1e-3)
    assert rows(table)["gc"]["acc_t_ci"] == 0
    shown = next(line for line in tables.markdown(table).splitlines() if line.startswith("| TL"))
    assert [cell.strip() for cell in shown.split("|")[3:5]] == ["73.0 ± 9.0", "36.5 ± 4.5"]


def test_differences_are_taken_seed_by_seed(recipe_file: Path):
    """Acc_t moves by 7 points over seeds, gc's distance to TL is 2, 2 and 5: mean 3, deviation sqrt(3), half 4.303."""
    runs = [fake_run(recipe_file, f"r{seed}", seed, acc, *TUNED) for seed, acc in enumerate((70.0, 72.0, 77.0))]
    for run, tl, distance in zip(runs, (70.0, 72.0, 77.0), (2, 2, 5), strict=True):
        variant = json.loads((run / "dispose/gc/model.json").read_text())
        variant["metrics"]["acc_t"] = tl - distance
        (run / "dispose/gc/model.json").write_text(json.dumps(variant))
        attack(run, "TL", single=50.0, worst=tl)
        attack(run, "gc", single=50.0 - distance, worst=tl - 1)
    table = summary.summarise(runs)
    less = rows(table)["gc"]["vs_TL"]
    assert less["acc_t"] == pytest.approx(-3) and less["acc_t_ci"] == pytest.approx(4.3027, abs=1e-4)
    assert less["piggyback"]["again"] == pytest.approx(-3)
    assert less["piggyback_worst"] == {"again": -1} and less["piggyback_worst_ci"] == {"again": 0}
    text = tables.markdown(table)
    assert "seed by seed" in text
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| gc")]
    assert [cell.strip() for cell in lines[1][3:-1]] == ["-3.0 ± 4.3", "-3.0 ± 4.3", "-1.0 ± 0.0"]


def put(path: Path, **metrics: object) -> None:
    """Change metrics of a sidecar."""
    document = json.loads(path.read_text())
    document["metrics"] |= metrics
    path.write_text(json.dumps(document))


@pytest.mark.usefixtures("undrawn")
def test_every_cell_is_what_its_sidecar_says(recipe_file: Path):
    """One seed, another number in every sidecar; differences, and the share of the stronger attacker on gc, by hand:

    (54.7 - 9.1) / (74.1 - 9.1); of 1,000 images Wilson's half widths are 3.08, 1.79 and 2.72, and so that of the share
    sqrt(3.08² + (0.298 · 1.79)² + (0.702 · 2.72)²) / 65 = 5.6 %. TL's own share is 1, whatever its attacker gets.

    The page has the same cells as the Markdown.
    """
    run = fake_run(recipe_file, "cells", 0, 70.0, *TUNED)
    for path, metrics in {
        "target-only": {"acc_t": 35.6, "acc_s": 1.0}, "pretrain": {"acc_t": 2.0, "acc_s": 91.2},
        "finetune": {"acc_t": 71.5, "acc_s": 55.1}, "dispose/gc": {"acc_t": 66.9, "acc_s": 50.9},
        "dispose/rand": {"acc_t": 71.0, "acc_s": 33.3},
    }.items():  # fmt: skip
        put(run / path / "model.json", **metrics)
    for model, metrics in {"scratch": (2.4, 9.1, 10.0), "TL": (71.9, 74.1, 75.0), "gc": (54.7, 41.6, 61.2)}.items():
        put(run / f"piggyback/{model}/again.json", **dict(zip(ATTACKS.values(), metrics, strict=True)))
    for model, auc in {"pre": 0.529, "TL": 0.531, "gc": 0.519, "rand": 0.532}.items():
        put(run / f"audit/{model}.json", loss={"auc": auc})
    table = summary.summarise([run])
    shown = tables.of_report(table)
    assert [cells(one) for one in shown] == [
        [
            ["Model", "Acc_s", "Acc_t", "PL again", "MIA AUC"],
            ["scratch", "–", "–", "2.4", "–"],
            ["TGT", "1.0", "35.6", "–", "–"],
            ["pre", "91.2", "2.0", "–", "0.529"],
            ["TL", "55.1", "71.5", "71.9", "0.531"],
            ["gc", "50.9", "66.9", "54.7", "0.519"],
            ["rand", "33.3", "71.0", "–", "0.532"],
        ],
        [
            ["Model", "Acc_t vs TGT", "Acc_t vs TL", "PL again vs TL", "tuned again vs TL"],
            ["TL", "+35.9", "+0.0", "+0.0", "+0.0"],
            ["gc", "+31.3", "-4.6", "-17.2", "-32.5"],
            ["rand", "+35.4", "-0.5", "–", "–"],
        ],
        [
            ["Model", "again one setting", "again tuned", "again best of all", "again recovered", "again tuned by"],
            ["scratch", "2.4", "9.1", "10.0", "–", "–"],
            ["TGT", "–", "–", "–", "–", "–"],
            ["pre", "–", "–", "–", "–", "–"],
            ["TL", "71.9", "74.1", "75.0", "100% [100%, 100%]", "–"],
            ["gc", "54.7", "41.6", "61.2", "70% [65%, 76%]", "–"],
            ["rand", "–", "–", "–", "–", "–"],
        ],
    ]
    text = tables.markdown(table | {"verdict": {"sentences": []}}).split("\n\n")
    assert text[0::2] == [one.note for one in shown] and "recovers from models that saw the source" in text[4]
    for one, part in zip(shown, text[1::2], strict=True):
        head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in part.strip().splitlines())
        assert [head, *body] == cells(one)
    files.write(table, run / "report", "dtlctl report")
    page = (run / "report/report.html").read_text()
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", page)]
    assert lines == [line for one in shown for line in cells(one)]


def test_a_table_is_shown_as_text_whatever_is_in_it():
    """Nothing in a cell, a sentence or a name becomes markup of the page."""
    evil = "<i>&|x"
    found = tables.Table(evil, [evil, "n"], [[evil, "1"]], evil)
    assert tables.render([found]).splitlines()[2:] == [
        "| <i>&\\|x | n |", "|:--------|--:|", "| <i>&\\|x | 1 |"
    ]  # fmt: skip
    number = {"value": 1.0, "low": None, "high": None}
    attack = {"accuracy": number, "recovered": number}
    model = {"acc_t": 1.0, "accuracy": number, "price": number, "draws": 1, "attacks": {evil: attack}}
    disposal = {"init": "TL", "lambda": 0.1, "price": None, "unlearn": {"kind": evil}, "fresh_stages": 1}
    page = {"title": evil, "subtitle": evil, "attackers": [evil], "verdict": [evil, evil], "chosen": None}
    page |= {"evidence": {evil: model}, "dispose": {evil: disposal}, "reasons": {evil: [evil]}, "audited": evil}
    page |= {"command": evil, "caveats": [evil], "figures": [], "tables": [found], "audits": [found]}
    text = templates.render("page.html.j2", **page)
    assert "<i>" not in text and text.count("&lt;i&gt;&amp;|x") == 21


def test_a_dataset_that_is_named_as_an_interval_keeps_its_number(recipe_file: Path):
    """`again` and `again_ci`: 20, 22 and 24, and 30, 30 and 30."""
    runs = []
    for seed, accuracy in enumerate((20.0, 22.0, 24.0)):
        more = ('data.piggyback.again_ci={like="source", fraction=0.03}',)
        runs.append(fake_run(recipe_file, f"ci{seed}", seed, 70.0, *more))
        put(runs[-1] / "piggyback/gc/again.json", acc_pl=accuracy)
        put(runs[-1] / "piggyback/gc/again_ci.json", acc_pl=30.0)
    gc = rows(summary.summarise(runs))["gc"]
    assert gc["piggyback"] == {"again": 22, "again_ci": 30}
    assert gc["piggyback_ci"] == pytest.approx({"again": 4.30265 * 2 / 3**0.5, "again_ci": 0}, abs=1e-4)


def test_seeds_that_share_one_pretraining_are_reported(recipe_file: Path):
    """With pretrain.seed, pre has that seed in every run, and what comes from it still belongs to the run."""
    runs = [fake_run(recipe_file, f"r{seed}", seed, 70.0, "pretrain.seed=0") for seed in (0, 1)]
    table = summary.summarise(runs)
    assert {"pre", "TL", "gc"} <= rows(table).keys()
    assert table["caveats"] == ["All seeds share one pre: no interval tells of another."]


def test_one_run_has_no_intervals_and_differences_are_in_points(recipe_file: Path):
    """TL 70, all others 10: gc is 60 points below TL and level with TGT."""
    table = summary.summarise([fake_run(recipe_file, "only", 3, 70.0)])
    assert table["seeds"] == [3]
    assert "acc_t_ci" not in rows(table)["TL"]
    lines = [line.split("|") for line in tables.markdown(table).splitlines() if line.startswith("| gc")]
    assert [cell.strip() for cell in lines[0][1:-1]] == ["gc", "20.0", "10.0", "35.0", "0.750"]
    assert [cell.strip() for cell in lines[1][1:-1]] == ["gc", "+0.0", "-60.0", "+0.0"]


@pytest.mark.parametrize(("state", "shown"), [("trained", "0.750"), ("never trained", "–")])
def test_the_auc_of_a_head_that_was_never_trained_is_noise_and_left_out(recipe_file: Path, state, shown: str):
    folder = fake_run(recipe_file, "noise", 0, 70.0)
    path = folder / "audit/gc.json"
    document = json.loads(path.read_text())
    document["metrics"]["source_head"] = state
    path.write_text(json.dumps(document))
    lines = tables.markdown(summary.summarise([folder])).splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines[2:9]}
    assert (cells["TL"], cells["gc"]) == ("0.750", shown)


def test_results_of_another_recipe_or_another_parent_are_left_out(recipe_file: Path):
    folder = fake_run(recipe_file, "stale", 0, 70.0)
    variant = json.loads((folder / "dispose/gc/model.json").read_text())
    variant["settings"]["lambda"] = 0.9
    (folder / "dispose/gc/model.json").write_text(json.dumps(variant))
    attack = json.loads((folder / "piggyback/TL/again.json").read_text())
    attack["parent"] = {"TL": digest("an earlier TL")}
    (folder / "piggyback/TL/again.json").write_text(json.dumps(attack))
    table = rows(summary.summarise([folder]))
    assert "gc" not in table  # nor the attacks on it
    assert table["TL"]["piggyback"] == {}
    assert table["TL"]["acc_t"] == 70.0


def test_a_report_that_does_not_fit_on_the_disk_leaves_the_earlier_one_whole(recipe_file: Path, monkeypatch):
    """No room for the first file, or for the third."""
    folder = fake_run(recipe_file, "older", 0, 70.0)
    report, write, room = folder / "report", checkpoint.write, [0]
    files.write(summary.summarise([folder]), report, "dtlctl report", [folder])
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    assert {"table.json", "table.md", "report.html", "verdict.json"} <= before.keys()

    def short(path: Path, blob: bytes) -> None:
        room[0] -= 1
        write(path if room[0] >= 0 else Path("/dev/full") / path.relative_to("/"), blob)

    monkeypatch.setattr(checkpoint, "write", short)
    changed = summary.summarise([fake_run(recipe_file, "newer", 0, 71.0)])
    for fits in (0, 2):
        room[0] = fits
        with pytest.raises(CheckpointError, match="cannot be written"):
            files.write(changed, report, "dtlctl report", [folder])
        assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    room[0] = 9
    files.write(changed, report, "dtlctl report", [folder])
    assert files.is_current(changed, report) and (report / "report.html").read_bytes() != before["report.html"]
    assert not [path for path in report.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("changed", ["index", "test"])
def test_attacks_with_different_data_are_not_put_into_one_table(recipe_file: Path, changed: str):
    """A larger subset, or other test images, for one model: which of the two the recipe means cannot be told."""
    folder = fake_run(recipe_file, "mixed", 0, 70.0)
    for model in ("TL", "gc"):
        path = folder / f"piggyback/{model}/again.json"
        document = json.loads(path.read_text())
        document["data"] = {"piggyback.again": {"index": "some", "test": "images"}}
        if model == "gc":
            document["data"]["piggyback.again"][changed] = "other"
        path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"gc/again.json: made from other images of data.*again than .*TL"):
        summary.summarise([folder])


def test_a_result_of_another_precision_is_left_out(recipe_file: Path):
    folder = fake_run(recipe_file, "rough", 0, 70.0)
    path = folder / "dispose/gc/model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "bfloat16"}))
    assert "gc" not in rows(summary.summarise([folder]))


def test_runs_that_differ_in_more_than_the_seed_are_refused(recipe_file: Path):
    first = fake_run(recipe_file, "a", 0, 70.0)
    second = fake_run(recipe_file, "b", 1, 70.0)
    document = json.loads((second / "recipe.json").read_text())
    document["finetune"]["lr"] = 0.5
    (second / "recipe.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=r"b: its recipe differs from .*a in more than the seed"):
        summary.summarise([first, second])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("split", ["train", "test"])
def test_runs_that_saw_other_images_are_not_averaged(recipe_file: Path, call, split: str):
    """The same folder with other files in it, for one seed; that every seed draws another subset is no difference."""
    runs = [fake_run(recipe_file, name, seed, 70.0) for seed, name in enumerate("ab")]
    for run, images in zip(runs, ("some", "other"), strict=True):
        for model in ("TL", "gc"):
            path = run / f"piggyback/{model}/again.json"
            identity = {"train": "same", "test": "same", "index": run.name, split: images}
            path.write_text(json.dumps({**json.loads(path.read_text()), "data": {"piggyback.again": identity}}))
    code, out, said = call("report", "-q", *runs, "--to", recipe_file.parent / "to")
    assert (code, out, said.count("\n")) == (4, "", 1)
    first, second = (run / "piggyback/TL/again.json" for run in runs)
    assert said.startswith(f"error: {second}: made from other images of data.piggyback.again than {first}; do the")
    for run in runs:
        assert call("report", run)[0] == 0
    path.write_text(path.read_text().replace('"other"', '"some"'))
    second.write_text(second.read_text().replace('"other"', '"some"'))
    assert call("report", *runs, "--to", recipe_file.parent / "to")[0] == 0


def test_a_model_that_one_run_lacks_is_named(recipe_file: Path):
    """Of three seeds the second has no rand, the first and the third no gc: what is left is averaged and that said."""
    runs = [fake_run(recipe_file, name, seed, 70.0) for seed, name in enumerate("abc")]
    for run, model in zip(runs, ("gc", "rand", "gc"), strict=True):
        shutil.rmtree(run / "dispose" / model)
    table = summary.summarise(runs)
    assert rows(table).keys() == {"scratch", "TGT", "pre", "TL"}
    sentence = "Left out, because a seed lacks it: rand (seed 1), gc (seeds 0, 2)."
    assert table["caveats"] == [sentence]
    assert f"\n\n{sentence}\n\n" in tables.markdown(table)
    assert summary.summarise(runs[:1])["caveats"] == []


def test_an_attack_that_one_seed_lacks_is_left_out_and_not_called_never_made(recipe_file: Path):
    runs = [fake_run(recipe_file, name, seed, 70.0) for seed, name in enumerate("ab")]
    (runs[1] / "piggyback/gc/again.json").unlink()
    table = summary.summarise(runs)
    assert table["caveats"] == ["Left out, because a seed lacks it: gc on again (seed 1)."]
    assert "Never attacked" not in " ".join(table["verdict"]["sentences"])


@pytest.mark.usefixtures("undrawn")
def test_a_seed_counts_once(recipe_file: Path, call):
    """The run itself again, or a run of another name with its seed: its interval of ± 0.0 would be no interval."""
    runs = [fake_run(recipe_file, name, seed, 70.0) for name, seed in (("a", 0), ("b", 1), ("again", 0))]
    for given in ([runs[0], runs[0]], runs):
        code, out, said = call("report", "-q", *given, "--to", recipe_file.parent / "to")
        assert (code, out) == (2, "")
        assert said.startswith(f"error: report: {runs[0]} is not the only run of seed 0;") and said.count("\n") == 1
    assert not (recipe_file.parent / "to").exists()
    assert call("report", *runs[:2], "--to", recipe_file.parent / "to")[0] == 0


def test_data_that_is_out_of_reach_is_no_reason_to_report_nothing(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder that was there when the run was made, written without ./, and a hub id that a folder now has."""
    changes = ("data.source={path='mine'}", "data.target={path='owner/name', revision='main'}")
    folder, data = recipe_file.parent, [recipe_file.parent / name for name in ("mine", "owner/name")]
    monkeypatch.chdir(folder)
    data[0].mkdir()
    run = fake_run(recipe_file, "run", 0, 70.0, *changes)
    found = summary.summarise([run])
    data[0].rmdir()
    data[1].mkdir(parents=True)
    assert summary.summarise([run]) == found
    assert rows(found)["TL"]["acc_t"] == 70.0
    for change, message in zip(changes, ("'mine' is no existing", "are for hub ids"), strict=True):
        with pytest.raises(RecipeError, match=message):
            load(recipe_file, [change])


def test_a_folder_that_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"recipe\.json: not a run's recipe"):
        summary.summarise([tmp_path])


def test_the_page_tells_what_every_kind_of_attacker_tries():
    (kinds, _) = get_args(Attacker)
    attackers = [kind() for kind in get_args(kinds)]
    assert len(attackers) >= 5
    tuned = [one.model_dump(mode="json") for one in attackers]
    usual = {"choose_on": "own", "steps": 3, "epochs": None, "lr": 0.05, "search": None}
    said = templates.said("who", {**usual, "attackers": tuned})
    for one in attackers:
        varied = ("k" if one.kind == "knn" else "C") if isinstance(one, Frozen) else "sgd, learning rate"
        rates = dict.fromkeys(setting.rate for setting in one.grid())
        assert f"{one.kind} ({varied} {', '.join(f'{rate:g}' for rate in rates)})" in said


def test_a_model_has_one_colour_in_every_figure():
    roc = {"loss": {"balanced_accuracy_std": 0.0, "roc": {"fpr": [0.1, 1.0], "tpr": [0.2, 1.0]}}}
    both = [audit.Audit("", "gc", roc), audit.Audit("", "TL", roc)]
    figure, _ = audit.figures(both, {"TL": "#000001", "gc": "#000002"})["roc"]
    assert [line.get_color() for line in figure.axes[0].lines[:2]] == ["#000002", "#000001"]


@pytest.mark.usefixtures("undrawn")
def test_a_card_has_the_references_beside_every_number(recipe_file: Path):
    """Tuned, 10 from scratch, 70 from TL, 25 from gc: a quarter is recovered; rand was never attacked."""
    run = fake_run(recipe_file, "cards", 0, 70.0, *TUNED)
    for model, worst in {"scratch": 10.0, "TL": 70.0, "gc": 25.0}.items():
        attack(run, model, worst - 1, worst)
    table = summary.summarise([run])
    said = cards(html(table, run / "report"))
    assert list(said) == ["TGT", "TL", "gc", "rand"]
    assert "25.0 %" in said["gc"] and "scratch 10.0" in said["gc"] and "25% [" in said["gc"]
    assert "70.0 %" in said["TL"] and "recovered" not in said["TL"] + said["TGT"]
    assert "never attacked" in said["rand"] and "random-labels" in said["rand"]
    assert "recommended" not in "".join(said.values())
    text = html(table, run / "report")
    assert text.index(table["verdict"]["sentences"][0]) < text.index("<svg")
    assert re.search(r"<details><summary>[^<]*0\.750", text) is None  # no interval, no conclusion


def test_an_audit_is_folded_away_under_one_sentence_with_its_interval():
    """Of each model the strongest attack by AUC; through a head that nothing trained it is not one."""
    row = {"balanced_accuracy_std": 0.0, "auc_low": 0.5, "auc_high": 0.75}
    strong = {"loss": {**row, "auc": 0.6}, "grad-x": {**row, "auc": 0.7}, "source_head": "trained"}
    weak = {**strong, "source_head": "never trained", "reprobe": {"loss": {**row, "auc": 0.55}}}
    said = audit.conclusion([audit.Audit("", "TL", strong), audit.Audit("", "gc", weak)])
    assert "0.700 [0.500, 0.750] on TL" in said and "0.550 [0.500, 0.750] on gc" in said
    two = audit.conclusion([audit.Audit(run, "TL", one) for run, one in (("1", strong), ("2", weak))])
    assert "strongest membership attack of any of 2 runs has an AUC of 0.700" in two
    assert audit.conclusion([]) == ""
    target = {**AUDIT, "target": {"loss": {**row, "auc": 0.9}}}
    assert audit.conclusion([audit.Audit("", "TL", target)]) == ""  # it is not about the source's images


SEEDS = ([40.0, 30.0, 35.0], [10.0, 10.0, 10.0], [70.0, 80.0, 90.0])
"""What the tuned attacker gets from gc, scratch and TL, by seed."""
TUNED = ('piggyback.attackers=[{kind="full"}]',)


def attack(folder: Path, model: str, single: float, worst: float, who: tuple[str, str | None] = ("full", None)) -> None:
    path = folder / f"piggyback/{model}/again.json"
    document = json.loads(path.read_text())
    document["metrics"] = {"acc_pl": single, "acc_pl_worst": worst, "acc_pl_max": worst + 5}
    document["metrics"]["chosen"] = [{"kind": who[0], "stage": who[1], "val": worst}]
    document["history"] = [
        {"step": 10, "loss": 1.0},
        {"step": 20, "acc_pl": single / 2},
        {"step": 30, "acc_pl": single},
    ]
    path.write_text(json.dumps(document))


def recovered(*seeds: list[float]) -> Figure | None:
    """From these accuracies of a model, scratch and TL alone, without images."""
    return share(*map(Number, seeds))


def test_recovered_share_and_its_interval():
    """25 of 70. Beside it the seeds are off by 30 - 60 R = 60/7, 20 - 70 R = -5 and 25 - 80 R = -25/7: the standard
    error of their mean is sqrt((60/7)^2 + 25 + (25/7)^2) / sqrt(6) = 4.3054, and t(0.975, 2) = 4.30265."""
    part, half = 25 / 70, 4.30265 * 4.3054 / 70
    found = recovered(*SEEDS)
    assert found == pytest.approx({"value": part, "low": part - half, "high": part + half}, abs=1e-4)
    assert recovered([7.0, 9.0], [7.0, 9.0], [70.0, 72.0]) == {"value": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("scratch", "tl", "given"),
    [
        ([10.0], [10.0], False), ([10.0], [90.0], False),
        # 1, 3 and 2 above: 2 ± 4.303 / sqrt(3) = 2.48; 3, 5 and 4 above: 4 ± 2.48.
        ([10.0, 10.0, 10.0], [11.0, 13.0, 12.0], False), ([10.0, 10.0, 10.0], [13.0, 15.0, 14.0], True),
    ],
)  # fmt: skip
def test_no_share_is_given_of_what_could_be_nothing(scratch: list[float], tl: list[float], given: bool):
    assert (recovered(tl, scratch, tl) is not None) is given


def test_the_interval_of_the_share_covers_what_it_says():
    """A share of 0.5 in 4,000 draws of three seeds with 1.5 points of noise: 95 % of the intervals have it, within
    1.4 points (four standard errors of that number)."""
    rng = np.random.default_rng(0)
    draws = rng.normal([[17.0], [7.0], [27.0]], 1.5, (4000, 3, 3))
    inside = [found["low"] <= 0.5 <= found["high"] for found in (recovered(*map(list, one)) for one in draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.014)


def test_tuned_attackers_have_a_table_of_their_own(recipe_file: Path):
    """The seeds of the test above: 25 of 70 recovered, ± 4.30265 * 4.3054 / 70 = 26 %."""
    runs = []
    for seed, accuracies in enumerate(zip(*SEEDS, strict=True)):
        runs.append(fake_run(recipe_file, f"t{seed}", seed, 70.0, *TUNED))
        for model, single, worst in zip(("gc", "scratch", "TL"), (20.0, 5.0, 60.0), accuracies, strict=True):
            attack(runs[-1], model, single, worst, ("probe", "layer1") if model == "gc" and seed else ("full", None))
    table = summary.summarise(runs)
    gc_row = rows(table)["gc"]
    assert gc_row["piggyback_worst"] == {"again": 35.0}
    assert gc_row["piggyback_max"] == {"again": 40.0}
    assert table["evidence"]["gc"]["attacks"]["again"]["recovered"] == recovered(*SEEDS)
    assert gc_row["curves"]["again"] == [[20, 10.0], [30, 20.0]]
    heading, *lines = cells(tables.of_report(table)[-1])
    assert heading[-2:] == ["again recovered", "again tuned by"]
    assert {line[0]: line[1:] for line in lines if line[0] in ("gc", "scratch")} == {
        "gc": ["20.0 ± 0.0", "35.0 ± 12.4", "40.0 ± 12.4", "36% [9%, 62%]", "probe at layer1, full"],
        "scratch": ["5.0 ± 0.0", "10.0 ± 0.0", "15.0 ± 0.0", "–", "full"],
    }
    assert "Under tuned attackers" in tables.markdown(table)
    assert "Under tuned attackers" not in tables.markdown(summary.summarise([fake_run(recipe_file, "p", 0, 70.0)]))


def test_a_dataset_without_tuned_attackers_has_no_columns_of_theirs(recipe_file: Path):
    changes = ('data.piggyback.more={like="source"}', 'piggyback.attackers=[{kind="full", datasets=["again"]}]')
    run = fake_run(recipe_file, "some", 0, 70.0, *changes)
    for model, worst in (("scratch", 15.0), ("TL", 83.0), ("gc", 40.0)):
        attack(run, model, 14.0, worst)
    first, second, tuned = tables.of_report(summary.summarise([run]))
    assert first.columns == ["Model", "Acc_s", "Acc_t", "PL again", "PL more", "MIA AUC"]
    assert second.columns[3:] == ["PL again vs TL", "PL more vs TL", "tuned again vs TL"]
    assert tuned.columns == [
        "Model",
        *(f"again {kind}" for kind in ("one setting", "tuned", "best of all", "recovered", "tuned by")),
    ]
    drawn = figures.of_table(summary.summarise([run]))
    assert drawn["tradeoff-again"][0].axes[0].get_xlabel() == "Acc_pl again of the strongest attacker (%)"
    assert drawn["tradeoff-more"][0].axes[0].get_xlabel() == "Acc_pl more of the one setting (%)"
    bars = [text.get_text() for text in drawn["piggyback"][0].axes[0].texts]
    assert bars == ["bar", "14", "14", "14", "5", "35", "35", "◆", "15", "83", "40"]


def cells(table: tables.Table) -> list[list[str]]:
    return [table.columns, *table.rows]


@pytest.mark.parametrize(("one", "tuned", "told"), [(4.0, 17.0, True), (4.0, 15.0, False), (6.0, 35.0, False)])
def test_an_attack_that_fails_where_a_tuned_one_succeeds_is_named(recipe_file: Path, one, tuned, told):
    """Scratch has 5 by the one setting; tuned, 10, and TL 70: with less than 5 and more than 10 + 60 / 10 it failed."""
    runs = [fake_run(recipe_file, f"failed{seed}", seed, 70.0, *TUNED) for seed in (0, 1)]
    for run, gc in zip(runs, [(20.0, 40.0), (one, tuned)], strict=True):
        for model, accuracies in (("scratch", (5.0, 10.0)), ("TL", (60.0, 70.0)), ("gc", gc)):
            attack(run, model, *accuracies)
    sentence = (
        f"gc on again, seed 1: the one setting fails on these weights. It gets {one:.1f}, "
        f"less than from scratch (5.0), and a tuned attacker gets {tuned:.1f}."
    )
    assert summary.summarise(runs)["caveats"] == [sentence] * told
    assert (sentence in tables.markdown(summary.summarise(runs))) is told


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def browse(page: Path, *flags: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def full_page(recipe_file: Path) -> Path:
    folder = fake_run(recipe_file, "page", 0, 70.0, *TUNED)
    for model, accuracy in (("scratch", 5.0), ("TL", 60.0), ("gc", 40.0)):
        attack(folder, model, accuracy, accuracy + 3)
    files.write(summary.summarise([folder]), folder / "report", "dtlctl report <page>")
    return folder / "report" / "report.html"


def test_the_page_fetches_nothing_and_names_its_command(recipe_file: Path):
    text = full_page(recipe_file).read_text()
    assert not re.findall(r"https?://|<script|<link|@import|src=", text)
    assert text.count("<figure class=") == text.count("<svg") == 3
    assert len(re.findall(r"<figcaption>.*?<code>dtlctl report &lt;page&gt;</code></figcaption>", text)) == 3
    assert "The owner publishes one model" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not rendered")
def test_the_page_renders_light_and_dark_and_fits_a_telephone(recipe_file: Path):
    """No sideways scrolling at 400 px; the corner is white in light mode, nearly black in dark mode; ink is there."""
    from PIL import Image

    page = full_page(recipe_file)
    narrow = page.with_name("narrow.html")
    count = "document.querySelectorAll('svg path').length"
    script = f"<script>document.title = document.body.scrollWidth + ' ' + {count}</script>"
    narrow.write_text(
        page.read_text().replace("<body>", '<body style="width: 400px">').replace("</body>", script + "</body>")
    )
    width, paths = re.findall(r"<title>(\d+) (\d+)</title>", browse(narrow, "--window-size=500,900", "--dump-dom"))[0]
    assert int(width) <= 400
    assert int(paths) > 20
    for scheme, corner in ((1, 255), (0, 20)):
        shot = page.with_name(f"{scheme}.png")
        browse(
            page, "--window-size=1000,900", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"
        )
        grey = Image.open(shot).convert("L")
        assert abs(grey.getpixel((2, 2)) - corner) < 10
        low, high = grey.getextrema()
        assert high - low > 150


def test_files_are_written(recipe_file: Path, call):
    """What else lies in a folder that held no report stays, whatever it is called."""
    folder = fake_run(recipe_file, "one", 0, 70.0)
    (own := recipe_file.parent / "out" / "curve-mine.png").parent.mkdir()
    own.write_text("mine")
    code, out, err = call("report", folder, "--to", "out", "--json")
    assert code == 0 and own.read_text() == "mine", err
    assert json.loads(out) == json.loads((recipe_file.parent / "out" / "table.json").read_text())
    assert (recipe_file.parent / "out" / "piggyback.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (recipe_file.parent / "out" / "piggyback.svg").read_text()
    assert call("report", folder, folder)[0] == 2


def test_a_report_without_attacks_leaves_no_figure_of_those_that_were_there(recipe_file: Path):
    """Audits and attacks are gone: so are audit.md, the bars, the trade-off, the steps and the ROC curves."""
    folder = full_page(recipe_file).parent
    names = {path.name for path in folder.iterdir()}
    assert names >= {f"{name}.{form}" for name in ("piggyback", "tradeoff-again") for form in ("svg", "png")}
    for name in ("audit.md", "roc.svg", "roc.png", "tradeoff-of-an-earlier-name.png", "notes.md"):
        (folder / name).write_text("earlier")
    for attacks in ("piggyback", "audit"):
        shutil.rmtree(folder.parent / attacks)
    files.write(summary.summarise([folder.parent]), folder, "dtlctl report")
    assert {path.name for path in folder.iterdir()} == {
        "table.json", "table.md", "report.html", "verdict.json", "notes.md"
    }  # fmt: skip


def cards(page: str) -> dict[str, str]:
    """The text of every card of a page, by the name of its model."""
    found = [
        re.sub(r"<[^>]+>", " ", card) for card in re.findall(r'<div class="card(?: chosen)?">(.*?)</div>', page, re.S)
    ]
    return {card.split()[0]: " ".join(card.split()) for card in found}


def html(table: dict, folder: Path) -> str:
    """The page of a report, as a browser shows its text."""
    files.write(table, folder, "dtlctl report")
    return unescape((folder / "report.html").read_text())


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_recovered_from_who_never_saw_the_source(recipe_file: Path):
    """TGT gets 48 % of what TL has above scratch: in no table, card, document or caption is that called recovered."""
    run = fake_run(recipe_file, "never", 0, 70.0, *TUNED, 'piggyback.models=["scratch", "TGT", "pre", "TL", "gc"]')
    for model, worst in {"scratch": 10.0, "TGT": 39.0, "pre": 76.0, "TL": 70.0, "gc": 25.0}.items():
        attack(run, model, worst - 1, worst)
    table = summary.summarise([run])
    shares = {model: one["attacks"].get("again", {}).get("recovered") for model, one in table["evidence"].items()}
    assert shares["TGT"] is shares["scratch"] is shares["rand"] is None
    assert shares["gc"]["value"] == 0.25
    assert {line[0]: line[-2].split()[0] for line in tables.of_report(table)[-1].rows} == {
        "scratch": "–", "TGT": "–", "pre": "110%", "TL": "100%", "gc": "25%", "rand": "–"
    }  # fmt: skip
    page = html(table, run / "report")
    assert "recovered" not in cards(page)["TGT"] and "48%" not in page + checkpoint.dump(table)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("choose_on", "chosen"),
    [("own", "held-out images of his own"), ("test", "half of the test images, and judged by the other half")],
)
def test_a_figure_says_who_chose_and_whose_its_numbers_are(recipe_file: Path, choose_on: str, chosen: str):
    """TL: a bar of 60 and a diamond at 83, their numbers in a column of bars and one of diamonds."""
    run = fake_run(recipe_file, "who", 0, 70.0, *TUNED, f'piggyback.choose_on="{choose_on}"')
    for model, worst in (("scratch", 15.0), ("TL", 83.0), ("gc", 40.0)):
        attack(run, model, worst - 23 if model == "TL" else worst, worst)
    table = summary.summarise([run])
    drawn = figures.of_table(table)
    figure, caption = drawn["piggyback"]
    assert caption.endswith(f"Bars: the one setting; diamonds: the attacker tuned on {chosen}.")
    assert "bar: one setting, ◆: tuned attacker" in figure.axes[0].get_title()
    columns: dict[float, list[str]] = {}
    for text in figure.axes[0].texts:
        columns.setdefault(text.get_position()[0], []).append(text.get_text())
    assert list(columns.values()) == [["bar", "15", "60", "40"], ["◆", "15", "83", "40"]]
    assert "the strongest attacker" in drawn["tradeoff-again"][1]
    assert drawn["tradeoff-again"][0].axes[0].get_xlabel() == "Acc_pl again of the strongest attacker (%)"
    other = "held-out images of his own" if choose_on == "test" else "half of the test images"
    assert other not in html(table, run / "report")


def test_the_trade_off_has_the_intervals_of_its_images(recipe_file: Path):
    """TL keeps 78, in 60 to 80, and 50 of 1,000 images of attack: Wilson's 3.09 to either side; gc's Acc_t has none."""
    run = fake_run(recipe_file, "bars", 0, 70.0, *TUNED)
    for model in ("scratch", "TL", "gc"):
        attack(run, model, 40.0, 50.0)
    table = summary.summarise([run])
    table["evidence"]["TL"]["accuracy"] = {"value": 78.0, "low": 60.0, "high": 80.0}
    tl, gc = figures.of_table(table)["tradeoff-again"][0].axes[0].containers
    assert (tl.get_label(), tl.has_xerr, tl.has_yerr, gc.has_xerr) == ("TL", True, True, False)
    across, up = (line.get_segments()[0] for line in tl.lines[2])
    assert across[:, 0] == pytest.approx([50 - 3.09, 50 + 3.09], abs=0.01) and list(up[:, 1]) == [60, 80]


def test_without_a_tuned_attacker_nothing_speaks_of_one(recipe_file: Path):
    run = fake_run(recipe_file, "single", 0, 70.0)
    drawn = figures.of_table(summary.summarise([run]))
    assert [text.get_text() for text in drawn["piggyback"][0].axes[0].texts] == ["bar", "5", "35", "35"]
    for _, caption in drawn.values():
        assert "tuned" not in caption and "◆" not in caption
    assert drawn["tradeoff-again"][0].axes[0].get_xlabel() == "Acc_pl again of the one setting (%)"


def test_a_model_on_which_all_tuned_attackers_diverged_is_named(recipe_file: Path):
    """Else 5 % by the one setting, from scratch too, would read as what the best of many attackers gets."""
    runs = [fake_run(recipe_file, f"diverged{seed}", seed, 70.0, *TUNED) for seed in (0, 1)]
    for run in runs:
        for model, accuracies in (("scratch", (5.0, 10.0)), ("TL", (60.0, 70.0)), ("gc", (5.0, 5.0))):
            attack(run, model, *accuracies)
    assert summary.summarise(runs)["caveats"] == []
    put(runs[0] / "piggyback/gc/again.json", chosen=[])
    (sentence,) = summary.summarise(runs)["caveats"]
    assert sentence.startswith("gc on again: all tuned attackers diverged, and the one setting stands for them.")
    assert rows(summary.summarise(runs))["gc"]["tuned_by"] == {"again": ["full"]}  # in the other seed


@pytest.mark.parametrize(
    ("job", "change"),
    [
        ("piggyback", {"acc_pl_worst": None}), ("piggyback", {"acc_pl": 1e308}), ("piggyback", {"acc_pl": -1}),
        ("audit", {"blind": None}), ("audit", {"loss": {"auc": 0.7, "balanced_accuracy_std": 0.1}}),
        ("audit", {"roc": {"fpr": [0.1, 1.0], "tpr": [0.1]}}),
    ],
)  # fmt: skip
def test_metrics_of_another_form_are_refused_by_the_files_name(recipe_file: Path, call, job: str, change: dict):
    """None: it is not there. A ROC curve is put into an attack whose other numbers are all there."""
    run = fake_run(recipe_file, "edited", 0, 70.0, *TUNED)
    for model in ("scratch", "TL", "gc"):
        attack(run, model, 20.0, 30.0)
    path = run / {"piggyback": "piggyback/TL/again.json", "audit": "audit/TL.json"}[job]
    if "roc" in change:
        numbers = dict.fromkeys(("auc", "auc_low", "auc_high", "balanced_accuracy", "balanced_accuracy_std"), 0.5)
        change = {"loss": {**numbers, "tpr_at_0.01": None, "tpr_at_0.001": None, **change}}
    document = json.loads(path.read_text())
    document["metrics"] = {k: v for k, v in {**document["metrics"], **change}.items() if v is not None}
    path.write_text(json.dumps(document))
    code, _, said = call("report", run, "-q")
    assert code == 4 and said == f"error: {path}: not the metrics of {job}; delete it\n"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('[{"step": 100}]', "[]", "not the metrics of dispose"),
        ('"images": 640', '"images": 0', "not the metrics of dispose"),
        ('"acc_t": 10.0', '"acc_t": 1e999', "1e999 is not a finite number"),
        ('"acc_t": 10.0', '"acc_t": -Infinity', "-Infinity is not a finite number"),
    ],
)
def test_a_disposal_without_steps_images_or_a_number_is_refused_in_a_line(recipe_file: Path, call, old, new, what: str):
    run = fake_run(recipe_file, "edited", 0, 70.0)
    for path in run.glob("dispose/*/model.json"):  # of one alone the images would be others
        path.write_text(path.read_text().replace(old, new))
    code, _, said = call("report", run, "-q")
    assert code == 4 and said.count("\n") == 1 and what in said


@pytest.mark.parametrize(
    ("held_out", "choose_on", "told"),
    [((90.0, 86.0), "own", True), ((90.0, 69.0), "own", False), ((90.0, 86.0), "test", False)],
)
def test_held_out_images_that_mislead_are_named(recipe_file: Path, held_out, choose_on, told):
    """Tuned, TL gets 70 and 75: 72.5 on average. Held-out images say 88, 15.5 more, or 79.5, which is 7 more.

    Fresh images do not mislead: where they choose there is nothing to advise.
    """
    changes = [*TUNED, f'piggyback.choose_on="{choose_on}"']
    runs = [fake_run(recipe_file, f"misled{seed}", seed, 70.0, *changes) for seed in (0, 1)]
    for run, seen, worst in zip(runs, held_out, (70.0, 75.0), strict=True):
        for model, accuracies in (("scratch", (5.0, 10.0)), ("TL", (60.0, worst)), ("gc", (20.0, 40.0))):
            attack(run, model, *accuracies)
        path = run / "piggyback/TL/again.json"
        document = json.loads(path.read_text())
        document["metrics"]["chosen"] = [{"val": seen - 4}, {"val": seen + 4}]
        path.write_text(json.dumps(document))
    sentence = (
        "again: held-out images mislead the tuned attackers. On TL they are right on 88.0 % of them and on 72.5 % of "
        'the test images. Let fresh images choose: piggyback.choose_on = "test".'
    )
    assert summary.summarise(runs)["caveats"] == [sentence] * told


def test_the_table_says_which_images_chose(recipe_file: Path):
    for number, (choose_on, words) in enumerate(
        (("own", "held-out images of his own"), ("test", "half of the test images, and judged by the other half"))
    ):
        run = fake_run(recipe_file, f"who{number}", 0, 70.0, *TUNED, f'piggyback.choose_on="{choose_on}"')
        for model in ("scratch", "TL", "gc"):
            attack(run, model, 20.0, 30.0)
        table = summary.summarise([run])
        assert words in tables.markdown(table)
        shown = templates.said("who", table["recipe"]["piggyback"])
        assert ("the test split picks nothing" in shown) is (choose_on == "own")
        assert ("the other half judges it" in shown) is (choose_on == "test")


@pytest.mark.parametrize(("chosen", "judges"), [([{"kind": "full", "val": 1.0}], 417), ([], 1000)])
def test_the_interval_of_a_tuned_attacker_is_that_of_the_images_that_judge_him(recipe_file: Path, chosen, judges):
    """Half of the smallest class of each chooses: the rest is not half. Where nobody was chosen, all images judge."""
    run = fake_run(recipe_file, "judges", 0, 70.0, *TUNED, 'piggyback.choose_on="test"')
    for model in ("scratch", "TL", "gc"):
        attack(run, model, 20.0, 30.0)
        put(run / f"piggyback/{model}/again.json", judges=417, chosen=chosen)
    assert summary.summarise([run])["evidence"]["TL"]["attacks"]["again"]["images"] == judges


def test_strength_against_budget_by_hand(recipe_file: Path):
    """Of a grid with 40, 20 and one that diverged: a trial has 20 on average, the better of two (40 + 40 + 20) / 3.

    A search has them in this order in one repetition, and 10, 50, 50 in another: 25, 45, 45. The page shows both, and
    the search's winner; where there is no trial there is neither.
    """
    trials = [{"seed": 0, "val": value} for value in (40.0, None, 20.0)]
    assert results.strength(trials, in_order=False) == [[1, pytest.approx(20)], [2, pytest.approx(100 / 3)], [3, 40]]
    more = [{"seed": 1, "val": value} for value in (10.0, 50.0, 50.0)]
    assert results.strength([*trials, *more], in_order=True) == [[1, 25], [2, 45], [3, 45]]

    found = {}
    for name, changes in {"grid": TUNED, "search": (*TUNED, "piggyback.search={trials=3}"), "none": ()}.items():
        run = fake_run(recipe_file, name, 0, 70.0, *changes)
        for model in ("scratch", "TL", "gc") if changes else ():
            own = {"winner": 'attackers = [{ kind = "knn" }]'} if name == "search" else {}
            put(run / f"piggyback/{model}/again.json", acc_pl_worst=30.0, acc_pl_max=30.0, trials=trials, **own)
        files.write(summary.summarise([run]), run / "report", "dtlctl report", [run])
        found[name] = unescape((run / "report/report.html").read_text())
        assert (run / "report/strength-again.svg").exists() == bool(changes)
    table = (recipe_file.parent / "search/report/table.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| gc") and "knn" in line]
    told = ["gc", "40.0", "40.0", "40.0 (3)", 'attackers = [{ kind = "knn" }]']
    assert [cell.strip() for cell in line.split("|")[1:-1]] == told
    assert ["what the search chose" in page for page in found.values()] == [False, True, False]
    assert ["33.3" in page for page in found.values()] == [True, False, False]
