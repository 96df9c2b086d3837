"""Two ways to the pixels, one result: what is streamed is what the cache keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from psutil import pid_exists

from dtlctl.data import cache, overlap, stream
from dtlctl.data.dataset import Dataset
from dtlctl.data.entry import Kept
from dtlctl.data.sources import Source
from dtlctl.data.stream import Streamed
from dtlctl.data.tensors import Batches, Share, evaluation_batches
from dtlctl.errors import DataError

CPU = torch.device("cpu")
SIDE = 12


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def photos(root: Path, train: int = 46, test: int = 10, **more) -> Dataset:
    """Noise in every shape and format that differs in how it is decoded, a quarter of it grey, under two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            path = root / split / "ab"[number % 2] / f"{number}.{('jpg', 'png', 'webp')[number % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 256, (10 + number, 30, 3), np.uint8))
            picture.convert("L" if number % 4 == 3 else "RGB").save(path)
    return Dataset(path=str(root), **more)


def both(dataset: Dataset, split="train", wanted=None):
    """The split by the cache, and streamed."""
    ways = (Source(dataset.model_copy(update={"decode": way})) for way in ("cache", "stream"))
    return [cache.load(source, split, SIDE, wanted) for source in ways]


def equal(one, other):
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("x", "y", "rows"))


def test_batches_are_the_same_bits_in_whatever_order_they_are_asked_for(tmp_path):
    """Of 46 + 10 images in two arrays, 41 are trained on: four batches of ten an epoch, the third process's share."""
    dataset = photos(tmp_path / "d")
    trains, tests = both(dataset), both(dataset, "test")
    index = np.arange(5, 46)
    made = [
        Batches(
            [train.pixels, test.pixels],
            np.concatenate([train.labels, test.labels]),
            np.concatenate([index, 46 + np.arange(10)]),
            batch_size=10,
            augment="crop-flip",
            seed=7,
            device=CPU,
            share=Share(2, 3),
        )
        for train, test in zip(trains, tests, strict=True)
    ]
    for step in (0, 1, 2, 3, 4, 5, 5, 4, 17, 0):
        assert equal(made[0][step], made[1][step])


def test_a_batch_is_begun_before_it_is_asked_for_and_decoded_once(tmp_path, monkeypatch):
    images = both(photos(tmp_path / "d"))[1]
    asked, ask = [], Streamed.ask
    monkeypatch.setattr(Streamed, "ask", lambda self, rows: asked.append(rows.tolist()) or ask(self, rows))
    batches = Batches(images.pixels, images.labels, np.arange(46), batch_size=10, augment="none", seed=0, device=CPU)
    seen = [batches[step].rows.tolist() for step in (0, 0, 1, 2, 3)]
    assert [len(asked), asked[:4]] == [4 + stream.AHEAD, [seen[0], *seen[2:]]]
    asked.clear()
    looks = evaluation_batches(images.pixels, images.labels, device=CPU, batch_size=10)
    next(looks)
    assert len(asked) == 1 + stream.AHEAD
    assert [len(batch.y) for batch in looks] == [10, 10, 10, 6] and len(asked) == 5


@pytest.mark.parametrize("rows", [None, np.array([3, 4, 9]), np.array([], np.int64)])
def test_evaluation_is_the_same(tmp_path, rows):
    kept, streamed = (
        list(evaluation_batches(images.pixels, images.labels, rows, device=CPU, batch_size=4))
        for images in both(photos(tmp_path / "d"), "test")
    )
    assert all(equal(one, other) for one, other in zip(kept, streamed, strict=True))


@pytest.mark.parametrize("odd", ["broken", "more-than-8-bits"])
def test_all_that_is_said_is_said_of_a_stream_too(tmp_path, odd):
    """A copy in the test split; a broken image outside of the subset, or one of 16 bits. By content one dataset."""
    dataset = photos(tmp_path / "d")
    shutil.copy(tmp_path / "d/train/a/0.jpg", tmp_path / "d/test/a/copy.jpg")
    if odd == "broken":
        (tmp_path / "d/train/b/1.png").write_bytes(b"broken")
    else:
        for split in ("train", "test"):
            Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "d" / split / "b/wide.png")
    said, some = [], lambda labels, _: np.array([0, 3])
    for train, test in zip(both(dataset, "train", some), both(dataset, "test", some), strict=True):
        notes = [*train.notes, *test.notes, *overlap.within("source", train, test)]
        told = [note for note in notes if note.kind != "streamed"]
        said.append((told, train[3:6], test[3:6], train.rule, train.rows.tolist(), train.known.tolist()))
        assert test.pixels[np.arange(11)].shape == (11, 3, SIDE, SIDE)
    assert [note.kind for note in notes if note.kind == "streamed"] == ["streamed"] * 2
    assert {note.kind for note in told} == {odd, "test-in-train"}
    assert said[0] == said[1]


def test_a_scale_that_is_known_later_counts_from_then_on(tmp_path, monkeypatch):
    """The images of 8 bits are drawn first; the one of 16 when the rest is looked at."""
    monkeypatch.setattr("dtlctl.data.entry.WHOLE", 0)
    dataset = photos(tmp_path / "d", decode="stream")
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "d/train/b/wide.png")
    drawn = cache.load(Source(dataset), "train", SIDE, wanted=lambda *_: np.array([0, 1]))
    assert len(drawn.pixels[np.array([1])]) == 1
    cache.load(Source(dataset), "train", SIDE)
    assert drawn.pixels[np.array([46])].max() == round(40_000 / 257)


@pytest.mark.parametrize("form", ["parquet", "held out", "builtin"])
def test_every_source_can_be_streamed(tmp_path, form, monkeypatch):
    """Rows of a table are unpacked once, for whoever comes later; of a share, copies are looked for once."""
    dataset = photos(tmp_path / "d")
    if form == "parquet":
        for split in ("train", "test"):
            table = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "d" / split), split="train")
            table.map(lambda row: row).to_parquet(str(tmp_path / "p" / f"{split}.parquet"))
        dataset = Dataset(path=str(tmp_path / "p"))
    elif form == "held out":
        shutil.rmtree(tmp_path / "d/test")
        dataset = photos(tmp_path / "d/train", test=0)
        dataset = Dataset(path=str(tmp_path / "d/train/train"), test=0.2)
    else:
        dataset = Dataset(path="builtin:digits")
    for split in ("train", "test"):
        kept, streamed = both(dataset, split)
        rows = np.arange(len(kept.labels))[:40]
        assert (kept.pixels[rows] == streamed.pixels[rows]).all() and kept.fingerprint == streamed.fingerprint
        if form == "held out":
            monkeypatch.setattr("dtlctl.data.sources.hashlib.blake2b", None)
            again = both(dataset, split)[1]
            assert (again.pixels[rows] == kept.pixels[rows]).all()
            monkeypatch.undo()
            monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))


def test_nothing_but_hashes_is_kept(tmp_path, cache_folder):
    images = cache.load(Source(photos(tmp_path / "d", decode="stream")), "train", 300)
    assert isinstance(images.pixels, Streamed) and images.pixels.shape == (46, 3, 300, 300)
    assert sum(path.stat().st_size for path in cache_folder.rglob("*")) < 20_000


def test_auto_streams_what_would_fill_the_disk(tmp_path, monkeypatch):
    """46 images of 3 x 12 x 12 bytes are 19,872: kept where twice as much is free, and then found without asking."""
    dataset = photos(tmp_path / "d")
    for free, way in ((2 * 19_871, Streamed), (2 * 19_872, Kept)):
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / f"{free}" / "cache"))
        source = Source(dataset)
        assert cache.cached(source, "train", SIDE) is None
        assert type(cache.load(source, "train", SIDE).pixels) is way
        assert type(cache.cached(source, "train", SIDE).pixels) is way


def test_an_image_that_was_changed_since_is_no_part_of_a_batch(tmp_path):
    images = both(photos(tmp_path / "d"))[1]
    Image.new("RGB", (4, 4)).save(tmp_path / "d/train/a/0.jpg")
    assert len(images.pixels[np.array([1])]) == 1
    with pytest.raises(DataError, match=r"a/0\.jpg: the image is not what it was when it was first looked at"):
        images.pixels[np.array([1, 0])]
    (tmp_path / "d/train/a/0.jpg").unlink()
    with pytest.raises(DataError, match=r"a/0\.jpg: No such file"):
        images.pixels[np.array([0])]


PROGRAM = """
import os, signal, sys, time
import numpy as np
from dtlctl.data import cache, dataset, sources
data = dataset.Dataset(path=sys.argv[1], decode="stream")
images = cache.load(sources.Source(data), "train", 8)
images.pixels[np.arange(46)]
others = [process.pid for process in images.pixels._decoders._processes.values()]
"""


def test_a_process_that_was_killed_is_told_and_its_owner_ends(tmp_path):
    photos(tmp_path / "d")
    code = PROGRAM + "for other in others: os.kill(other, signal.SIGKILL)\nimages.pixels[np.arange(46)]"
    command = [sys.executable, "-c", code, tmp_path / "d"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert ended.returncode == 1
    assert "a process that decodes images was killed; is the memory full" in ended.stderr


def test_processes_end_with_their_owner_however_that_ends(tmp_path):
    photos(tmp_path / "d")
    code = PROGRAM + "print(*others, flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "d"], stdout=subprocess.PIPE, text=True) as owner:
        others = [int(word) for word in owner.stdout.readline().split()]
        assert others and all(map(pid_exists, others))
        os.kill(others[0], signal.SIGINT)  # as a terminal sends it to all
        time.sleep(0.2)
        assert pid_exists(others[0])
        owner.kill()
    until = time.monotonic() + 20
    while any(map(pid_exists, others)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(pid_exists, others))
