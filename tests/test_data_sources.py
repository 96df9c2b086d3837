import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

import datasets
from datasets import ClassLabel, Features, Value
from dtlctl.data import cache
from dtlctl.data.sources import Dataset
from dtlctl.errors import DataError


@pytest.fixture(autouse=True)
def hermetic(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))


def png(level: int) -> dict:
    """An image cell whose picture is a grey square."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table(labels, kind=None, images="image", label="label", **more) -> datasets.Dataset:
    """Row i shows grey level i."""
    kind = kind or ClassLabel(names=["cat", "dog"])
    features = {images: datasets.Image(), label: kind, **{name: f for name, (f, _) in more.items()}}
    columns = {
        images: [png(i) for i in range(len(labels))],
        label: labels,
        **{name: v for name, (_, v) in more.items()},
    }
    return datasets.Dataset.from_dict(columns, features=Features(features))


def parquet(folder: Path, train, test, names=("train.parquet", "test.parquet"), **recipe) -> Dataset:
    for name, split in zip(names, (train, test)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        split.to_parquet(str(folder / name))
    return Dataset(path=str(folder), **recipe)


def load(dataset, split="train"):
    return cache.load(dataset, split, 4, role="source")


def levels(images) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


def message(dataset, split="train") -> str:
    """The DataError's text, which is one or two lines."""
    with pytest.raises(DataError) as error:
        load(dataset, split)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# What a recipe may say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"path": ""}, "path is empty"),
        ({"path": "a\0b"}, "path holds a NUL character"),
        ({"path": "builtin:leters"}, "no builtin dataset 'leters'; did you mean 'letters'? (builtin: letters, greek"),
        ({"path": "builtin:digits", "config": "x"}, "config means nothing for a builtin dataset"),
        ({"path": "builtin:digits", "label": "x"}, "label means nothing for a builtin dataset"),
        ({"path": "builtin:digits", "test": "valid"}, "has the splits train and test, not 'valid'"),
        ({"path": "./x", "revision": "main"}, "config and revision are for hub ids; './x' is local"),
        ({"path": os.sep, "config": "x"}, "config and revision are for hub ids"),
        ({"path": "cifar10"}, "neither a hub id (owner/name) nor a builtin (builtin:letters, "),
        ({"path": "a/b/c"}, "neither a hub id"),
        ({"path": "https://a/b"}, "neither a hub id"),
        ({"path": "owner/.."}, "neither a hub id"),
        ({"path": "o/n", "fraction": 0.0}, "greater than 0"),
        ({"path": "o/n", "fraction": 1.1}, "less than or equal to 1"),
        ({"path": "o/n", "augment": "flip"}, "'none', 'crop' or 'crop-flip'"),
        ({"path": "o/n", "test": ""}, "at least 1 character"),
        ({"path": "o/n", "trust": True}, "Extra inputs are not permitted"),
    ],
)
def test_contradictions_are_refused(table, reason):
    with pytest.raises(ValidationError) as error:
        Dataset(**table)
    assert reason in str(error.value)


def test_a_relative_path_that_exists_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Dataset(path="owner/name", revision="main").revision == "main"
    (tmp_path / "owner/name").mkdir(parents=True)
    with pytest.raises(ValidationError, match="is local"):
        Dataset(path="owner/name", revision="main")


def test_describing_a_dataset_needs_no_heavy_import():
    program = "import sys, dtlctl.data.cache as c; assert not {'torch', 'datasets', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# Layouts -----------------------------------------------------------------------------------------------------------


def test_builtin_is_drawn_the_same_twice():
    first = load(Dataset(path="builtin:digits"))
    shutil.rmtree(cache.folder())
    again = load(Dataset(path="builtin:digits"))
    assert again.fingerprint == first.fingerprint and first.classes == tuple("0123456789")


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("train/test-0.parquet", "test/train-0.parquet"),
    ],
)
def test_parquet_folders(tmp_path, names):
    dataset = parquet(tmp_path / "d", table([0, 1, 1]), table([1, 0]), names)
    train, test = load(dataset), load(dataset, "test")
    assert (levels(train), train.labels.tolist(), train.classes) == ([0, 1, 2], [0, 1, 1], ("cat", "dog"))
    assert (levels(test), test.labels.tolist(), test.classes) == ([0, 1], [1, 0], ("cat", "dog"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_single_file_is_a_train_split(tmp_path, kind):
    rows = table([0, 1])
    if kind == "parquet":
        rows.to_parquet(str(tmp_path / "some.parquet"))
    else:
        rows.save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "some.arrow")
    dataset = Dataset(path=str(tmp_path / f"some.{kind}"))
    assert load(dataset).labels.tolist() == [0, 1]
    assert message(dataset, "test").startswith("data.source.test: ")
    assert load(Dataset(path=dataset.path, test="train"), "test").labels.tolist() == [0, 1]


def image_folder(root: Path, *paths: str) -> Dataset:
    for level, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(png(level)["bytes"])
    return Dataset(path=str(root))


def test_an_image_folder(tmp_path):
    """A class named after a split stays in its own, and unlabelled images beside the splits change nothing."""
    dataset = image_folder(
        tmp_path / "d",
        "train/cat/0.png",
        "train/test-tube/0.png",
        "test/cat/0.png",
        "test/test-tube/0.png",
        "more/0.png",
    )
    train, test = load(dataset), load(dataset, "test")
    assert (levels(train), train.labels.tolist(), train.classes) == ([0, 1], [0, 1], ("cat", "test-tube"))
    assert (levels(test), test.labels.tolist(), test.classes) == ([2, 3], [0, 1], ("cat", "test-tube"))


def test_a_linked_split_is_followed_and_watched(tmp_path):
    image_folder(tmp_path / "real", "cat/0.png", "dog/0.png")
    dataset = image_folder(tmp_path / "d", "test/cat/0.png", "test/dog/0.png")
    (tmp_path / "d/train").symlink_to(tmp_path / "real")
    assert len(load(dataset).labels) == 2
    image_folder(tmp_path / "real", "cat/1.png")
    assert len(load(dataset).labels) == 3


def test_images_of_uneven_depth_have_no_labels(tmp_path):
    dataset = image_folder(tmp_path / "d", "train/cat/0.png", "train/dog/more/0.png", "test/cat/0.png")
    assert "has images but no labels: of a folder, every image must lie at split/class/image" in message(dataset)


def test_an_image_in_both_splits_is_refused(tmp_path):
    dataset = image_folder(tmp_path / "d", "training/cat/0.png", "training/test-tube/0.png", "testing/cat/0.png")
    assert "training/test-tube/0.png would be in both splits, 'train' and 'test'" in message(dataset)


def test_nothing_is_shown_and_nothing_is_left_elsewhere(tmp_path, capfd):
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]))
    capfd.readouterr()
    load(dataset)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "d"]
    (entry,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in entry.iterdir()) == ["labels.npy", "meta.json", "pixels.npy"]


# What cannot be loaded ---------------------------------------------------------------------------------------------


def test_a_missing_path(tmp_path):
    gone = Dataset(path=str(tmp_path / "gone"))
    assert message(gone).startswith(f"data.source.path: {tmp_path}/gone does not exist")
    with pytest.raises(DataError, match="does not exist"):
        cache.cached(gone, "train", 4)


@pytest.mark.parametrize("content", [{}, {"train/notes.txt": b"x"}, {"train.parquet": b"PAR1 or not"}])
def test_a_folder_without_a_dataset(tmp_path, content):
    for name, data in content.items():
        (tmp_path / "d" / name).parent.mkdir(parents=True)
        (tmp_path / "d" / name).write_bytes(data)
    (tmp_path / "d").mkdir(exist_ok=True)
    assert str(tmp_path / "d") in message(Dataset(path=str(tmp_path / "d")))


def test_other_unusable_paths(tmp_path):
    (tmp_path / "d.zip").touch()
    assert "neither a folder nor a .parquet or .arrow file" in message(Dataset(path=str(tmp_path / "d.zip")))
    assert "holds '[', which reads as a pattern" in message(image_folder(tmp_path / "d[1", "train/a/0.png"))
    dataset = image_folder(tmp_path / "d", "train/a/0.png")
    (tmp_path / "d/link").symlink_to("nowhere")
    assert message(dataset) == f"data.source.path: {tmp_path}/d/link: No such file or directory"


@pytest.mark.parametrize("layout", ["folders", "files"])
def test_a_missing_split(tmp_path, layout):
    names = {"folders": ("train/0.parquet", "valid/0.parquet"), "files": ("train.parquet", "validation.parquet")}[
        layout
    ]
    valid = Path(names[1]).parts[0].split(".")[0]
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]), names)
    expected = f"data.source.test: {dataset.path} has no split 'test' (splits: train, {valid})"
    assert message(dataset, "test") == expected
    dataset = Dataset(path=dataset.path, test="vallid")
    assert f"no split 'vallid'; did you mean '{valid}'?" in message(dataset, "test")
    assert len(load(Dataset(path=dataset.path, test=valid), "test").labels) == 2


def test_a_hub_id_out_of_reach_is_one_line():
    text = message(Dataset(path="owner/name"))
    assert text.startswith("data.source.path: owner/name could not be loaded: Couldn't reach") and "\n" not in text
    assert "network" in text and "HF_HUB_OFFLINE" in text


def test_the_hub_cache_is_used_offline_but_not_for_another_revision(tmp_path):
    """What `datasets` leaves of owner/name at a commit is OWNER___NAME/CONFIG/VERSION/COMMIT."""
    parquet(tmp_path / "name", table([0, 1, 1]), table([0, 1]))
    datasets.load_dataset(str(tmp_path / "name"), cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made/name").glob("*/*/*/")
    kept = tmp_path / "hub/owner___name/default/0.0.0" / ("c" * 40)
    shutil.copytree(made, kept)
    assert load(Dataset(path="owner/name")).labels.tolist() == [0, 1, 1]
    assert load(Dataset(path="owner/name", revision="c" * 40)).labels.tolist() == [0, 1, 1]
    text = message(Dataset(path="owner/name", revision="d" * 40))
    assert f"at revision '{'d' * 40}' is out of reach; the copy on disk is of '{'c' * 40}'" in text


# Columns and labels ------------------------------------------------------------------------------------------------


def test_columns_are_guessed_only_from_one_candidate(tmp_path):
    names = ClassLabel(names=["x", "y"])
    rows = table([0, 1], coarse=(names, [1, 0]), mask=(datasets.Image(), [png(9), png(8)]))
    dataset = parquet(tmp_path / "d", rows, rows)
    assert "2 columns of type Image" in message(dataset) and "set data.source.image" in message(dataset)
    dataset = Dataset(path=dataset.path, image="mask")
    text = message(dataset)
    assert "2 columns of type ClassLabel, so the label column cannot be guessed; set data.source.label" in text
    assert "(columns: image, label, coarse, mask)" in text
    images = load(Dataset(path=dataset.path, image="mask", label="coarse"))
    assert (levels(images), images.labels.tolist(), images.classes) == ([9, 8], [1, 0], ("x", "y"))


def test_a_wrong_column_is_named_with_the_nearest(tmp_path):
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]), label="lable")
    expected = f"data.source.label: {dataset.path} has no column 'lable'; did you mean 'label'? (columns: image, label)"
    assert message(dataset) == expected
    assert "has no column 'img'; did you mean 'image'?" in message(Dataset(path=dataset.path, image="img"))
    assert "is not" not in message(Dataset(path=dataset.path, image="label")) and "not images" in message(
        Dataset(path=dataset.path, image="label")
    )


@pytest.mark.parametrize(
    ("kind", "train", "test", "classes"),
    [
        ("int64", [30, 7, 30], [7], ("7", "30")),
        ("uint8", [3, 7, 3], [7], ("3", "7")),
        ("string", ["dog", "cat", "dog"], ["cat"], ("cat", "dog")),
        ("large_string", ["dog", "cat", "dog"], ["cat"], ("cat", "dog")),
    ],
)
def test_plain_labels_are_numbered_by_the_train_split(tmp_path, kind, train, test, classes):
    dataset = parquet(tmp_path / "d", table(train, Value(kind)), table(test, Value(kind)), label="label")
    images, tests = load(dataset), load(dataset, "test")
    assert images.classes == tests.classes == classes
    assert images.labels.tolist() == [1, 0, 1] and tests.labels.tolist() == [0]


@pytest.mark.parametrize(("kind", "train", "strange"), [("string", ["a", "b"], "c"), ("int32", [1, 2], 3)])
def test_a_test_label_unknown_to_training(tmp_path, kind, train, strange):
    dataset = parquet(tmp_path / "d", table(train, Value(kind)), table([train[0], strange], Value(kind)), label="label")
    assert (
        message(dataset, "test") == f"{dataset.path}, split 'test', row 1: label {strange!r} is none of the 2 classes"
    )


def test_labels_that_are_no_classes(tmp_path):
    dataset = parquet(
        tmp_path / "d", table([0.5, 1.5], Value("float32")), table([0.5], Value("float32")), label="label"
    )
    assert "float32" in message(dataset) and "not ClassLabel, integer or text" in message(dataset)


def test_rows_without_a_label_are_dropped_and_counted(tmp_path):
    dataset = parquet(tmp_path / "d", table([0, -1, 1, None, 1]), table([-1, -1]))
    images = load(dataset)
    assert (levels(images), images.labels.tolist(), images.dropped) == ([0, 2, 4], [0, 1, 1], 2)
    assert "split 'test': no row has a label" in message(dataset, "test")


def test_a_class_without_a_training_image(tmp_path):
    kind = ClassLabel(names=["cat", "dog", "emu", "fox"])
    dataset = parquet(tmp_path / "d", table([0, 2, 0], kind), table([0], kind))
    assert message(dataset) == f"{dataset.path}, split 'train': class 'dog' and 1 more has no image"
    assert load(dataset, "test").labels.tolist() == [0]
    dataset = parquet(tmp_path / "one", table([7, 7, -1], Value("int8")), table([7], Value("int8")), label="label")
    assert message(dataset).endswith("split 'train': only one class, ('7',)")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "there is no image"),
        ({"bytes": None, "path": "/no/such.png"}, "/no/such.png: No such file or directory"),
        ({"bytes": b"garbage", "path": None}, "the image cannot be decoded: "),
    ],
)
def test_a_bad_cell_is_named_by_row(tmp_path, cell, reason):
    """Row 1 has no label and is dropped: the number is the row's in the file."""
    features = Features({"image": datasets.Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [png(0), png(1), cell, png(3)], "label": [0, -1, 1, 1]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    dataset = parquet(tmp_path / "d", rows, rows)
    assert message(dataset).startswith(f"{dataset.path}, split 'train', row 2: {reason}")


def test_pictures_in_plain_columns(tmp_path):
    """A parquet file that another tool wrote says nothing of images or classes."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"jpg": [png(5)["bytes"], png(6)["bytes"]], "y": ["b", "a"]})
    pyarrow.parquet.write_table(rows, tmp_path / "train.parquet")
    dataset = Dataset(path=str(tmp_path / "train.parquet"), image="jpg", label="y")
    assert "no columns of type Image" in message(Dataset(path=dataset.path))
    images = load(dataset)
    assert (levels(images), images.labels.tolist()) == ([5, 6], [1, 0])
    assert np.ptp(images.pixels[0]) == 0
