"""What a checkpoint is after a publication that was cut short, and what file systems cannot do."""

from __future__ import annotations

import errno
import os
import stat
from itertools import count
from pathlib import Path

import pytest

from dtlctl.errors import CheckpointError
from dtlctl.model import networks
from dtlctl.storage import checkpoint, lock


@pytest.mark.parametrize(("stop", "found"), [(1, "old"), (2, "old"), (3, "new"), (4, "new")])
def test_a_crash_before_any_rename_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch, stop: int, found: str):
    """Publishing renames four times: weights and sidecar into `.next`, then both into place, weights first."""
    old, new = (networks.build("resnet8", {"source": 2}, width=4) for _ in range(2))
    checkpoint.publish(tmp_path, old, {"format": 1, "key": "old"})
    rename, numbers = os.replace, count(1)

    def crashing(source: Path, goal: Path) -> None:
        if next(numbers) == stop:
            raise KeyboardInterrupt  # like a kill, it is no OSError that the code could answer
        rename(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.publish(tmp_path, new, {"format": 1, "key": "new"})
    checkpoint.settle(tmp_path)
    document = checkpoint.read_sidecar(tmp_path / "model.json")
    assert document is not None and document["key"] == found
    checkpoint.load_weights(tmp_path, document, old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_folder_that_cannot_be_synced_is_written_into(tmp_path: Path, monkeypatch):
    """Linux says EINVAL where a file system has no fsync for folders, as VirtualBox's shared ones."""
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    checkpoint.write(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_full_disk_does_not_keep_a_folder_from_its_owner(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refused = pytest.raises(CheckpointError, match="in use by another process")
    with lock.held(tmp_path), refused, lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_attack_on_what_is_called_model_is_no_model(tmp_path: Path):
    """A dataset or a variant of that name: the sidecar has no weights that could be lost, or that a copy needs."""
    found, goal = tmp_path / "one/model.json", tmp_path / "two/model.json"
    checkpoint.publish_json(found, {"format": 1, "key": "k", "model": "TL"})
    assert checkpoint.lost(found) is None
    checkpoint.adopt(found, goal, "gc")
    document = checkpoint.read_sidecar(goal)
    assert document is not None and (document["key"], document["model"]) == ("k", "gc")
    checkpoint.publish(tmp_path, networks.build("resnet8", {"source": 2}, width=4), {"format": 1})
    (tmp_path / "model.safetensors").unlink()
    for _ in range(2):  # of one that cannot be read, too
        assert checkpoint.lost(tmp_path / "model.json") == tmp_path / "model.safetensors"
        (tmp_path / "model.json").write_text("{")
