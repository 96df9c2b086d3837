import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Features, Value
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
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
    for name, split in zip(names, (train, test), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        split.to_parquet(str(folder / name))
    return Dataset(path=str(folder), **recipe)


def test_both_formats_of_arrow_are_read(tmp_path):
    """That of streams, as `datasets` writes it, and that of files."""
    rows = table([0, 1]).data.table
    for name, written in (("train", pyarrow.ipc.new_file), ("test", pyarrow.ipc.new_stream)):
        with written(str(tmp_path / f"{name}.arrow"), rows.schema) as file:
            file.write_table(rows)
    dataset = Dataset(path=str(tmp_path))
    assert [levels(load(dataset, split)) for split in ("train", "test")] == [[0, 1], [0, 1]]


def load(dataset, split="train"):
    return cache.load(Source(dataset, "source"), split, 4)


def levels(images) -> list[int]:
    return images.pixels[:][:, 0, 0, 0].tolist()


def message(dataset, split="train") -> str:
    """The DataError's text, which is one or two lines."""
    with pytest.raises(DataError) as error:
        load(dataset, split)
    assert len(str(error.value).splitlines()) <= 2
    return str(error.value)


# Layouts -----------------------------------------------------------------------------------------------------------


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
    assert "name another split" in message(Dataset(path=dataset.path, test="train"), "test")


TEXT, ROLE = Value("string"), ClassLabel(names=["train", "test"])


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize(("column", "feature", "values", "refused"), [
    ("split", TEXT, ["train", "Test", "train"], True),
    ("Subset", TEXT, ["train", "valid", None], True),
    ("split", ROLE, [0, 1, None], True),
    ("split", TEXT, ["train", "train", "train"], False),  # it says what the file is
    ("caption", TEXT, ["train", "test", "a train"], False),  # of a picture of a train
    ("set", Value("int64"), [1, 2, 3], False),
    ("set", [Value("string")], [["train"], ["test"], []], False),  # of words
])  # fmt: skip
def test_a_table_whose_rows_are_of_several_splits_is_refused(tmp_path, kind, column, feature, values, refused):
    rows, ending = table([0, 1, 1], **{column: (feature, values)}), ".parquet" if kind == "parquet" else ""
    (rows.to_parquet if ending else rows.save_to_disk)(str(tmp_path / f"all{ending}"))
    dataset = Dataset(path=str(tmp_path / f"all{ending}"), label="label")
    if refused:
        said = message(dataset)
        assert f"all{ending}: a table is one split, and its column {column!r} has rows of " in said
        assert f"write a table of each, as train{ending} and test{ending}, or remove the column" in said
        assert "'train'" in said
    else:
        assert load(dataset).labels.tolist() == [0, 1, 1]


def test_nothing_is_shown_and_nothing_is_left_elsewhere(tmp_path, capfd):
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]))
    capfd.readouterr()
    load(dataset)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "d"]
    (entry,) = (tmp_path / "cache").iterdir()
    files = ["hashes.npy", "labels.npy", "meta.json", "pixels.npy", "state.npy"]
    assert sorted(p.name for p in entry.iterdir()) == files


# What cannot be loaded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folders", "files"])
def test_a_missing_split(tmp_path, layout):
    names = {"folders": ("train/0.parquet", "valid/0.parquet"), "files": ("train.parquet", "validation.parquet")}[
        layout
    ]
    valid = Path(names[1]).parts[0].split(".")[0]
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]), names)
    expected = f"data.source.test: {dataset.path} has no split 'test' (splits: train, {valid})"
    assert message(dataset, "test") == f'{expected}; write test = "{valid}" in [data.source]'
    dataset = Dataset(path=dataset.path, test="vallid")
    assert f"no split 'vallid' (splits: train, {valid}); write test = " in message(dataset, "test")
    assert len(load(Dataset(path=dataset.path, test=valid), "test").labels) == 2


def test_the_hub_cache_is_used_offline_but_not_for_another_revision(tmp_path):
    """What `datasets` leaves of owner/name at a commit is OWNER___NAME/CONFIG/VERSION/COMMIT."""
    parquet(tmp_path / "name", table([0, 1, 1]), table([0, 1]))
    datasets.load_dataset(str(tmp_path / "name"), cache_dir=str(tmp_path / "made"))
    (made,) = (path for path in (tmp_path / "made/name").glob("*/*/*") if path.is_dir())
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
    text = message(Dataset(path=dataset.path, image="label"))
    assert text.startswith(f"data.source.image: column 'label' of {dataset.path} is ") and text.endswith(", not images")


@pytest.mark.parametrize(
    ("kind", "train", "test", "classes"),
    [
        ("int64", [30, 7, 30], [7], ("7", "30")),
        ("uint8", [7, 3, 7], [3], ("3", "7")),
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
    text = f"{dataset.path}, split 'test': class '{strange}' is none of the 2 classes of split 'train' ("
    assert message(dataset, "test").startswith(text)


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


@pytest.mark.parametrize(
    ("kind", "values"), [("string", ["a", " ", "nan", "b", "-1"]), ("int64", [3, -100, -1, 7, None])]
)
def test_what_stands_for_no_label_in_text_and_numbers(tmp_path, kind, values):
    dataset = parquet(tmp_path / "d", table(values, Value(kind)), table(values, Value(kind)), label="label")
    images = load(dataset)
    assert (levels(images), images.labels.tolist(), images.dropped) == ([0, 3], [0, 1], 3)


def test_a_class_without_a_training_image(tmp_path):
    kind = ClassLabel(names=["cat", "dog", "emu", "fox"])
    dataset = parquet(tmp_path / "d", table([0, 2, 0], kind), table([0], kind))
    said = f"{dataset.path}, split 'train': class 'dog' and 1 more has no image; add some, or take the name away"
    assert message(dataset) == said
    assert message(dataset, "test") == message(dataset)
    dataset = parquet(tmp_path / "one", table([7, 7, -1], Value("int8")), table([7], Value("int8")), label="label")
    assert message(dataset).endswith("split 'train': only one class, '7', and two are the least")


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
    pyarrow.parquet.write_table(rows.with_format("arrow")[:], tmp_path / "train.parquet")
    dataset = Dataset(path=str(tmp_path / "train.parquet"), image="image", label="label")
    assert message(dataset).startswith(f"{dataset.path}, row 2: {reason}")


def test_pictures_in_plain_columns(tmp_path):
    """A parquet file that another tool wrote says nothing of images or classes."""
    rows = pyarrow.table({"jpg": [png(5)["bytes"], png(6)["bytes"]], "y": ["b", "a"]})
    pyarrow.parquet.write_table(rows, tmp_path / "train.parquet")
    dataset = Dataset(path=str(tmp_path / "train.parquet"), image="jpg", label="y")
    assert "no columns of type Image" in message(Dataset(path=dataset.path))
    images = load(dataset)
    assert (levels(images), images.labels.tolist()) == ([5, 6], [1, 0])
    assert np.ptp(images.pixels[0]) == 0


@pytest.mark.parametrize("kind", ["cells", "text", "arrow"])
def test_images_that_a_table_names_are_known_by_their_files(tmp_path, kind):
    """Rewritten, they are decoded again; a table whose cells hold their images names none."""
    paths = [str(tmp_path / f"{n}.png") for n in range(2)]
    for level, path in enumerate(paths):
        Path(path).write_bytes(png(level)["bytes"])
    feature = datasets.Value("string") if kind == "text" else datasets.Image()
    features = Features({"image": feature, "label": ClassLabel(names=["cat", "dog"])})
    cells = paths if kind == "text" else [{"bytes": None, "path": path} for path in paths]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=features)
    if kind == "arrow":
        import pyarrow as pa

        rows = rows.data.table
        with pa.OSFile(str(tmp_path / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows)
        dataset = Dataset(path=str(tmp_path / "train.arrow"))
    else:
        dataset = parquet(tmp_path / "d", rows, rows, image="image")
    assert levels(load(dataset)) == [0, 1]
    Path(paths[0]).write_bytes(png(9)["bytes"])
    assert levels(load(dataset)) == [9, 1]


def test_a_table_that_holds_its_images_is_not_read_for_its_key(tmp_path, monkeypatch):
    from pyarrow import parquet as files

    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]))
    monkeypatch.setattr(files.ParquetFile, "read", lambda *_, **__: pytest.fail("the table is read"))
    assert cache.cached(Source(dataset), "train", 4) is None


def test_tables_that_make_up_one_split_unasked_are_named(tmp_path):
    """Two files in train/ that no number sorts; numbered ones are shards. A validation split is not used."""
    dataset = parquet(tmp_path / "d", table([0, 1]), table([0, 1]), ("train/a.parquet", "test/a.parquet"))
    table([1, 0]).to_parquet(str(tmp_path / "d/train/b.parquet"))
    table([1, 0]).to_parquet(str(tmp_path / "d/validation.parquet"))
    notes = {note.kind: note.text for note in load(dataset).notes}
    assert "split 'train' is all that 2 files hold: 'a.parquet', 'b.parquet'" in notes["merged-files"]
    assert notes["unused"].endswith(": 'validation.parquet'")
    shards = parquet(tmp_path / "e", table([0, 1]), table([0, 1]), ("train/a-1.parquet", "test/a.parquet"))
    table([1, 0]).to_parquet(str(tmp_path / "e/train/a-2.parquet"))
    assert load(shards).notes == ()
