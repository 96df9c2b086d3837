"""Webdataset shards: the images and classes of the same folder; what is broken, or is none, is said by its name."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache, webdataset
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.errors import DataError

SIDE = 12


@pytest.fixture(autouse=True)
def hermetic(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))


def picture(level: int, kind: str = "png") -> bytes:
    noise = np.random.default_rng(level).integers(0, 256, (10 + level, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes | str]) -> Path:
    """A tar with a folder before its members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members.items():
            blob = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return path


def samples(labels, kind="cls", start=0) -> dict[str, bytes | str]:
    return {
        f"some/{number:03}.{ext}": blob
        for number, label in enumerate(labels, start)
        for ext, blob in (("PNG", picture(number)), (kind, label))
    }


def load(dataset: Dataset, split="train"):
    return cache.load(Source(dataset, "source"), split, SIDE)


def refused(dataset: Dataset, split="train") -> str:
    with pytest.raises(DataError) as error:
        load(dataset, split)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def named(images) -> list[str]:
    return [images.classes[label] for label in images.labels]


@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_shards_are_the_same_dataset_as_a_folder(tmp_path, decode):
    """Two training shards and a test shard; the folder has its images in the same order within a class."""
    root, names = tmp_path / "shards", ["rose", "daisy", "rose", "daisy", "rose"]
    shard(root / "train-000.tar", samples(names[:3]))
    shard(root / "train-001.tar", samples(names[3:], start=3))
    shard(root / "test-000.tar", samples(["rose", "daisy"], start=5))
    for number, name in enumerate([*names, "rose", "daisy"]):
        path = tmp_path / "folder" / ("train" if number < 5 else "test") / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    for split in ("train", "test"):
        packed = load(Dataset(path=str(root), decode=decode), split)
        plain = load(Dataset(path=str(tmp_path / "folder")), split)
        order = np.argsort(packed.labels, kind="stable")
        assert packed.classes == plain.classes == ("daisy", "rose")
        assert (packed.labels[order] == plain.labels).all()
        assert (packed.pixels[order] == plain.pixels[np.arange(len(order))]).all()
        assert not [note for note in packed.notes if note.kind != "streamed"]


@pytest.mark.parametrize(
    ("kind", "labels", "recipe", "classes"),
    [
        ("cls", ["10", "2", "10"], {}, ["10", "2", "10"]),
        ("cls", ["cat\n", "2", "cat"], {}, ["cat", "2", "cat"]),
        ("cls", ["9" * 5000, "2", "2"], {}, ["9" * 5000, "2", "2"]),
        ("json", ['{"label": 1}', '{"label": 0}', '{"label": 1}'], {}, ["1", "0", "1"]),
        ("cls", ["\ufeffb", "a", "b\r\n"], {}, ["b", "a", "b"]),  # as editors on Windows write
        ("json", ['\ufeff{"label": "b"}', '{"label": "a"}', '{"label": "b"}'], {}, ["b", "a", "b"]),
        ("json", ['{"what": "b"}', '{"what": "a"}', '{"what": "b"}'], {"label": "what"}, ["b", "a", "b"]),
        ("txt", ["b", "a", "b"], {"label": "txt"}, ["b", "a", "b"]),
    ],
)
def test_labels_are_numbers_or_names_from_where_the_recipe_says(tmp_path, kind, labels, recipe, classes):
    shard(tmp_path / "d/train.tar", samples(labels, kind))
    images = load(Dataset(path=str(tmp_path / "d"), **recipe))
    assert named(images) == classes and len(images.classes) == 2
    assert images.classes == (("2", "10") if labels[0] == "10" else tuple(sorted({*classes})))


def test_shards_that_name_their_splits_in_capitals_are_no_single_split(tmp_path):
    shard(tmp_path / "d/Train-0.tar", samples(["a", "b", "a", "b"]))
    shard(tmp_path / "d/Test-0.tar", samples(["a", "b"], start=4))
    said = refused(Dataset(path=str(tmp_path / "d")))
    assert said.endswith("has no split 'train' (splits: Test, Train); write train = \"Train\" in [data.source]")
    assert "splits: Test, Train" in refused(Dataset(path=str(tmp_path / "d"), test=0.5))
    dataset = Dataset(path=str(tmp_path / "d"), train="Train", test="Test")
    assert [len(load(dataset, split).labels) for split in ("train", "test")] == [4, 2]


def test_members_belong_together_by_name_wherever_they_stand(tmp_path):
    """All labels come after all images, as a sorted list by kind has them; the recipe says which image is meant."""
    pictures = {f"{n}.{kind}": picture(n + (kind != "jpg")) for n in range(4) for kind in ("jpg", "mask.png")}
    shard(tmp_path / "d/0.tar", {**pictures, **{f"{n}.cls": "ab"[n % 2] for n in (2, 1, 0, 3)}})
    assert "sample 0 has several images: jpg, mask.png; set data.source.image" in refused(Dataset(path=f"{tmp_path}/d"))
    assert named(load(Dataset(path=str(tmp_path / "d"), image="jpg"))) == ["a", "b", "a", "b"]
    assert len(load(Dataset(path=str(tmp_path / "d"), image="mask.png", test=0.5), "test").labels) == 2


def test_what_has_no_label_or_no_image_is_said_and_counted(tmp_path):
    lone = {"x.cls": "a", "._001.png": picture(1), "README": "text"}
    unlabelled = {"some/9.png": picture(9), "some/10.png": picture(10), "some/10.cls": "-1"}
    unlabelled |= {"some/11.png": picture(11), "some/11.cls": "-2\n"}
    shard(tmp_path / "d/train.tar", {**samples(["a", "b"]), **lone, **unlabelled})
    (tmp_path / "d/notes.txt").write_text("x")
    (tmp_path / "d/._train.tar").write_bytes(b"what macOS knows of the other")
    shard(tmp_path / "d/extra.tar", samples(["a"]))
    images = load(Dataset(path=str(tmp_path / "d")))
    said = {note.kind: (note.number, note.text) for note in images.notes}
    assert named(images) == ["a", "b"] and images.dropped == 3
    assert {kind: number for kind, (number, _) in said.items()} == {
        **{"no-image": 3, "unread": 2, "unlabelled": 3, "unused": 1}
    }
    assert "'._001.png', 'README'" in said["no-image"][1]
    assert said["unread"][1].endswith("beside the shards: 1 hidden (._train.tar), 1 .txt (notes.txt)")
    assert "extra.tar" in said["unused"][1]
    assert "has no split 'test'" in refused(Dataset(path=str(tmp_path / "d")), "test")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda blob: blob[: blob.index(b"some/002.PNG") + 512 + 300], "unexpected end of data"),  # within an image
        (lambda blob: blob[: blob.index(b"some/002.cls") + 512 + 512 + 100], "cut short or broken"),
        (lambda blob: blob.replace(b"some/001.cls", b"some/0Ol.cls"), "cut short or broken"),  # a wrong check sum
        (gzip.compress, ""),
        (lambda blob: b"no tar at all", "truncated header"),
        (lambda blob: b"", "empty file"),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(tmp_path, damage, reason):
    shard(tmp_path / "d/train-0.tar", samples(["a", "b"]))
    other = shard(tmp_path / "d/train-1.tar", samples(["a", "b", "a"]))
    other.write_bytes(damage(other.read_bytes()))
    text = refused(Dataset(path=str(tmp_path / "d")))
    assert f"{other}: the shard cannot be read" in text and reason in text
    assert text.endswith("pack it again, whole and not compressed, or take it out")


def test_a_tar_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """But not beside images, where it is none of the dataset's."""
    file, said = shard(tmp_path / "d/train.tar", samples(["a", "b"])), "Permission denied"

    def forbidden(path):
        raise PermissionError(13, said, str(path))

    monkeypatch.setattr(tarfile, "is_tarfile", forbidden)
    assert refused(Dataset(path=str(tmp_path / "d"))) == f"data.source.path: {file}: {said}"
    for name in "ab":
        (tmp_path / "d/train" / name).mkdir(parents=True)
        (tmp_path / "d/train" / name / "0.png").write_bytes(picture(0))
    assert load(Dataset(path=str(tmp_path / "d"))).classes == ("a", "b")


@pytest.mark.parametrize(
    ("members", "recipe", "message"),
    [
        ({"a/1.png": picture(1), "b/2.png": picture(2)}, {}, "1 .tar (train.tar; unpack it)"),
        ({"1.txt": "a", "1.cls": "1"}, {}, "1 .tar (train.tar; unpack it)"),
        ({**samples(["a", "b"]), "some/000.png": b""}, {}, "'some/000.png' is there twice"),
        (samples(["{", "{"], "json"), {}, "train.tar: 'some/000.json' cannot be read: "),
        (samples(["[]", "1"], "json"), {}, "train.tar: 'some/000.json' cannot be read: "),
        (samples(["[" * 99_999, "1"], "json"), {}, "train.tar: 'some/000.json' cannot be read: "),
        (samples(['{"label": [1]}'], "json"), {}, "has the label [1], which is neither text nor an integer"),
        (samples(['{"kind": 1}'], "json"), {}, "data.source.label: "),
        ({"0.png": b"broken", "0.cls": "a", **samples(["a", "b"])}, {}, "train.tar/0.png: the image cannot be decoded"),
    ],
)
def test_what_is_no_webdataset_or_no_label_is_refused(tmp_path, members, recipe, message):
    shard(tmp_path / "d/train.tar", members)
    assert message in refused(Dataset(path=str(tmp_path / "d"), **recipe))


def test_one_shard_alone_is_asked_for_by_its_folder(tmp_path):
    one = shard(tmp_path / "d/0.tar", samples(["a", "b"]))
    assert refused(Dataset(path=str(one))).endswith("; write the folder that holds it")
    assert named(load(Dataset(path=str(one.parent)))) == ["a", "b"]


def test_headers_are_read_once(tmp_path, monkeypatch):
    """The first shard's tell whether it is a webdataset, and are those of its split."""
    for name in ("test-0.tar", "train-0.tar", "train-1.tar"):
        shard(tmp_path / "d" / name, samples(["a", "b"]))
    read, samples_of = list[str](), webdataset._samples
    monkeypatch.setattr(webdataset, "_samples", lambda path: read.append(path.name) or samples_of(path))
    source = Source(Dataset(path=str(tmp_path / "d")), "source")
    assert [len(source.rows(split, SIDE, None).labels) for split in ("train", "test", "train")] == [4, 2, 4]
    assert sorted(read) == ["test-0.tar", "train-0.tar", "train-1.tar"]


def test_images_are_read_where_they_lie(tmp_path):
    """Fifty megabytes beside the images of a shard never are in memory; neither is a copy of them on the disk."""
    members = {**samples(["a", "b"] * 20), "some/000.npy": bytes(50_000_000)}
    shard(tmp_path / "d/train.tar", members)
    tracemalloc.start()
    images = load(Dataset(path=str(tmp_path / "d"), decode="stream"))
    assert images.pixels[np.arange(40)].shape == (40, 3, SIDE, SIDE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 20_000
    (tmp_path / "d/train.tar").unlink()
    with pytest.raises(DataError, match=r"train\.tar: some/001\.PNG: No such file"):
        images.pixels[np.array([1])]
