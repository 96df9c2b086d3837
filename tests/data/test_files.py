"""Folders of images as people have them: all of it is read, said or refused."""

import io
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache, files
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.errors import DataError


@pytest.fixture(autouse=True)
def hermetic(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(level: int = 0, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(file, kind)
    return file.getvalue()


BASE = ("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png")


def folder(root: Path, *paths: str, **content: bytes) -> Dataset:
    """Image n of `paths` is grey level n; `content` maps other paths to bytes, "__" for "/"."""
    blobs = {path: picture(level) for level, path in enumerate(paths)} | content
    for path, blob in blobs.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(blob)
    return Dataset(path=str(root))


def load(dataset, split="train"):
    return cache.load(Source(dataset, "source"), split, 4)


def seen(images) -> list[tuple[int, str]]:
    """(grey level, class) of every image."""
    return [(int(x[0, 0, 0]), images.classes[y]) for x, y in zip(images.pixels, images.labels, strict=True)]


def notes(images) -> dict[str, tuple[int, str]]:
    return {note.kind: (note.number, note.text) for note in images.notes}


def refused(dataset, split="train") -> str:
    with pytest.raises(DataError) as error:
        load(dataset, split)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and "generating the dataset" not in text and "BytesIO" not in text
    return text


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_not_read_is_counted_by_kind(tmp_path):
    more = {
        "train/cat/a.heic": b"\0\0\0\x18ftypheic",
        "train/cat/b.HEIC": b"\0\0\0\x18ftypheic",
        "train/dog/notes.txt": b"BM is no bitmap here",
        "train/dog/README": b"x",
        "train/dog/.hidden.png": picture(),
        "train/.more/7.png": picture(),
        "train/dog/old.zip": b"PK",
        "train/dog/Thumbs.db": b"x",
        "train/.DS_Store": b"x",
    }
    dataset = folder(tmp_path / "d", *BASE, **more)
    images = load(dataset)
    assert seen(images) == [(0, "cat"), (1, "dog")]
    number, text = notes(images)["unread"]
    assert number == 7
    assert "2 hidden (train/.more/7.png), 2 .heic (train/cat/a.heic; pip install pillow-heif)" in text
    assert "1 .txt (train/dog/notes.txt)" in text and "1 without suffix (train/dog/README)" in text
    assert "1 .zip (train/dog/old.zip; unpack it)" in text and "Thumbs" not in text
    assert load(dataset, "test").notes == ()


def test_notes_on_files_whose_names_are_no_text_can_be_written(tmp_path):
    r"""A Latin-1 name and one with a line end: all of a note is UTF-8, in a line. Python has the byte E9 as U+DCE9."""
    odd = {"train/cat/caf\udce9.t\udce9": b"x", "train/dog/a\nb.txt": b"x", "train/dog/\udce9.png": b"broken"}
    try:
        dataset = folder(tmp_path / "d", *BASE, "train/dog/2.png", **odd)
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    images = cache.load(Source(dataset), "train", 4, wanted=lambda labels, _: np.array([0, 1]))
    assert sorted(notes(images)) == ["broken", "unread"] and len(images.rows) == 3
    for _, text in notes(images).values():
        assert text.encode() and len(text.splitlines()) == 1


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    dataset = folder(tmp_path / "d", *BASE)
    os.mkfifo(tmp_path / "d/train/cat/pipe.png")
    assert "d/train/cat/pipe.png is a pipe, a socket or a device; move it away" in refused(dataset)


@pytest.mark.parametrize("name", ["x.PNG", "x.Png", "x.JPG", "x.jpeg", "x.jfif", "x.avif", "x.webp"])
def test_suffixes_of_any_case_are_read_without_a_word(tmp_path, name):
    kind = {"PNG": "png", "Png": "png", "avif": "avif", "webp": "webp"}.get(name[2:], "jpeg")
    if kind == "avif" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    images = load(folder(tmp_path / "d", *BASE, **{f"train/dog/{name}": picture(9, kind)}))
    assert len(images.labels) == 3 and images.notes == ()


@pytest.mark.parametrize("name", ["7", "7.dat", "7.png.bak"])
def test_an_image_by_content_is_read_and_said(tmp_path, name):
    images = load(folder(tmp_path / "d", *BASE, **{f"train/dog/{name}": picture(7)}))
    assert (7, "dog") in seen(images)
    number, text = notes(images)["by-content"]
    assert number == 1 and f"(train/dog/{name})" in text


def test_class_folders_whose_files_cannot_be_read_are_said_and_left_out(tmp_path):
    """In either split or both; a class that the test split alone has images of is refused."""
    lost = {"train/emu/1.heic": b"no image", "test/emu/1.heic": b"no image"}
    (tmp_path / "d/train/fox").mkdir(parents=True)
    dataset = folder(tmp_path / "d", *BASE, **lost)
    for split, names in (("train", "'emu', 'fox'"), ("test", "'emu'")):
        images = load(dataset, split)
        assert images.classes == ("cat", "dog")
        number, text = notes(images)["empty-folders"]
        assert number == len(names.split(",")) and text.endswith(f"image that can be read: {names}")
        assert f"{split}/emu/1.heic; pip install" in notes(images)["unread"][1]
    dataset = folder(tmp_path / "e", *BASE, **{"train/emu/1.heic": b"no image", "test/emu/1.png": picture()})
    assert "class 'emu' is none of the 2 classes" in refused(dataset, "test")


def test_a_class_folder_without_test_images_is_said(tmp_path):
    dataset = folder(tmp_path / "d", *BASE, **{"train/emu/1.png": picture(), "test/emu/1.txt": b"x"})
    images = load(dataset, "test")
    assert notes(images)["empty-classes"][1].endswith("no image of class 'emu'") and notes(images)["unread"][0] == 1


def test_folders_that_the_library_skips_are_classes(tmp_path):
    dataset = folder(tmp_path / "d", "train/__cat__/0.png", "train/dog[1]/1.png", "test/__cat__/2.png")
    assert seen(load(dataset)) == [(0, "__cat__"), (1, "dog[1]")]


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "it is empty; replace or remove it"),
        (b"\xff\xd8\xff", "it is a JPEG that is cut short or broken; replace or remove it"),
        (b"\0\0\0\x18ftypheic", "it is HEIF or AVIF; pip install pillow-heif, or -U pillow for AVIF"),
        (b"<html>", "it is no image of a known format (it begins with b'<html>'); replace or remove it"),
    ],
)
def test_a_broken_image_is_named_by_its_path(tmp_path, blob, says):
    dataset = folder(tmp_path / "d", *BASE, **{"train/dog/bad.jpg": blob})
    assert refused(dataset) == f"{dataset.path}/train/dog/bad.jpg: the image cannot be decoded: {says}"


def test_the_key_knows_which_formats_can_be_read(tmp_path, monkeypatch):
    dataset = folder(tmp_path / "d", *BASE)
    load(dataset)
    monkeypatch.setattr(files, "formats", lambda: ("PNG", "HEIF"))
    assert cache.cached(Source(dataset), "train", 4) is None


# Layouts -------------------------------------------------------------------------------------------------------------


def test_classes_without_splits_are_the_train_split(tmp_path):
    dataset = folder(tmp_path / "d", "cat/0.png", "dog/1.png")
    assert seen(load(dataset)) == [(0, "cat"), (1, "dog")]
    assert "so there is no 'test'; write test = 0.2 to hold out a part of" in refused(dataset, "test")


@pytest.mark.parametrize(
    ("paths", "split", "says"),
    [
        (["Train/a/0.png", "val/a/0.png"], "train", '(splits: Train, val); write train = "Train" in [data.source]'),
        (["Train/a/0.png", "val/a/0.png"], "test", '(splits: Train, val); write test = "val" in [data.source]'),
        (["train/a/0.png", "train/b/0.png", "Test/a/0.png"], "test", '(splits: Test, train); write test = "Test"'),
        (["train/a/0.png", "validation/a/0.png"], "test", '(splits: train, validation); write test = "validation"'),
        (["Train/0.png", "Valid/0.png"], "train", '(splits: Train, Valid); write train = "Train"'),
        (["one/a/0.png", "two/a/0.png"], "train", "has no split 'train' (splits: one, two)"),
        (["train/0.png", "test/0.png"], "train", "train/0.png has no class: every image must lie at SPLIT/CLASS/image"),
        (["0.png", "1.png"], "train", "0.png has no class: every image must lie at SPLIT/CLASS/image"),
        (["train/a/b/0.png", "test/a/0.png"], "train", "train/a/b/0.png has no class"),
    ],
)
def test_other_layouts_are_told_what_to_do(tmp_path, paths, split, says):
    assert says in refused(folder(tmp_path / "d", *paths), split)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"images.zip": b"PK"}, "holds no image and no table: 1 .zip (images.zip; unpack it)"),
        ({"train.tar.gz": b"x"}, "holds no image and no table: 1 .gz (train.tar.gz; unpack it)"),
        ({"train/x.tar": b"x", "test/x.tar": b"x"}, "no image can be read: 1 .tar (train/x.tar; unpack it)"),
        ({"train.npz": b"x"}, "holds no image and no table: 1 .npz (train.npz)"),
        ({}, "holds no image and no table"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, says):
    (tmp_path / "d").mkdir()
    assert says in refused(folder(tmp_path / "d", **content))


def test_a_real_archive_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("train/cat/0.png", picture())
    assert refused(Dataset(path=str(tmp_path / "d.zip"))).endswith(": 1 .zip (d.zip; unpack it)")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "semicolon"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_list_of_files_and_labels(tmp_path, kind, inside):
    """Beside the images, or above the folder of the split."""
    rows = [("img/0.png", "dog"), ("img/1.png", "cat"), ("img/2.png", "")]
    separator = {"tsv": "\t", "semicolon": ";"}.get(kind, ",")
    lines = [separator.join(("file_name", "label")), *(separator.join(row) for row in rows)]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f, "label": label}) for f, label in rows]
    suffix = "csv" if kind == "semicolon" else kind
    name = f"train/metadata.{suffix}" if inside else f"train.{suffix}"
    text = "\ufeff" + "\r\n".join(lines)
    paths = [f"train/img/{n}.png" for n in range(4)]
    dataset = folder(tmp_path / "d", *paths, **{name: text.encode()})
    images = load(dataset)
    assert seen(images) == [(0, "dog"), (1, "cat")] and images.classes == ("cat", "dog")
    assert notes(images)["unlabelled"][0] == 1
    number, said = notes(images)["unread"]
    assert number == 1 and "1 .png (train/img/3.png)" in said


def test_two_lists_share_a_folder_of_images(tmp_path):
    """Each may have a column that names its own split."""
    train = b"path,class,x\nimg/0.png,b,train\nimg/1.png,a,train\n"
    lists = {"train.csv": train, "test.csv": b"path,class\nimg/2.png,b\n"}
    dataset = folder(tmp_path / "d", "img/0.png", "img/1.png", "img/2.png", **lists)
    train, test = load(dataset), load(dataset, "test")
    assert seen(train) == [(0, "b"), (1, "a")] and seen(test) == [(2, "b")]
    assert train.notes == () and [*notes(test)] == ["empty-classes"]


def test_lists_divide_the_images_of_class_folders(tmp_path):
    """The folders agree with the labels, but not with the splits."""
    lists = {"train.csv": b"file_name,label\na/0.png,a\nb/1.png,b\n", "test.csv": b"file_name,label\na/2.png,a\n"}
    dataset = folder(tmp_path / "d", "a/0.png", "b/1.png", "a/2.png", "b/3.png", **lists)
    train, test = load(dataset), load(dataset, "test")
    assert seen(train) == [(0, "a"), (1, "b")] and seen(test) == [(2, "a")]
    assert notes(train)["unread"][1].endswith(": not read: 1 .png (b/3.png)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"file_name,label\nno.png,a\n", "d/train.csv: 'no.png' is no file in "),
        (b"file_name,label\n../../x.png,a\n", "'../../x.png' is no file in "),
        (b"file_name,label\n0.png,a\n0.png,b\n", "'0.png' is named twice"),
        (b"file_name,text\n0.png,a\n", "has no single column named label or class; set data.source.label (columns: "),
        (b"id,label\n0.png,a\n", "has no single column named file_name or filename or"),
        (b"file_name,label\n", "has no rows"),
        (b"file_name,label\n0.png,a,b\n", "the row of '0.png' has more fields than the header"),
        (b"file_name,label,label\n0.png,a,b\n1.png,b,a\n", "(columns: file_name, label, label)"),
        (b"file_name,label,split\n0.png,a,train\n1.png,b,Test\n", "its column 'split' has rows of 'Test', 'train'; "),
        (b"\xff\xfe\x00", "it is not UTF-8; save it as UTF-8"),
        (b"file_name,label\n0.png,\xe9\n", "it is not UTF-8; save it as UTF-8"),
    ],
)
def test_a_wrong_list_is_named(tmp_path, text, says):
    assert says in refused(folder(tmp_path / "d", "0.png", "1.png", **{"train.csv": text}))


def test_all_missing_files_of_a_list_are_named_at_once(tmp_path):
    """Who has to mend a list should not have to begin again for each."""
    text = "file_name,label\n0.png,a\nK\u00e4fer.png,a\nno.png,b\n".encode()
    said = refused(folder(tmp_path / "d", "0.png", **{"train.csv": text}))
    assert said.startswith(
        f"{tmp_path}/d/train.csv: 'K\u00e4fer.png' is no file in {tmp_path}/d; add it, or remove its row"
    )
    assert said.endswith("; 1 more: 'no.png'")
    many = "".join(f"{number}.png,a\n" for number in range(30)).encode()
    said = refused(folder(tmp_path / "many", "0.png", **{"train.csv": b"file_name,label\n" + many}))
    assert "'1.png' is no file in " in said and said.endswith("; 28 more: " + said.partition(" more: ")[2])
    assert said.endswith("'21.png' and 8 more")


def test_a_listed_file_that_is_there_in_another_unicode_form_is_no_riddle(tmp_path):
    """A Mac's archive has the umlaut as two code points, where a table has one: both print the same."""
    text = "file_name,label\nimg/K\u00e4fer.png,a\n".encode()
    said = refused(folder(tmp_path / "d", "img/Ka\u0308fer.png", **{"train.csv": text}))
    assert said.endswith(r" (img/Ka\u0308fer.png) is there: write it as it is spelt there")


@pytest.mark.parametrize(
    ("written", "remedy"),
    [
        ("0.png", "'img/0.png' is there: write its folder too"),
        ("img/0.PNG", "'img/0.png' is there: write it as it is spelt there"),
        ("img/0", "'img/0.png' is there: write its suffix too"),
    ],
)
def test_a_listed_file_that_is_there_in_another_way_is_told(tmp_path, written, remedy):
    said = refused(folder(tmp_path / "d", "img/0.png", **{"train.csv": f"path,class\n{written},a\n".encode()}))
    assert said.endswith(f"add it, or remove its row; {remedy}")


def test_a_list_of_too_many_brackets_is_named(tmp_path):
    said = refused(folder(tmp_path / "d", "0.png", **{"train.jsonl": b"[" * 99_999}))
    assert f"{tmp_path}/d/train.jsonl: cannot be read: " in said


def test_a_list_with_the_line_ends_of_old_macs_is_read(tmp_path):
    text = b"file_name,label\r0.png,a\r1.png,b\r"
    assert seen(load(folder(tmp_path / "d", "0.png", "1.png", **{"train.csv": text}))) == [(0, "a"), (1, "b")]


def saved(names=("cat", "dog")) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    cells = [{"bytes": picture(n), "path": None} for n in range(2)]
    return datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)


def test_what_save_to_disk_wrote_is_read(tmp_path):
    splits = datasets.DatasetDict(train=saved(), test=saved(("dog", "cat")).with_format("numpy"))
    splits.save_to_disk(str(tmp_path / "both"))
    before = sorted(tmp_path.rglob("*"))
    dataset = Dataset(path=str(tmp_path / "both"))
    assert seen(load(dataset)) == [(0, "cat"), (1, "dog")] and seen(load(dataset, "test")) == [(0, "dog"), (1, "cat")]
    assert [p for p in sorted(tmp_path.rglob("*")) if (tmp_path / "cache") not in (p, *p.parents)] == before
    saved().save_to_disk(str(tmp_path / "one"))
    one = Dataset(path=str(tmp_path / "one"))
    assert seen(load(one)) == [(0, "cat"), (1, "dog")]
    assert "has no split 'test' (splits: train)" in refused(one, "test")
    (tmp_path / "one/state.json").write_text("{}")
    assert refused(one).startswith(f"data.source.path: {one.path} could not be loaded: ")


def test_a_row_is_named_by_its_file(tmp_path, capfd):
    """Row 3 of the split is row 1 of the second file."""
    root = tmp_path / "d/train"
    root.mkdir(parents=True)
    saved().to_parquet(str(root / "a.parquet"))
    rows = saved().cast_column("image", datasets.Image(decode=False))
    rows = rows.map(lambda row, n: {"image": {"bytes": b"" if n else picture(), "path": None}}, with_indices=True)
    rows.to_parquet(str(root / "b.parquet"))
    capfd.readouterr()
    text = refused(Dataset(path=str(tmp_path / "d")))
    assert text == f"{root}/b.parquet, row 1: the image cannot be decoded: it is empty; replace or remove it"
    (root / "b.parquet").write_bytes(b"PAR1 or not")
    text = refused(Dataset(path=str(tmp_path / "d")))
    assert "could not be loaded" in text and "arquet" in text
    assert capfd.readouterr() == ("", "")


def test_files_beside_tables_are_said(tmp_path):
    for name in ("train", "test", "more"):
        (tmp_path / "d").mkdir(exist_ok=True)
        saved().to_parquet(str(tmp_path / f"d/{name}.parquet"))
    images = load(folder(tmp_path / "d", "x.png"))
    number, text = notes(images)["unread"]
    assert number == 2 and "1 .parquet (more.parquet)" in text and "1 .png (x.png)" in text


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_files_of_a_split_name_their_classes_alike(tmp_path, suffix):
    (tmp_path / "d/train").mkdir(parents=True)
    for name, classes in (("a", ("cat", "dog")), ("b", ("dog", "cat"))):
        path = tmp_path / f"d/train/{name}.{suffix}"
        if suffix == "parquet":
            saved(classes).to_parquet(str(path))
        else:
            saved(classes).save_to_disk(str(tmp_path / name))
            (tmp_path / name / "data-00000-of-00001.arrow").rename(path)
    assert f"b.{suffix}: other class names, or in another order" in refused(Dataset(path=str(tmp_path / "d")))


def test_a_table_in_both_splits_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    saved().to_parquet(str(tmp_path / "d/train-test.parquet"))
    assert "d/train-test.parquet would be in both splits" in refused(Dataset(path=str(tmp_path / "d")))


def test_a_linked_folder_of_tables_is_read_without_a_word(tmp_path):
    (tmp_path / "d").mkdir()
    saved().to_parquet(str(tmp_path / "d/train.parquet"))
    (tmp_path / "link").symlink_to(tmp_path / "d")
    assert load(Dataset(path=str(tmp_path / "link"))).notes == ()


def test_a_link_in_a_circle_is_named(tmp_path):
    dataset = folder(tmp_path / "d", *BASE)
    (tmp_path / "d/train/up").symlink_to("..")
    assert refused(dataset) == f"data.source.path: {dataset.path}/train/up links to a folder that it lies in"


def test_a_link_to_nothing_is_named(tmp_path):
    dataset = folder(tmp_path / "d", *BASE)
    (tmp_path / "d/train/cat/9.png").symlink_to("gone.png")
    assert refused(dataset) == f"data.source.path: {dataset.path}/train/cat/9.png: links to nothing; remove it"


def test_a_link_to_a_folder_whose_name_begins_alike_is_followed(tmp_path):
    folder(tmp_path / "train", "cat/0.png", "dog/1.png")
    dataset = folder(tmp_path / "trains", "test/cat/0.png")
    (tmp_path / "trains/train").symlink_to(tmp_path / "train")
    assert seen(load(dataset)) == [(0, "cat"), (1, "dog")]


def test_a_class_that_is_not_utf_8_is_refused(tmp_path):
    dataset = folder(tmp_path / "d", *BASE)
    try:
        (tmp_path / "d/train/dog").rename(tmp_path / "d/train/d\udce9g")
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    assert r"the name of class 'd\udce9g' is not UTF-8" in refused(dataset)


def test_a_list_as_a_path_is_told_what_to_do(tmp_path):
    dataset = folder(tmp_path / "d", "0.png", **{"train.csv": b"file_name,label\n0.png,a\n"})
    assert refused(Dataset(path=f"{dataset.path}/train.csv")).endswith("write the folder that holds it")


@pytest.mark.parametrize("place", ["train.csv", "train/list.csv"])
def test_class_folders_and_a_list_of_other_classes_are_refused(tmp_path, place):
    text = "file_name,label\ntrain/cat/0.png,x\ntrain/dog/1.png,x\n" if place == "train.csv" else (
        "file_name,label\ncat/0.png,x\ndog/1.png,x\n"
    )  # fmt: skip
    dataset = folder(tmp_path / "photos", *BASE, **{place: text.encode()})
    assert f"{place}: its labels divide the images otherwise than the class folders beside it" in refused(dataset)


@pytest.mark.parametrize(
    "text", ["file_name,label\ntrain/cat/0.png,Katze\ntrain/dog/1.png,Hund\n", "taken,camera\n2024,x\n"]
)
def test_a_list_of_the_same_classes_or_of_none_is_said_beside_class_folders(tmp_path, text):
    images = load(folder(tmp_path / "photos", *BASE, **{"train.csv": text.encode()}))
    assert images.classes == ("cat", "dog")
    assert notes(images)["unread"][1].endswith("not read: 1 .csv (train.csv)")


def test_two_lists_of_one_split_are_refused(tmp_path):
    lists = {"train.csv": b"file_name,label\n0.png,a\n1.png,b\n", "train.jsonl": b"{}"}
    assert " is a list of the same split; move" in refused(folder(tmp_path / "photos", "0.png", "1.png", **lists))


def test_a_label_as_number_and_as_text_is_refused(tmp_path):
    rows = (
        '"file_name": "0.png", "label": 1',
        '"file_name": "1.png", "label": "1"',
        '"file_name": "2.png", "label": 2',
    )
    content = "\n".join(f"{{{row}}}" for row in rows).encode()
    dataset = folder(tmp_path / "d", "0.png", "1.png", "2.png", **{"train.jsonl": content})
    assert "train.jsonl: the label 1 is there as a number and as text; write it in one way" in refused(dataset)


def test_numbers_that_are_written_otherwise_are_classes_that_look_alike(tmp_path):
    rows = b"file_name,label\n0.png,1\n1.png,01\n2.png,1.0\n3.png,10\n"
    dataset = folder(tmp_path / "d", *(f"{n}.png" for n in range(4)), **{"train.csv": rows})
    number, text = notes(load(dataset))["alike"]
    assert number == 3 and "'01', '1', '1.0'" in text


def test_a_text_none_and_no_label_stand_in_one_list(tmp_path):
    """And text of JSON may hold U+2028, which Python takes for the end of a line; other columns may hold anything."""
    labels = ["None", None, "a\u2028b"]
    rows = ({"file_name": f"{n}.png", "label": label, "box": [n]} for n, label in enumerate(labels))
    content = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    images = load(folder(tmp_path / "d", "0.png", "1.png", "2.png", **{"train.jsonl": content}))
    assert seen(images) == [(0, "None"), (2, "a\u2028b")] and images.dropped == 1


def test_splits_that_the_recipe_does_not_use_are_named(tmp_path):
    """Folders and a list; a folder of images that lists name is none, and neither is one without images."""
    dataset = folder(tmp_path / "d", *BASE, "train2/cat/7.png", "val/cat/8.png", **{"docs/x.txt": b"x"})
    number, text = notes(load(dataset))["unused"]
    assert number == 2 and text.endswith(": not used, as neither split of the recipe: 'train2', 'val'")
    _, text = notes(load(dataset.model_copy(update={"test": "val"})))["unused"]  # not as it was said for the other test
    assert text.endswith(": 'test', 'train2'")
    _, text = notes(load(folder(tmp_path / "f", *BASE, "x.png", **{"notes.txt": b"x"})))["unused"]
    assert text.endswith(": 'x.png'")
    lists = {f"{name}.csv": b"file_name,label\nimg/0.png,a\nimg/1.png,b\n" for name in ("train", "old")}
    number, text = notes(load(folder(tmp_path / "e", "img/0.png", "img/1.png", **lists)))["unused"]
    assert number == 1 and text.endswith(": 'old'")


@pytest.mark.parametrize(
    ("paths", "more", "says"),
    [
        (["test/a/0.png", "test/b/0.png"], {"train.zip": b"PK"}, "/d/train.zip is an archive; unpack it"),
        (["test/a/0.png"], {"train.tar.gz": b"x"}, "/d/train.tar.gz is an archive; unpack it"),
        (["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"], {}, "holds CLASS/SPLIT/image, as in cat/test; move"),
        (
            [],
            {"train.csv": "file_name,label\n0.png,a\n".encode("utf-16")},
            "train.csv: it is not UTF-8; save it as UTF-8",
        ),
        (["0.png"], {"train.csv": b"file_name, label\n0.png,a\n"}, "the column ' label' has blanks around its name"),
    ],
)
def test_what_is_nearly_right_is_told_in_a_line(tmp_path, paths, more, says):
    assert says in refused(folder(tmp_path / "d", *paths, **more))
