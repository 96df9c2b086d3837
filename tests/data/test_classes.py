"""Labels of two splits are matched by the names of their classes."""

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, Value
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.errors import DataError

NFC, NFD, CYRILLIC = "caf\u00e9", "cafe\u0301", "c\u0430t"


@pytest.fixture(autouse=True)
def hermetic(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def parquet(folder, train, test, label="label") -> Dataset:
    """`train` and `test` are (labels, type of the label column); a list of names is a ClassLabel."""
    folder.mkdir()
    for name, (labels, kind) in (("train", train), ("test", test)):
        label_type = ClassLabel(names=kind) if isinstance(kind, list) else Value(kind)
        columns = {"image": [Image.new("RGB", (4, 4), (n,) * 3) for n in range(len(labels))], "label": labels}
        rows = datasets.Dataset.from_dict(columns, features=Features({"image": datasets.Image(), "label": label_type}))
        rows.to_parquet(str(folder / f"{name}.parquet"))
    return Dataset(path=str(folder), label=label)


def folders(root, **classes) -> Dataset:
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(root / split / name / "0.png")
    return Dataset(path=str(root))


def load(dataset, split="train"):
    return cache.load(Source(dataset, "source"), split, 4)


def notes(images) -> dict[str, tuple[int, str]]:
    return {note.kind: (note.number, note.text) for note in images.notes}


def refused(dataset, split="test") -> str:
    with pytest.raises(DataError) as error:
        load(dataset, split)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_names_in_another_order_are_matched_by_name(tmp_path):
    dataset = parquet(tmp_path / "d", ([0, 1, 1], ["cat", "dog"]), ([0, 0, 1], ["dog", "cat"]))
    train, test = load(dataset), load(dataset, "test")
    assert (train.labels.tolist(), train.classes, train.notes) == ([0, 1, 1], ("cat", "dog"), ())
    assert (test.labels.tolist(), test.classes) == ([1, 1, 0], ("cat", "dog"))
    number, text = notes(test)["reordered"]
    assert number == 2 and "matched by name: 'dog', 'cat'; there 'cat', 'dog'" in text


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (([0, 1], ["a", "b"]), (["b", "a", "b"], "string")),
        ((["b", "a"], "large_string"), ([0, 1, 0], ["b", "a"])),
        (([7, 30], "int64"), (["30", "7", "30"], "string")),
        (([7, 30], "uint8"), ([30, 7, 30], "int32")),
        (([0, 1, 2], ["a", "b", "c"]), ([1, 0, 1], ["b", "c"])),
    ],
)
def test_labels_of_two_kinds_are_matched_by_value(tmp_path, train, test):
    assert load(parquet(tmp_path / "d", train, test), "test").labels.tolist() in ([1, 0, 1], [2, 1, 2])


def test_positions_never_pass_for_names(tmp_path):
    dataset = parquet(tmp_path / "d", ([0, 1], ["cat", "dog"]), ([0, 1], "int64"))
    assert "class '0', '1' is none of the 2 classes of split 'train' ('cat', 'dog')" in refused(dataset)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ("cat", "cat ", "class 'cat ' is none of the 2 classes of split 'train'; it looks like 'cat' but"),
        ("cat", "Cat", "class 'Cat' is none of the 2 classes of split 'train'; it looks like 'cat' but"),
        (NFC, NFD, rf"({ascii(NFD)[1:-1]}) is none of the 2 classes of split 'train'; it looks like"),
        ("cat", CYRILLIC, "(c\\u0430t) is none of the 2 classes of split 'train'; it looks like 'cat' but"),
        ("cat", "c\u200bat", "(c\\u200bat) is none of the 2 classes of split 'train'; it looks like 'cat' but"),
        ("cat", "cats", "class 'cats' is none of the 2 classes of split 'train'; did you mean 'cat'?"),
        ("cat", "emu", "class 'emu' is none of the 2 classes of split 'train' ('cat', 'zebra')"),
    ],
)
@pytest.mark.parametrize("layout", ["folders", "ClassLabel", "text"])
def test_a_name_without_a_counterpart_is_refused(tmp_path, layout, ours, theirs, says):
    if layout == "folders":
        dataset = folders(tmp_path / "d", train=[ours, "zebra"], test=[theirs, "zebra"])
    elif layout == "ClassLabel":
        dataset = parquet(tmp_path / "d", ([0, 1], [ours, "zebra"]), ([0, 1], [theirs, "zebra"]))
    else:
        dataset = parquet(tmp_path / "d", ([ours, "zebra"], "string"), ([theirs, "zebra"], "string"))
    assert says in refused(dataset)


def test_look_alikes_within_a_split_are_said_once(tmp_path):
    names = ["cat", "cat ", NFC, NFD, "dog"]
    dataset = parquet(tmp_path / "d", ([0, 1, 2, 3, 4], names), ([0, 1, 2, 3, 4], names))
    number, text = notes(load(dataset))["alike"]
    assert number == 4 and rf"'cat', 'cat ', '{NFC}' (caf\xe9), '{NFD}' (cafe\u0301)" in text
    assert load(dataset, "test").notes == ()


def test_missing_classes_and_labels_are_counted(tmp_path):
    dataset = parquet(tmp_path / "d", ([0, -1, 1, None, 2], ["a", "b", "c"]), ([1, -1, -1], ["a", "b", "c"]))
    train, test = load(dataset), load(dataset, "test")
    assert train.dropped == notes(train)["unlabelled"][0] == 2
    assert "2 of 5 rows have no label (nothing, nan or below 0) and were dropped" in notes(train)["unlabelled"][1]
    assert notes(test)["unlabelled"][0] == 2
    assert notes(test)["empty-classes"] == (2, f"{dataset.path}, split 'test': no image of class 'a', 'c'")


def test_a_class_that_lost_all_its_labels_is_named(tmp_path):
    dataset = parquet(tmp_path / "d", ([0, 0, 1, -1], ["a", "b", "c"]), ([0, 1], ["a", "b", "c"]))
    assert refused(dataset, "train").endswith("split 'train': class 'c' has no image; add some, or take the name away")


def test_an_empty_text_is_no_class(tmp_path):
    train = load(parquet(tmp_path / "d", (["a", "", "b"], "string"), (["a"], "string")))
    assert (train.classes, train.labels.tolist(), train.dropped) == (("a", "b"), [0, 1], 1)
    assert (train.pixels[:][:, 0, 0, 0] == np.array([0, 2])).all()
