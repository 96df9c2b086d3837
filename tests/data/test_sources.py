import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

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
        ({"path": "o/n", "augment": "flip"}, "'none', 'crop', 'crop-flip' or 'resized-crop-flip'"),
        ({"path": "o/n", "test": ""}, "'' is neither a split's name nor a share between 0 and 1, such as 0.2"),
        ({"path": "o/n", "test": 1.0}, "1.0 is neither a split's name nor a share"),
        ({"path": "builtin:digits", "test": 0.2}, "has the splits train and test, not 0.2"),
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


def test_builtin_is_drawn_the_same_twice():
    first = load(Dataset(path="builtin:digits"))
    shutil.rmtree(cache.folder())
    again = load(Dataset(path="builtin:digits"))
    assert again.fingerprint == first.fingerprint and first.classes == tuple("0123456789")


# Images in folders --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("wrong", ["train/dog/more/0.png", "train/0.png"])
def test_an_image_above_or_below_its_class_is_refused(tmp_path, wrong):
    dataset = image_folder(tmp_path / "d", "train/cat/0.png", "train/dog/1.png", wrong, "test/cat/0.png")
    assert f"split 'train': {wrong} has no class: every image must lie at SPLIT/CLASS/image" in message(dataset)


# What cannot be loaded ----------------------------------------------------------------------------------------------


def test_a_missing_path(tmp_path):
    gone = Dataset(path=str(tmp_path / "gone"))
    assert message(gone).startswith(f"data.source.path: {tmp_path}/gone does not exist")
    with pytest.raises(DataError, match="does not exist"):
        cache.cached(Source(gone), "train", 4)


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
    assert "(d.zip; unpack it)" in message(Dataset(path=str(tmp_path / "d.zip")))
    (tmp_path / "d[1").mkdir()
    (tmp_path / "d[1/train.parquet").touch()
    assert "holds '[', which reads as a pattern" in message(Dataset(path=str(tmp_path / "d[1")))
    dataset = image_folder(tmp_path / "d", "train/a/0.png")
    (tmp_path / "d/link").symlink_to("nowhere")
    assert message(dataset) == f"data.source.path: {tmp_path}/d/link: links to nothing; remove it"


def test_a_hub_id_out_of_reach_is_one_line():
    text = message(Dataset(path="owner/name"))
    assert text.startswith("data.source.path: owner/name could not be loaded: Couldn't reach") and "\n" not in text
    assert "network" in text and "HF_HUB_OFFLINE" in text


# A test split that is held out -------------------------------------------------------------------------------------


def pool(root: Path, counts: dict[str, int], start: str = "") -> Dataset:
    """Class folders of grey squares, each of a level of its own, without a test split."""
    level = 0
    for name, count in counts.items():
        (root / start / name).mkdir(parents=True)
        for _ in range(count):
            level += 1
            (root / start / name / f"{level}.png").write_bytes(png(level)["bytes"])
    return Dataset(path=str(root), test=0.2)


@pytest.mark.parametrize("start", ["", "train"])
def test_a_share_of_each_class_is_held_out_by_the_seed(tmp_path, start):
    """Of 10, 5 and 2 images 2, 1 and at least 1; what is left is the train split, and nothing is in both."""
    dataset = pool(tmp_path / "d", {"a": 10, "b": 5, "c": 2}, start)
    train, test = load(dataset), load(dataset, "test")
    assert np.bincount(test.labels).tolist() == [2, 1, 1] and np.bincount(train.labels).tolist() == [8, 4, 1]
    assert sorted(levels(train) + levels(test)) == [*range(1, 18)] and test.classes == ("a", "b", "c")
    other = cache.load(Source(dataset, "source", seed=1), "test", 4)
    assert levels(other) != levels(test) and other.fingerprint != test.fingerprint
    assert np.bincount(other.labels).tolist() == [2, 1, 1]


def test_a_share_of_a_table_is_held_out_without_rows_that_have_no_label(tmp_path):
    rows = {"image": [png(n) for n in range(11)], "label": ["x", "y"] * 5 + [None]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "d/train.parquet"))
    dataset = Dataset(path=str(tmp_path / "d"), label="label", test=0.2)
    train, test = load(dataset), load(dataset, "test")
    assert sorted(levels(train) + levels(test)) == [*range(10)] and len(test.labels) == 2
    assert all(
        label == level % 2 for part in (train, test) for label, level in zip(part.labels, levels(part), strict=True)
    )


def test_copies_of_an_image_are_on_one_side_of_a_share(tmp_path):
    """Three images of a are there twice, one of them in b too: seven pairs of rows, told apart by their grey level.

    Of 10 rows of a 5 are drawn, and a pair with one of them in it follows its first row.
    """
    dataset = pool(tmp_path / "d", {"a": 7, "b": 5}).model_copy(update={"test": 0.5})
    for level in (1, 2, 3):
        shutil.copy(tmp_path / f"d/a/{level}.png", tmp_path / f"d/a/{level}-copy.png")
    shutil.copy(tmp_path / "d/a/1.png", tmp_path / "d/b/1-copy.png")
    moved = []
    for seed in range(6):
        train, test = (cache.load(Source(dataset, "source", seed), split, 4) for split in ("train", "test"))
        assert not {*levels(train)} & {*levels(test)} and len(train.labels) + len(test.labels) == 16
        moved += [note.number for note in train.notes if note.kind == "copies-beside"]
        assert not test.notes
    assert moved and 0 < max(moved) <= 4


def test_a_class_of_copies_cannot_be_shared_out(tmp_path):
    dataset = pool(tmp_path / "d", {"a": 5, "b": 1})
    for number in range(4):
        shutil.copy(tmp_path / "d/b/6.png", tmp_path / f"d/b/copy-{number}.png")
    assert "too many images of class 'b' are copies" in message(dataset)


def test_nothing_is_held_out_beside_a_test_split(tmp_path):
    dataset = pool(tmp_path / "d", {"a": 3, "b": 3}, "train")
    shutil.copytree(tmp_path / "d/train", tmp_path / "d/val")
    assert "has a split 'val', so test = 0.2 would hold out a second one; write test = \"val\"" in message(dataset)


def test_a_test_split_alone_can_be_divided_as_the_error_says(tmp_path):
    dataset = pool(tmp_path / "d", {"a": 10, "b": 5}, "test").model_copy(update={"test": "test"})
    with pytest.raises(DataError, match=r"no split 'train' .*; add it, .*: train = \"test\" and test = 0.2 in \[data"):
        load(dataset)
    divided = dataset.model_copy(update={"train": "test", "test": 0.2})
    assert [len(load(divided, split).labels) for split in ("train", "test")] == [12, 3]


def test_a_class_of_one_image_cannot_be_shared_out(tmp_path):
    said = message(pool(tmp_path / "d", {"a": 3, "b": 1}), "test")
    assert "class 'b' has 1 image, of which test = 0.2 would leave none to train on" in said


def test_where_there_is_no_test_split_a_share_is_offered(tmp_path):
    dataset = pool(tmp_path / "d", {"a": 3, "b": 3}, "train").model_copy(update={"test": "test"})
    assert "; write test = 0.2 in [data.source] to hold out a part of 'train'" in message(dataset, "test")
    dataset = pool(tmp_path / "e", {"a": 3, "b": 3}).model_copy(update={"test": "test"})
    assert "write test = 0.2 to hold out a part of each class" in message(dataset, "test")
