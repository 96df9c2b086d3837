"""Values of more than 8 bits: one rule for a dataset, known or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))


def folder(root: Path, form: str, train: list, test: list | None = None) -> Dataset:
    """Flat pictures of one value each, in turn of class a and b."""
    for split, values in (("train", train), ("test", test or [])):
        for number, value in enumerate(values):
            path = root / split / "ab"[number % 2] / f"{number}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), value)).save(path)
    return Dataset(path=str(root))


def seen(dataset: Dataset, split: str = "train") -> tuple[list[int], list[str]]:
    """The value of each image in the order of the files' names, and the kinds of notes."""
    images = cache.load(dataset, split, 4, role="source")  # type: ignore[arg-type]
    order = np.argsort([0, 2, 1, 3][: len(images.labels)])
    return np.asarray(images.pixels)[order, 0, 0, 0].tolist(), [note.kind for note in images.notes]


WIDE = {
    "12 bits in 16": ("png", [np.uint16(4095), np.uint16(0), np.uint16(2048), np.uint16(1024)], [255, 0, 128, 64]),
    "10 bits in 16": ("png", [np.uint16(1023), np.uint16(0), np.uint16(512), np.uint16(256)], [255, 0, 128, 64]),
    "16 bits": ("png", [np.uint16(65535), np.uint16(0), np.uint16(32896), np.uint16(257)], [255, 0, 128, 1]),
    "8 bits in 16": ("png", [np.uint16(255), np.uint16(0), np.uint16(128), np.uint16(64)], [255, 0, 128, 64]),
    "shares of 1": ("tif", [np.float32(1), np.float32(0), np.float32(0.5), np.float32(0.25)], [255, 0, 128, 64]),
    "8 bits in 32": ("tif", [np.int32(255), np.int32(0), np.int32(128), np.int32(64)], [255, 0, 128, 64]),
    "floats of 8 bits": ("tif", [np.float32(255), np.float32(0), np.float32(128), np.float32(64)], [255, 0, 128, 64]),
}


@pytest.mark.parametrize("case", WIDE)
def test_the_full_scale_is_the_smallest_that_holds_the_split(tmp_path: Path, case: str):
    """value * 255 / full, rounded: 2048 * 255 / 4095 = 127.5, 512 * 255 / 1023 = 127.6, 0.5 * 255 = 127.5."""
    form, values, expected = WIDE[case]
    found, notes = seen(folder(tmp_path / "d", form, values))
    assert np.allclose(found, expected, atol=1) and notes == ["more-than-8-bits"]


def test_the_test_split_is_read_as_the_train_split_was(tmp_path: Path):
    """On its own, a test split of up to 1,000 would be one of 10 bits."""
    train = [np.uint16(4095), np.uint16(0), np.uint16(0), np.uint16(0)]
    dataset = folder(tmp_path / "d", "png", train, [np.uint16(819), np.uint16(0), np.uint16(409), np.uint16(0)])
    assert np.allclose(seen(dataset, "test")[0], [51, 0, 25.5, 0], atol=1)
    larger = folder(tmp_path / "e", "png", train, [np.uint16(9000), np.uint16(0)])
    with pytest.raises(DataError, match="values up to 9000 are no part of 0-4095"):
        cache.load(larger, "test", 4)


@pytest.mark.parametrize(
    ("form", "values", "reason"),
    [
        ("tif", [np.float32(-1), np.float32(0.5)], "on no known scale"),
        ("tif", [np.float32("nan"), np.float32(0.5)], "on no known scale"),
        ("tif", [np.float32(100.5), np.float32(3.25)], "fractions up to 100.5, on no known scale"),
        ("tif", [np.int32(70000), np.int32(0)], "on no known scale"),
        ("tif", [np.float32(0.5), np.int32(200)], "which no one scale fits"),
        ("png", [np.uint16(4095), np.uint8(7)], "some images have 8 bits"),
        ("png", [np.uint16(1), np.uint16(0)], "none above 1"),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path: Path, form: str, values: list, reason: str):
    with pytest.raises(DataError, match=reason):
        cache.load(folder(tmp_path / "d", form, values), "train", 4)


def test_images_of_8_bits_are_decoded_once_and_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoded, decode = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda *a: decoded.append(a[2]) or decode(*a))
    found, notes = seen(folder(tmp_path / "d", "png", [np.uint8(9), np.uint8(7)]))
    assert (found, notes, len(decoded)) == ([9, 7], [], 2)
