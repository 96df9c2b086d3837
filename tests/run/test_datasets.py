"""What of its data a run decodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dtlctl.data import entry
from dtlctl.data.stream import Streamed
from dtlctl.errors import CheckpointError
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import STAGES
from dtlctl.report.results import refuse_other_images
from dtlctl.run.experiment import Experiment
from dtlctl.stages.runner import run
from dtlctl.storage.checkpoint import read_sidecar
from tests.reliability.fork import command, together


def test_a_large_split_is_decoded_as_far_as_it_is_drawn(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """1,000 digits of which the target draws 2 %. Another seed draws others of the same listing; held-back images are
    decoded for whoever compares, and change no key."""
    monkeypatch.setattr(entry, "WHOLE", 0)
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    first, second = (Experiment(load(recipe_file, [f"seed={seed}"]), tmp_path, quiet=True) for seed in (0, 1))
    one, two = (experiment.data.identity("target") for experiment in (first, second))
    assert (one["train"], one["test"], one["images"]) == (two["train"], two["test"], 20)
    assert one["drawn"] != two["drawn"] and one["index"] != two["index"]
    images = first.data.images("target", "train")
    assert images.rows.tolist() == first.data.index("target").tolist()
    drawn = {row for experiment in (first, second) for row in experiment.data.index("target").tolist()}
    assert not any(images.pixels[row].any() for row in range(1000) if row not in drawn)
    held = first.data.held_back("target")
    assert len(held) == 980 and all(images.pixels[row].any() for row in held)
    assert Experiment(first.recipe, tmp_path, quiet=True).data.identity("target") == one


def test_held_back_images_are_in_the_key_of_what_looks_at_them(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A price is measured on target images that were not drawn, self-training learns from the attacker's."""
    monkeypatch.setattr(entry, "WHOLE", 0)
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    trained = '{kind="self-training", lr=[0.1], steps=2}'
    changes = ["dispose.gc.price=2", "dispose.gc.repair=0", f"piggyback.attackers=[{trained}]"]
    experiment = Experiment(load(recipe_file, changes), tmp_path, quiet=True)
    assert {job.title: job.beyond for job in experiment.jobs if job.beyond} == {
        "dispose/gc": "target",
        **{f"piggyback/{model}/again": "piggyback.again" for model in ("scratch", "TL", "gc")},
    }
    whole, data = experiment.data.whole("target").fingerprint, experiment.data
    assert data.identity("target", beyond=True) == {**data.identity("target"), "whole": whole}


STREAMED = [f"data.{role}.decode=stream" for role in ("source", "target", "piggyback.again")]


def test_a_run_on_streamed_images_is_the_same(finished: Path, tmp_path: Path):
    """Every stage, to the same bits as from the cache, and under the same keys."""
    experiment, kept = Experiment(load(finished, STREAMED), tmp_path / "streamed", quiet=True), tmp_path / "runs/tiny"
    with experiment.results.opened():
        run(experiment, STAGES)
    assert type(experiment.data.images("piggyback.again", "test").pixels) is Streamed
    for name in (job.path for job in experiment.jobs):
        one, other = read_sidecar(kept / name), read_sidecar(experiment.folder / name)
        for sidecar in (one, other):
            sidecar["metrics"].pop("cost", None)
        for part in ("key", "metrics", "history", "weights_sha256"):
            assert one.get(part) == other.get(part), (name, part)


def test_a_training_on_streamed_images_goes_on_after_kill_9_to_the_same_bits(finished: Path, tmp_path: Path, call):
    """Killed before step 8 of 12, in the middle of an epoch of 5."""
    more = [word for change in ("name=killed", "checkpoint_minutes=0", *STREAMED) for word in ("--set", change)]
    killed = together(partial(command, "pretrain", finished, *more, fault="step:8=kill"), tmp_path)
    assert killed.returncode == -9 and not (tmp_path / "runs/killed/pretrain/model.json").exists()
    code, _, err = call("pretrain", finished, *more)
    assert code == 0 and "goes on from step 6 of 12" in err
    weights = [tmp_path / "runs" / name / "pretrain/model.safetensors" for name in ("tiny", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_held_out_test_split_is_one_for_all_roles_and_in_the_key(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """20 images of each of two classes, of which 4 each are held out; the attacker's `like` must not train on them.

    Results of two seeds, which hold out other images, still stand in one table.
    """
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    for number in range(40):
        path = tmp_path / "pool" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    changes = [
        f"data.source={{path='{tmp_path / 'pool'}', test=0.2, fraction=1.0}}",
        "data.piggyback.again.fraction=0.5",
    ]
    results = []
    for seed in (0, 1):
        experiment = Experiment(load(recipe_file, [*changes, f"seed={seed}"]), tmp_path / f"{seed}", quiet=True)
        source, copy = (experiment.data.images(role, "test") for role in ("source", "piggyback.again"))
        assert source.fingerprint == copy.fingerprint and len(source.labels) == 8
        assert experiment.data.identity("source")["images"] == 32
        listed = experiment.data.tested("source")
        assert sorted(Image.open(place).getpixel((0, 0))[0] for place in listed) == sorted(source.pixels[:][:, 0, 0, 0])
        run(experiment, ("pretrain",))
        results.append((experiment.jobs[0], path := experiment.folder / experiment.jobs[0].path, read_sidecar(path)))
    assert results[0][2]["data"]["source"]["test"] != results[1][2]["data"]["source"]["test"]
    refuse_other_images(results, one_seed=False)
    with pytest.raises(CheckpointError, match="made from other images"):
        refuse_other_images(results, one_seed=True)


def test_check_lists_what_is_held_out(recipe_file: Path, call, tmp_path: Path):
    """A fifth of five images of each class is one; a role that is not there is told."""
    for number in range(10):
        path = tmp_path / "pool" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    change = f"data.source={{path='{tmp_path / 'pool'}', test=0.2}}"
    code, out, err = call("check", recipe_file, "--set", change, "--tested", "source")
    assert (code, err) == (0, "")
    assert sorted(Path(line).parent.name for line in out.splitlines()) == ["a", "b"]
    assert all(Path(line).is_file() for line in out.splitlines())
    code, _, err = call("check", recipe_file, "--tested", "sauce")
    assert code == 2 and "did you mean 'source'" in err


def test_where_decoded_images_of_ones_own_lie_is_told_once(recipe_file: Path, call, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    for number in range(10):
        path = tmp_path / "pool" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(path)
    change = f"data.source={{path='{tmp_path / 'pool'}', test=0.2}}"
    for told in (True, False):  # the second run decodes nothing
        _, _, err = call("pretrain", recipe_file, "--set", change)
        assert (f"decoded images are kept in {tmp_path / 'cache'}" in err) is told
