"""What is said of data before anything trains, and what `check` shows of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """
name = "faults"
[model]
arch = "resnet8"
width = 4
image_size = 8
[data.source]
path = "photos"
fraction = 0.8
[data.target]
path = "builtin:digits"
fraction = 0.02
[pretrain]
steps = 1
batch_size = 4
[finetune]
steps = 1
batch_size = 4
[piggyback]
steps = 1
[audit]
models = []
"""


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 cats, 30 dogs, 2 emus to train on, one of them in the test too; files nobody reads, an emu nobody tests."""
    root, number = tmp_path / "photos", 0
    for name, count in (("cat", 30), ("dog", 30), ("emu", 2)):
        for _ in range(count):
            picture(root / "train" / name / f"{number}.png", number := number + 1)
    for name in ("cat", "dog"):
        for _ in range(5):
            picture(root / "test" / name / f"{number}.png", number := number + 1)
    picture(root / "test/cat/copy.png", 1)
    for number in range(3):
        (root / "train/cat" / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "train/.hidden").mkdir()
    (root / "train/.hidden/1.png").write_bytes(b"x")
    (tmp_path / "faults.toml").write_text(RECIPE)
    return tmp_path / "faults.toml"


FAULTS = {
    "heic": "files that are not read",
    "draws 6 of 62": "imbalance",
    "emu": "a class that the test split lacks",
    ".hidden": "a hidden folder",
}


def test_check_names_every_fault_at_once(photos: Path, call):
    """Four by the names of files alone; what the pixels say, once they are decoded; in eight lines at most."""
    code, out, err = call("check", photos)
    assert code == 0, err
    said = [line for line in out.splitlines() if "note: " in line]
    assert len(said) <= 8 and all(any(word in line for line in said) for word in FAULTS), out
    code, _, err = call("pretrain", photos, "--quiet")
    assert code == 0, err
    code, out, _ = call("check", photos)
    said = [line for line in out.splitlines() if "note: " in line]
    assert len(said) <= 8, out
    for word in (*FAULTS, "1 of 11 test images are in the train split too"):
        assert sum(word in line for line in said) >= 1, (word, out)


def test_a_run_says_it_before_it_trains_and_keeps_it(photos: Path, call):
    import json

    code, out, err = call("pretrain", photos)
    assert code == 0
    before = err[: err.index("pretrain: ")]
    assert all(word in before for word in (*FAULTS, "1 of 11 test images"))
    notes = json.loads(Path(out.strip()).read_text())["notes"]["source"]
    kinds = {note["kind"]: note["number"] for note in notes}
    assert kinds["imbalance"] == 6 and kinds["test-in-train"] == 1 and kinds["unread"] >= 3


@pytest.mark.usefixtures("undrawn")
def test_a_test_split_that_is_the_train_split_is_refused(photos: Path, call):
    import shutil

    root = photos.parent / "photos"
    shutil.rmtree(root / "test")
    shutil.copytree(root / "train", root / "test")
    code, _, err = call("run", photos, "--quiet")
    assert code == 4 and "62 of 62 test images are in the train split too" in err
    code, _, err = call("run", photos, "--quiet", "--set", "data.source.test=train")
    assert code == 4 and "data.source.test: it is 'train' as is `train`" in err
