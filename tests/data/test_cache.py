import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain(color, size=4):
    return Image.new("RGB", (size, size), color)


def image_folder(root: Path) -> Dataset:
    """Two classes, an image of its own in each of train and test."""
    for path, color in (("train/a", "red"), ("train/b", "blue"), ("test/a", "lime"), ("test/b", "white")):
        (root / path).mkdir(parents=True)
        plain(color).save(root / path / "1.png")
    return Dataset(path=str(root))


def test_an_entry_is_read_only_arrays_and_progress_counts_images(tmp_path):
    calls = []
    images = cache.load(image_folder(tmp_path / "d"), "train", 8, progress=lambda *call: calls.append(call))
    assert images.pixels.shape == (2, 3, 8, 8) and images.pixels.dtype == np.uint8
    assert isinstance(images.pixels, np.memmap) and not images.pixels.flags.writeable
    assert images.labels.tolist() == [0, 1] and images.labels.dtype == np.int64
    assert images.classes == ("a", "b") and images.dropped == 0
    assert calls == [(2, 2)]


def test_batches_keep_the_order(tmp_path, monkeypatch):
    """Drawn twice, with one image a task and with all in one."""
    dataset = Dataset(path="builtin:digits")
    monkeypatch.setattr(cache, "_BATCH", 1000)
    whole = cache.load(dataset, "test", 8)
    shutil.rmtree(cache.folder())
    monkeypatch.setattr(cache, "_BATCH", 1)
    single = cache.load(dataset, "test", 8)
    assert (single.pixels == whole.pixels).all() and single.fingerprint == whole.fingerprint
    assert len(single.labels) == 797


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch):
    dataset = image_folder(tmp_path / "d")
    assert cache.cached(dataset, "train", 4) is None
    first = cache.load(dataset, "train", 4)

    def never(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(cache, "rows", never)
        for again in (cache.load(dataset, "train", 4), cache.cached(dataset, "train", 4)):
            assert (again.pixels == first.pixels).all() and (again.labels == first.labels).all()
            assert again[2:6] == first[2:6] and (again.hashes == first.hashes).all()
        assert cache.cached(dataset, "test", 4) is cache.cached(dataset, "train", 5) is None
    assert cache.load(dataset, "train", 5).pixels.shape == (2, 3, 5, 5)
    assert cache.cached(dataset, "train", 4) is not None


@pytest.mark.parametrize("change", ["add", "rewrite", "remove"])
def test_a_changed_folder_is_decoded_again(tmp_path, change):
    dataset = image_folder(tmp_path / "d")
    (tmp_path / "d/train/b/2.png").write_bytes((tmp_path / "d/train/b/1.png").read_bytes())
    before = cache.load(dataset, "train", 4)
    if change == "remove":
        (tmp_path / "d/train/b/2.png").unlink()
    else:
        plain("lime").save(tmp_path / "d/train/b" / ("3.png" if change == "add" else "2.png"))
    assert cache.cached(dataset, "train", 4) is None
    assert cache.load(dataset, "train", 4).fingerprint != before.fingerprint


def test_the_key_tells_columns_and_splits_apart(tmp_path):
    dataset = image_folder(tmp_path / "d")
    cache.load(dataset, "train", 4)
    assert cache.cached(dataset.model_copy(update={"fraction": 0.5, "augment": "none"}), "train", 4) is not None
    for change in ({"label": "label"}, {"image": "image"}, {"train": "test"}):
        assert cache.cached(dataset.model_copy(update=change), "train", 4) is None


DAMAGE = {
    "broken meta": lambda entry: (entry / "meta.json").write_text("{"),
    "incomplete meta": lambda entry: (entry / "meta.json").write_text('{"classes": ["a", "b"]}'),
    "short pixels": lambda entry: os.truncate(entry / "pixels.npy", 150),
    "no labels": lambda entry: (entry / "labels.npy").unlink(),
    "fewer labels": lambda entry: np.save(entry / "labels.npy", np.array([0])),
    "pickled labels": lambda entry: np.save(entry / "labels.npy", np.array([{}], object), allow_pickle=True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path, cache_folder, damage):
    dataset = image_folder(tmp_path / "d")
    whole = cache.load(dataset, "train", 4)
    pixels = whole.pixels.copy()
    (entry,) = cache_folder.iterdir()
    DAMAGE[damage](entry)
    assert cache.cached(dataset, "train", 4) is None
    again = cache.load(dataset, "train", 4)
    assert (again.pixels == pixels).all() and again.fingerprint == whole.fingerprint
    assert list(cache_folder.iterdir()) == [entry]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = image_folder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, copy = (cache.load(d, "train", 4) for d in (one, Dataset(path=str(tmp_path / "two"))))
    assert first.fingerprint == copy.fingerprint and len(first.fingerprint) == 64
    others = [first.fingerprint, cache.load(one, "test", 4).fingerprint, cache.load(one, "train", 5).fingerprint]
    for number, rename in enumerate((("train/b", "train/c"), ("train/a", "train/z"))):
        root = shutil.copytree(tmp_path / "one", tmp_path / f"renamed{number}")
        os.rename(root / rename[0], root / rename[1])
        os.rename(root / rename[0].replace("train", "test"), root / rename[1].replace("train", "test"))
        others.append(cache.load(Dataset(path=str(root)), "train", 4).fingerprint)
    assert len(set(others)) == 5


def test_the_winner_of_a_race_is_used(tmp_path, cache_folder, monkeypatch):
    """Another process publishes the same entry between our look and our rename."""
    dataset, rows, theirs = image_folder(tmp_path / "d"), cache.rows, []

    def overtaken(*arguments):
        if not theirs:
            theirs.append(None)
            theirs[0] = cache.load(dataset, "train", 4)
            (entry,) = (p for p in cache_folder.iterdir() if p.suffix != ".tmp")
            theirs.append((entry / "pixels.npy").stat().st_ino)
        return rows(*arguments)

    monkeypatch.setattr(cache, "rows", overtaken)
    ours = cache.load(dataset, "train", 4)
    (entry,) = cache_folder.iterdir()
    assert (entry / "pixels.npy").stat().st_ino == theirs[1]
    assert ours.fingerprint == theirs[0].fingerprint


def test_two_processes_at_once(cache_folder):
    program = (
        "from dtlctl.data import cache, dataset\n"
        "print(cache.load(dataset.Dataset(path='builtin:digits'), 'train', 16).fingerprint)"
    )
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (process.communicate(timeout=120)[0] for process in both)
    assert one == other and len(one.strip()) == 64
    assert len(list(cache_folder.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, cache_folder):
    cache_folder.write_text("a file")
    with pytest.raises(DataError, match=f"cannot write the image cache {cache_folder}: .*; set DTLCTL_CACHE"):
        cache.load(Dataset(path="builtin:digits"), "test", 8)


def test_a_full_disk_is_an_error_and_leaves_nothing(cache_folder):
    """A limit on file size stands in for it: 797 x 3 x 16 x 16 bytes are 612 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DataError, match=f"cannot write the image cache {cache_folder}: "):
            cache.load(Dataset(path="builtin:digits"), "test", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache_folder.iterdir()) == []


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("DTLCTL_CACHE", "/y")
    assert cache.folder() == Path("/y")
    monkeypatch.delenv("DTLCTL_CACHE")
    assert cache.folder() == Path("/x/dtlctl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "dtlctl"


@pytest.mark.skipif(not SHARED.exists(), reason="the evaluation data is not beside this checkout")
def test_real_data():
    """20 classes with 100 training and 50 test images each."""
    dataset = Dataset(path=str(SHARED / "tin20b"))
    for split, each in (("train", 100), ("test", 50)):
        images = cache.load(dataset, split, 32)
        assert images.pixels.shape == (20 * each, 3, 32, 32)
        assert np.bincount(images.labels).tolist() == [each] * 20
        assert 90 < images.pixels.mean() < 130 and images.pixels.std(0).min() > 20
