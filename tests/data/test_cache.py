import errno
import os
import platform
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache, entry
from dtlctl.data.dataset import Dataset
from dtlctl.data.pixels import HASH
from dtlctl.data.sources import Source
from dtlctl.errors import DataError
from dtlctl.storage import lock
from tests.reliability.fork import together

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


def test_an_entry_is_indexed_as_an_array_and_progress_counts_images(tmp_path):
    calls = []
    images = cache.load(Source(image_folder(tmp_path / "d")), "train", 8, progress=lambda *call: calls.append(call))
    assert images.pixels.shape == (2, 3, 8, 8) and images.pixels.dtype == np.uint8
    for key in (1, -1, slice(None), [1, 0], np.array([1]), np.array([False, True]), np.array([[1], [0]])):
        np.testing.assert_array_equal(images.pixels[key], np.asarray(images.pixels)[key])
    assert images.labels.tolist() == [0, 1] and images.labels.dtype == np.int64
    assert images.classes == ("a", "b") and images.dropped == 0
    assert calls == [(2, 2)]


def test_batches_keep_the_order(tmp_path, monkeypatch):
    """Drawn twice, with one image a task and with all in one."""
    dataset = Dataset(path="builtin:digits")
    monkeypatch.setattr(cache, "_BATCH", 1000)
    whole = cache.load(Source(dataset), "test", 8)
    shutil.rmtree(cache.folder())
    monkeypatch.setattr(cache, "_BATCH", 1)
    single = cache.load(Source(dataset), "test", 8)
    assert (single.pixels[:] == whole.pixels[:]).all() and single.fingerprint == whole.fingerprint
    assert len(single.labels) == 797


def test_a_second_load_decodes_nothing(tmp_path, monkeypatch):
    dataset = image_folder(tmp_path / "d")
    assert cache.cached(Source(dataset), "train", 4) is None
    first = cache.load(Source(dataset), "train", 4)

    def never(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(Source, "rows", never)
        for again in (cache.load(Source(dataset), "train", 4), cache.cached(Source(dataset), "train", 4)):
            assert (again.pixels[:] == first.pixels[:]).all() and (again.labels == first.labels).all()
            assert again[2:7] == first[2:7] and (again.known == first.known).all()
        assert cache.cached(Source(dataset), "test", 4) is cache.cached(Source(dataset), "train", 5) is None
    assert cache.load(Source(dataset), "train", 5).pixels.shape == (2, 3, 5, 5)
    assert cache.cached(Source(dataset), "train", 4) is not None


@pytest.mark.parametrize("change", ["add", "rewrite", "remove"])
def test_a_changed_folder_is_decoded_again(tmp_path, change):
    dataset = image_folder(tmp_path / "d")
    (tmp_path / "d/train/b/2.png").write_bytes((tmp_path / "d/train/b/1.png").read_bytes())
    before = cache.load(Source(dataset), "train", 4)
    if change == "remove":
        (tmp_path / "d/train/b/2.png").unlink()
    else:
        plain("lime").save(tmp_path / "d/train/b" / ("3.png" if change == "add" else "2.png"))
    assert cache.cached(Source(dataset), "train", 4) is None
    assert cache.load(Source(dataset), "train", 4).fingerprint != before.fingerprint


def test_the_key_tells_columns_and_splits_apart(tmp_path):
    dataset = image_folder(tmp_path / "d")
    cache.load(Source(dataset), "train", 4)
    assert cache.cached(Source(dataset.model_copy(update={"fraction": 0.5, "augment": "none"})), "train", 4) is not None
    for change in ({"label": "label"}, {"image": "image"}, {"train": "test"}, {"test": "val"}):
        assert cache.cached(Source(dataset.model_copy(update=change)), "train", 4) is None


DAMAGE = {
    "broken meta": lambda entry: (entry / "meta.json").write_text("{"),
    "incomplete meta": lambda entry: (entry / "meta.json").write_text('{"classes": ["a", "b"]}'),
    "short pixels": lambda entry: os.truncate(entry / "pixels.npy", 150),
    "no states": lambda entry: (entry / "state.npy").unlink(),
    "no labels": lambda entry: (entry / "labels.npy").unlink(),
    "fewer labels": lambda entry: np.save(entry / "labels.npy", np.array([0])),
    "pickled labels": lambda entry: np.save(entry / "labels.npy", np.array([{}], object), allow_pickle=True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path, cache_folder, damage):
    dataset = image_folder(tmp_path / "d")
    whole = cache.load(Source(dataset), "train", 4)
    pixels = whole.pixels[:]
    (entry,) = cache_folder.iterdir()
    DAMAGE[damage](entry)
    assert cache.cached(Source(dataset), "train", 4) is None
    again = cache.load(Source(dataset), "train", 4)
    assert (again.pixels[:] == pixels).all() and again.fingerprint == whole.fingerprint
    assert list(cache_folder.iterdir()) == [entry]


def test_the_fingerprint_is_of_the_content(tmp_path):
    one = image_folder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, copy = (cache.load(Source(d), "train", 4) for d in (one, Dataset(path=str(tmp_path / "two"))))
    assert first.fingerprint == copy.fingerprint and len(first.fingerprint) == 64
    others = [
        first.fingerprint,
        cache.load(Source(one), "test", 4).fingerprint,
        cache.load(Source(one), "train", 5).fingerprint,
    ]
    for number, rename in enumerate((("train/b", "train/c"), ("train/a", "train/z"))):
        root = shutil.copytree(tmp_path / "one", tmp_path / f"renamed{number}")
        os.rename(root / rename[0], root / rename[1])
        os.rename(root / rename[0].replace("train", "test"), root / rename[1].replace("train", "test"))
        others.append(cache.load(Source(Dataset(path=str(root))), "train", 4).fingerprint)
    assert len(set(others)) == 5


@pytest.fixture
def large(monkeypatch):
    """No split is small enough to be decoded whole."""
    monkeypatch.setattr(entry, "WHOLE", 0)


def some(*rows: int):
    return lambda labels, classes: np.array(rows)


def grey(root: Path, *values) -> Dataset:
    """Train images of one value each, under two classes in turn; two test images of value 1."""
    for split, all_values in (("train", values), ("test", values[:1] * 2)):
        for number, value in enumerate(all_values):
            path = root / split / "ab"[number * 2 // len(all_values)] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), value)).save(path)
    return Dataset(path=str(root))


def test_only_wanted_images_are_decoded_each_once(large, tmp_path, monkeypatch):
    """A broken image outside of them stops nobody; a view has the same fingerprint whatever else is decoded."""
    dataset = grey(tmp_path / "d", *map(np.uint8, (10, 20, 30, 40)))
    (tmp_path / "d/train/b/3.png").write_bytes(b"broken")
    decoded, decode = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda *a: decoded.append(Path(a[2]).name) or decode(*a))
    first = cache.load(Source(dataset), "train", 4, wanted=some(0, 2))
    assert (decoded, first.rows.tolist(), len(first.labels)) == (["0.png", "2.png"], [0, 2], 4)
    assert first.pixels[:][:, 0, 0, 0].tolist() == [10, 0, 30, 0]
    assert cache.cached(Source(dataset), "train", 4, wanted=some(0, 1)) is None
    second = cache.load(Source(dataset), "train", 4, wanted=some(0, 1))
    assert decoded == ["0.png", "2.png", "1.png"] and second.split == first.split
    assert second.fingerprint != first.fingerprint
    assert cache.cached(Source(dataset), "train", 4, wanted=some(0, 2)).fingerprint == first.fingerprint
    assert len(cache.load(Source(dataset), "test", 4, wanted=some(0, 2)).rows) == 2
    with pytest.raises(DataError, match=r"3\.png: the image cannot be decoded"):
        cache.load(Source(dataset), "train", 4)


def test_a_small_split_is_decoded_whole_but_for_broken_images_that_nobody_wants(tmp_path):
    """4 images, one of them broken, by its path: an error for who wants it."""
    dataset = grey(tmp_path / "d", *map(np.uint8, (10, 20, 30, 40)))
    (tmp_path / "d/train/b/3.png").write_bytes(b"broken")
    images = cache.load(Source(dataset), "train", 4, wanted=some(0, 2))
    assert images.rows.tolist() == [0, 1, 2] and images.pixels[:][:, 0, 0, 0].tolist() == [10, 20, 30, 0]
    assert [(note.kind, note.number) for note in images.notes] == [("broken", 1)]
    assert "b/3.png: the image cannot be decoded" in images.notes[0].text
    again = cache.cached(Source(dataset), "train", 4, wanted=some(1))
    assert (again.fingerprint, again.notes) == (images.fingerprint, images.notes)
    for wanted in (None, some(3)):
        with pytest.raises(DataError, match=r"3\.png: the image cannot be decoded"):
            cache.load(Source(dataset), "train", 4, wanted=wanted)


def test_what_is_not_decoded_takes_no_room_on_the_disk(large, cache_folder):
    """1,000 digits of 3 x 64 x 64 bytes are 12 MB; ten of them 123 kB."""
    cache.load(Source(Dataset(path="builtin:digits")), "train", 64, wanted=lambda labels, _: np.arange(0, 1000, 100))
    (entry,) = cache_folder.iterdir()
    pixels = (entry / "pixels.npy").stat()
    assert pixels.st_size > 12e6 and pixels.st_blocks * 512 < 1e6


def test_one_scale_for_a_split_whatever_is_wanted_of_it(large, tmp_path):
    """Value 1000 alone would be read as 10 bits, 249; the split holds 12 bits, by which its test split is read too."""
    dataset = grey(tmp_path / "d", *map(np.uint16, (1000, 500, 4095, 7)))
    images = cache.load(Source(dataset), "train", 4, wanted=some(0))
    assert images.rule.full == 4095 and images.pixels[0][0, 0, 0] == round(1000 / 4095 * 255) == 62
    assert [note.number for note in images.notes] == [4]
    assert cache.load(Source(dataset), "test", 4, wanted=some(0)).pixels[0][0, 0, 0] == 62


def test_a_test_split_of_more_than_8_bits_is_read_by_the_whole_train_split(large, tmp_path):
    """The wanted training image has 8 bits; another has 16, of which the darker test image alone would say 12."""
    dataset = grey(tmp_path / "d", np.uint8(10), np.uint16(65535), np.uint8(30), np.uint8(4))
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "d/test/b/1.png")
    assert cache.load(Source(dataset), "train", 4, wanted=some(0)).rule.full is None
    assert cache.load(Source(dataset), "test", 4, wanted=some(0)).pixels[1][0, 0, 0] == round(4000 / 257) == 16


def test_a_decode_that_was_stopped_goes_on(tmp_path, monkeypatch):
    dataset = grey(tmp_path / "d", *map(np.uint8, range(10, 18)))
    monkeypatch.setattr(cache, "_BATCH", 1)
    monkeypatch.setattr(entry, "_SAFE", 2)
    monkeypatch.setattr(cache, "cores", lambda: 1)
    decoded, decode = [], cache.decode

    def stopped(*arguments):
        name = Path(arguments[2]).name
        if name == "5.png":
            raise KeyboardInterrupt
        return decode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "decode", stopped)
        cache.load(Source(dataset), "train", 4)
    monkeypatch.setattr(cache, "decode", lambda *a: decoded.append(Path(a[2]).name) or decode(*a))
    assert cache.load(Source(dataset), "train", 4).pixels[:][:, 0, 0, 0].tolist() == [*range(10, 18)]
    assert decoded == ["4.png", "5.png", "6.png", "7.png"]


def test_rows_that_are_others_by_now_are_not_mixed_with_those_of_before(large, tmp_path, monkeypatch):
    """What a hub id without a revision may be."""
    monkeypatch.setattr(Source, "identity", "the same")
    cache.load(Source(grey(tmp_path / "d", *map(np.uint8, (1, 2, 3, 4)))), "train", 4, wanted=some(0))
    with pytest.raises(DataError, match="not what it was when it was first read; remove "):
        cache.load(Source(grey(tmp_path / "e", *map(np.uint8, (1, 2, 3, 4, 5, 6)))), "train", 4)


def test_a_scale_that_another_process_has_decided_meanwhile_holds(tmp_path, monkeypatch):
    """It has seen all images, of which it decoded one before it was killed: what is left would suggest 12 bits."""
    dataset, missing = grey(tmp_path / "d", np.uint16(4000), np.uint16(60000)), entry.Entry.missing

    def overtaken(mine, wanted):
        monkeypatch.setattr(entry.Entry, "missing", missing)
        cache.load(Source(dataset), "train", 4)
        mine.write([(np.array([0]), np.zeros((1, 3, 4, 4), np.uint8), np.zeros(1, HASH), np.zeros(1, np.uint8))])
        return missing(mine, wanted)

    monkeypatch.setattr(entry.Entry, "missing", overtaken)
    images = cache.load(Source(dataset), "train", 4)
    assert images.rule.full == 65535 and images.pixels[:][:, 0, 0, 0].tolist() == [16, 233]


def test_the_winner_of_a_race_is_used(tmp_path, cache_folder, monkeypatch):
    """Another process publishes the same entry between our look and our rename."""
    dataset, rows, theirs = image_folder(tmp_path / "d"), Source.rows, []

    def overtaken(*arguments):
        if not theirs:
            theirs.append(None)
            theirs[0] = cache.load(Source(dataset), "train", 4)
            (entry,) = (p for p in cache_folder.iterdir() if p.suffix != ".tmp")
            theirs.append((entry / "pixels.npy").stat().st_ino)
        return rows(*arguments)

    monkeypatch.setattr(Source, "rows", overtaken)
    ours = cache.load(Source(dataset), "train", 4)
    (entry,) = cache_folder.iterdir()
    assert (entry / "pixels.npy").stat().st_ino == theirs[1]
    assert ours.fingerprint == theirs[0].fingerprint


def test_what_somebody_is_at_work_on_is_not_removed(tmp_path, cache_folder):
    """In another container there is no process of its owner's number, and the machine may have the same name."""
    dataset = image_folder(tmp_path / "d")
    place = cache._place(Source(dataset), "train", 4, False)
    work = place.with_name(f"{place.name}.{platform.node()}.7654321.0.tmp")
    with lock.held(work):
        cache.load(Source(dataset), "train", 4)
        assert work.exists()
    shutil.rmtree(place)
    cache.load(Source(dataset), "train", 4)
    assert list(cache_folder.iterdir()) == [place]


def digits():
    print(cache.load(Source(Dataset(path="builtin:digits")), "train", 16).fingerprint)


def test_two_processes_at_once(cache_folder, tmp_path):
    one, other = together(digits, tmp_path, processes=2).stdout.split()
    assert one == other and len(one) == 64
    assert len(list(cache_folder.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, cache_folder):
    cache_folder.write_text("a file")
    with pytest.raises(DataError, match=f"cannot write the image cache {cache_folder}: .*; set DTLCTL_CACHE"):
        cache.load(Source(Dataset(path="builtin:digits")), "test", 8)


def test_a_full_disk_is_an_error_and_leaves_nothing(cache_folder):
    """A limit on file size stands in for it: 797 x 3 x 16 x 16 bytes are 612 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DataError, match=f"cannot write the image cache {cache_folder}: "):
            cache.load(Source(Dataset(path="builtin:digits")), "test", 16)
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
        images = cache.load(Source(dataset), split, 32)
        assert images.pixels.shape == (20 * each, 3, 32, 32)
        assert np.bincount(images.labels).tolist() == [each] * 20
        assert 90 < images.pixels[:].mean() < 130 and images.pixels[:].std(0).min() > 20


def test_who_reads_the_same_in_one_process_shares_its_open_files(tmp_path):
    """A sweep holds its points' images, and a process may have 1,024 files open."""
    dataset = image_folder(tmp_path / "d")
    kept = [cache.load(Source(dataset), "train", 8)]
    before = len(os.listdir("/proc/self/fd"))
    kept += [cache.load(Source(dataset), "train", 8) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_entry_that_cannot_be_opened_for_too_many_open_files_stays(tmp_path, cache_folder, monkeypatch):
    source = Source(image_folder(tmp_path / "d"))
    cache.load(source, "train", 8)
    before = sorted(cache_folder.rglob("*"))
    entry._read.cache_clear()

    def full(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "load", full)
    with pytest.raises(DataError, match="Too many open files; allow more: ulimit -n"):
        cache.load(source, "train", 8)
    assert sorted(cache_folder.rglob("*")) == before
