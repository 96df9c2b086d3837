"""What `check` says of results that are there, and of what the rest will cost."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dtlctl.data import cache, overlap
from dtlctl.data.sources import Source
from dtlctl.errors import DataError
from dtlctl.recipe import network_demands
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment
from dtlctl.stages import costs, preview


def planned(recipe_file: Path, *overrides: str) -> dict:
    return preview.plan(load(recipe_file, list(overrides)), recipe_file.parent)


def states(document: dict) -> dict[str, str]:
    return {row["title"]: row["state"] for row in document["jobs"]}


def quickest(document: dict) -> dict[str, float]:
    return {row["title"]: row["seconds"][0] for row in document["jobs"]}


@pytest.fixture
def trained(_finished: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny recipe after its disposals; nobody may start an engine. An image costs 1 to 2 s, in gc 4 to 8.

    An audit costs 5 to 10 s. The network has one stage of 8 features.
    """
    shutil.copytree(_finished, recipe_file.parent / "tiny", ignore=shutil.ignore_patterns("piggyback", "audit"))
    monkeypatch.setattr(Experiment, "engine", property(lambda _: pytest.fail("an engine was started")))
    seconds = {"gc": np.array([4.0, 8.0])}
    fake = SimpleNamespace(
        parameters=1, features=8, stages=1, image=lambda variant="": seconds.get(variant, np.array([1.0, 2.0]))
    )
    monkeypatch.setattr(costs, "Clock", lambda _: fake)
    monkeypatch.setattr(costs, "audit", lambda *_: np.array([5.0, 10.0]))
    monkeypatch.setattr(preview, "busy", lambda: None)
    return recipe_file


def test_done_is_what_the_stages_would_skip(trained: Path):
    """Another lambda makes a variant stale, another pre-training all that comes from it; `{}` is no sidecar."""
    same = states(planned(trained))
    models = ["pretrain", "target-only", "finetune", "dispose/gc", "dispose/rand"]
    assert {title: state for title, state in same.items() if state != "to do"} == dict.fromkeys(models, "done")
    assert same["audit/gc"] == same["piggyback/TL/again"] == "to do"
    (trained.parent / "tiny/dispose/gc/model.json").write_text("{}")
    found = planned(trained, "dispose.rand.lambda=0.3")
    assert [states(found)[title] for title in models] == ["done", "done", "done", "unreadable", "stale"]
    assert "dispose/gc                       there, but unreadable; 6 steps of 8, 120 to 240 s" in preview.text(found)
    found = planned(trained, "pretrain.steps=13")
    assert [states(found)[title] for title in models] == ["stale", "done", "stale", "unreadable", "stale"]


def test_without_decoded_data_nothing_is_called_done(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "empty"))
    found = planned(trained)
    assert [row["state"] for row in found["jobs"][:5]] == ["not checked"] * 5
    assert "pretrain                         there, not checked; 12 steps of 20" in preview.text(found)
    unknown = preview.text(planned(trained, "pretrain={epochs=2, batch_size=20}"))
    assert "pretrain                         there, not checked; ? steps of 20" in unknown
    assert not (tmp_path / "empty").exists()


def test_nothing_is_decoded(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even where the train split has been, and an attacker who chooses on the test split asks for that."""
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "half"))
    changes = ('piggyback.attackers=[{kind="probe"}]', 'piggyback.choose_on="test"')
    recipe = load(trained, list(changes))
    for dataset in (recipe.data.source, recipe.data.piggyback["again"]):
        cache.load(Source(dataset), "train", recipe.model.image_size)
    before = sorted((tmp_path / "half").iterdir())
    planned(trained, *changes)
    assert sorted((tmp_path / "half").iterdir()) == before


def test_nothing_is_decoded_for_the_cost_of_references(recipe_file: Path, tmp_path: Path, monkeypatch):
    """File names tell 4 images to train and 4 to test on: each of two references takes 12 steps of 4, a second each.

    Which of them are there nobody knows without the images.
    """
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(costs, "audit", lambda *_: np.array([5.0, 10.0]))
    fake = SimpleNamespace(parameters=1, features=8, stages=1, image=lambda variant="": np.array([1.0, 2.0]))
    monkeypatch.setattr(costs, "Clock", lambda _: fake)
    for number in range(8):
        path = tmp_path / "photos" / ("train", "test")[number % 2] / "ab"[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    source = (f"data.source.path={tmp_path / 'photos'}", "data.source.fraction=1")
    found = planned(recipe_file, *source, 'audit.attacks=["rmia"]', "audit.references=2")
    (seconds,) = [row["seconds"] for row in found["jobs"] if row["title"] == "audit/pre"]
    assert seconds == [5 + 2 * 12 * 4, 2 * (5 + 2 * 12 * 4)]
    assert not (tmp_path / "empty").exists()


def test_the_cost_counts_references_once_and_nothing_that_is_done(trained: Path):
    """In images, each a second; 1,000 digits to train on, 797 to test on. `source` has 100, `target` 20, `again` 30.

    pretrain 2 epochs of 5 steps of 20 = 200; TGT and TL 4 of 10 each; gc 6 of 8, half of them 1 and half of them 4
    times as dear: 120; rand 4 of 8 = 32; three attacks, 3 of 10 each. A reference sees (100 + 797) / 2 = 448 images,
    2 epochs of 22 steps of 20 = 880, and there are four. Each audit takes 5 s besides.
    """
    rmia = ("pretrain.epochs=2", "audit.references=4", 'audit.attacks=["rmia"]')
    found = planned(trained, *rmia)
    assert quickest(found) == {
        "pretrain": 200,
        "target-only": 0,
        "finetune": 40,
        "dispose/gc": 120,
        "dispose/rand": 32,
        **dict.fromkeys((f"piggyback/{model}/again" for model in ("scratch", "TL", "gc")), 30),
        "audit/pre": 3525,
        **dict.fromkeys((f"audit/{model}" for model in ("TL", "gc", "rand")), 5),
    }
    assert all(row["seconds"][1] == 2 * row["seconds"][0] for row in found["jobs"])
    total = (200 + 40 + 120 + 32 + 90 + 3520 + 20) / 60
    assert found["minutes"] == [round(total, 1), round(2 * total, 1)]
    text = preview.text(found)
    assert "audit/pre                        attack, 3525 to 7050 s\n" in text
    assert text.endswith("67 to 134 min on this machine")
    assert planned(trained)["minutes"] == [1.8, 3.7]  # three attackers and four audits
    alone: Any = SimpleNamespace(agree=lambda code: code, by_main=lambda work: work())
    answers = Experiment(load(trained, list(rmia)), trained.parent).results.reference_answers()
    answers.common(alone, "2", list[float], lambda: [0.5])
    assert quickest(planned(trained, *rmia))["audit/pre"] == 3 * 880 + 5


def test_the_cost_of_attackers_is_that_of_steps_looks_features_and_fits(trained: Path, monkeypatch):
    """Besides the 30 images of the one setting, with a fit in 6 s and a forward pass as a third of a step:

    `full`: 2 rates and once more, each 4 steps of 10: 120; 2 · 10 looks at 7.5 held-out images and one at 797, 947 / 3.
    A probe: features of 827 images, and 4 fits and a last one, on as many threads. In a search of 12 trials each has 4,
    `full` half of its steps: 5 · 2 · 10 and (4 · 10 · 7.5 + 797) / 3. `self-training` takes two images for one.
    """
    monkeypatch.setattr(costs, "_fit", lambda *_: 6.0)
    full, threads = '{kind="full", lr=[0.1, 0.2], steps=4, batch_size=10}', torch.get_num_threads()
    attackers = f'piggyback.attackers=[{full}, {{kind="probe"}}, {{kind="renorm-probe"}}]'
    probes = 2 * (827 / 3 + 30 / threads)
    found = quickest(planned(trained, attackers))["piggyback/TL/again"]
    assert found == pytest.approx(30 + 120 + 947 / 3 + probes)
    monkeypatch.setattr(network_demands, "find_spec", lambda name: True)
    found = quickest(planned(trained, attackers, "piggyback.search={trials=12}"))["piggyback/TL/again"]
    assert found == pytest.approx(30 + 100 + 1097 / 3 + probes)
    doubled = f"piggyback.attackers=[{full.replace('full', 'self-training')}]"
    assert quickest(planned(trained, doubled))["piggyback/TL/again"] == pytest.approx(30 + 240 + 947 / 3)


def test_the_cost_of_an_audit_is_that_of_looks_and_judging(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is timed takes a second: a look at 16 images, and one repeat. 100 members, 100 others: 12.5 looks.

    loss: 12.5 + (20 + 1) / 2, as a repeat alone judges all images too. adv-dist: two numbers, so 12.5 + 21, and of its
    5 steps 4 more in 2 searches on 200 images of 0.01 to 0.02 s. wb: 12.5 and 3 repeats. rmia: as loss. Relearning: 10
    steps of 64 images; entropy and answers: 997 images at a third. Of the target's 20 images rmia has none.
    """
    monkeypatch.setattr(costs, "seconds", lambda work: (work(), 1.0)[1])
    attacks = (
        'audit={attacks=["loss", "adv-dist", "wb", "rmia"], modes=["as-is"], repeats=20, adv_steps=5, references=2}'
    )
    recipe = load(recipe_file, [attacks, "audit.relearn_steps=10"])
    clock: Any = costs.Clock(recipe)
    clock.image = lambda: np.array([0.01, 0.02])
    source, target = {"images": 100, "test_images": 797}, {"images": 20, "test_images": 797}
    found = costs.audit(recipe.audit, source, target, clock)
    low = (12.5 + 10.5) + (12.5 + 21 + 16) + (12.5 + 3) + (12.5 + 10.5) + 6.4 + 997 / 300
    assert found == pytest.approx([low, low + 16 + 6.4 + 997 / 300])
    both = recipe.audit.model_copy(update={"modes": ["as-is", "target"]})
    more = (2.5 + 10.5) + (2.5 + 21 + 3.2) + (2.5 + 3) + 40 / 300
    high = found[1] + more + 3.2 + 40 / 300
    assert costs.audit(both, source, target, clock) == pytest.approx([low + more, high])
    assert costs.audit(recipe.audit, {**source, "images": None}, target, clock) is None


@pytest.mark.parametrize(("two", "said"), [(4.0, "one thread is 2.0 times as fast as 2"), (2.9, None)])
def test_threads_that_wait_for_others_are_given_up(monkeypatch: pytest.MonkeyPatch, two: float, said: str | None):
    """Two threads take twice as long as one: one is left, and it is said. At 1.45 times both stay."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(costs, "seconds", lambda work: two if torch.get_num_threads() == 2 else 2.0)
    try:
        torch.set_num_threads(2)
        found = costs.crowded()
        assert (found is None) if said is None else (said in found and "OMP_NUM_THREADS=1" in found)
        assert torch.get_num_threads() == (2 if said is None else 1)
        torch.set_num_threads(1)
        assert costs.crowded() is None
    finally:
        torch.set_num_threads(threads)


def test_the_steps_that_are_timed_are_those_of_the_recipe(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """gc's step looks at source images in its two chunks; the one of a training at a batch. Its looks take .2 to .4 s.

    The first is not counted, so an image of 8 takes .2 / 8 to .4 / 8 s, after a second; a slow step is looked at twice.
    """
    now = iter([0, 0.2, 0.2, 0.4, 0.4, 0.7, 0.7, 1.1, 0, 5, 5, 8])
    monkeypatch.setattr(costs.devices, "clock", lambda device: float(next(now)))
    sizes: list[int] = []
    noise = costs.Clock.noise
    monkeypatch.setattr(costs.Clock, "noise", lambda self, size: sizes.append(size) or noise(self, size))
    chunks: list[int] = []
    disposal = costs.Disposal

    def spied(*arguments: Any, **options: Any) -> Any:
        chunks.append(options["chunks"])
        return disposal(*arguments, **options)

    monkeypatch.setattr(costs, "Disposal", spied)
    clock = costs.Clock(load(recipe_file))
    assert clock.image("gc") == pytest.approx([0.2 / 8, 0.4 / 8])
    assert clock.image() == pytest.approx([3 / 20, 3 / 20])
    assert (sizes, chunks) == ([8, 20], [2])


def test_counts_are_known_by_labels_alone_and_what_was_not_looked_at_is_said(
    recipe_file: Path, tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
):
    """A parquet file of 6 images of two classes, one of them broken: rows and classes without decoding, which ends
    with its place; mended, everything is known, as `run` will have it."""
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def table(split: str, last: bytes, count: int) -> None:
        cells = [{"bytes": blob, "path": None} for blob in [*[file.getvalue()] * (count - 1), last]]
        rows = {"image": cells, "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "d" / f"{split}.parquet"))

    (tmp_path / "d").mkdir()
    table("train", b"broken", 6)
    table("test", file.getvalue(), 2)
    change = f"data.source={{path='{tmp_path / 'd'}', fraction=1.0}}"
    code, out, err = call("check", recipe_file, "--set", change)
    assert code == 0, err
    assert f"{tmp_path / 'd'}: 6 images, 2 classes, not decoded yet" in out
    assert out.count("no image of what is not decoded yet was looked at") == 1
    code, out, err = call("check", recipe_file, "--decode", "--quiet", "--set", change)
    assert (code, out) == (4, "") and "train.parquet, row 5: the image cannot be decoded" in err
    table("train", file.getvalue(), 6)
    recipe = load(recipe_file, [change])
    with pytest.raises(DataError, match="2 of 2 test images are in the train split too"):
        preview.plan(recipe, tmp_path, decode=True)


def test_check_decodes_on_request_and_then_knows_all(call, recipe_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    code, out, err = call("check", recipe_file, "--decode", "-q")
    assert (code, err) == (0, "") and "?" not in out and "decoded" not in out and "min on this machine" in out


def test_a_folder_is_looked_at_once(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By both splits, for the key and for the classes; a role of its own folder looks at that alone."""
    for number in range(8):
        path = tmp_path / "photos" / ("train", "test")[number % 2] / "ab"[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    looked, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(os.path.relpath(path, tmp_path)) or scan(path))
    found = planned(recipe_file, f"data.target.path={tmp_path / 'photos'}", "data.target.fraction=1")
    assert next(row["images"] for row in found["data"] if row["role"] == "target") == 4
    inside = [f"photos/{split}{name}" for split in ("test", "train") for name in ("", "/a", "/b")]
    assert sorted(path for path in looked if path.startswith("photos")) == ["photos", *inside]


def test_a_target_that_is_the_source_is_said_before_anything_is_decoded(recipe_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "empty"))
    notes = {row["role"]: row["notes"] for row in planned(recipe_file)["data"]}
    assert notes == {"source": [], "target": [overlap.SAME], "piggyback.again": []}
    assert not planned(recipe_file, "data.target.path=builtin:letters")["data"][1]["notes"]


def test_data_that_is_not_there_is_no_plan(recipe_file: Path, call):
    """As a run would end; a note beside "valid" is read by nobody."""
    code, out, err = call("check", recipe_file, "--set", "data.target.path=./nowhere")
    assert (code, out) == (4, "") and "data.target.path" in err and "nowhere" in err
