"""Values of more than 8 bits: one rule for a dataset, known or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
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
    images = cache.load(Source(dataset, "source"), split, 4)  # type: ignore[arg-type]
    order = [0, 2, 1, 3] if len(images.labels) == 4 else [0, 1]
    return np.asarray(images.pixels)[order, 0, 0, 0].tolist(), [note.kind for note in images.notes]


WIDE = {
    "12 bits in 16": ("png", [np.uint16(4095), np.uint16(0), np.uint16(2048), np.uint16(1024)], [255, 0, 128, 64]),
    "10 bits in 16": ("png", [np.uint16(1023), np.uint16(0), np.uint16(512), np.uint16(256)], [255, 0, 128, 64]),
    "16 bits": ("png", [np.uint16(65535), np.uint16(0), np.uint16(32896), np.uint16(257)], [255, 0, 128, 1]),
    "8 bits in 16": ("png", [np.uint16(255), np.uint16(0), np.uint16(128), np.uint16(64)], [255, 0, 128, 64]),
    "shares of 1": ("tif", [np.float32(1), np.float32(0), np.float32(0.5), np.float32(0.25)], [255, 0, 128, 64]),
    "shares of 1, rounded": (
        "tif",
        [np.float32(1.0000001), np.float32(0), np.float32(0.5), np.float32(0.25)],
        [255, 0, 128, 64],
    ),
    "8 bits in 32": ("tif", [np.int32(255), np.int32(0), np.int32(128), np.int32(64)], [255, 0, 128, 64]),
    "floats of 8 bits": ("tif", [np.float32(255), np.float32(0), np.float32(128), np.float32(64)], [255, 0, 128, 64]),
}


@pytest.mark.parametrize("case", WIDE)
def test_the_full_scale_is_the_smallest_that_holds_the_split(tmp_path: Path, case: str):
    """value * 255 / full, rounded: 2048 * 255 / 4095 = 127.5, 512 * 255 / 1023 = 127.6, 0.5 * 255 = 127.5.

    A class of 0 and 257 of 65535 is said to be dark.
    """
    form, values, expected = WIDE[case]
    found, notes = seen(folder(tmp_path / "d", form, values))
    assert np.allclose(found, expected, atol=1) and notes == ["more-than-8-bits"] + ["dark"] * (case == "16 bits")


def test_the_test_split_is_read_as_the_train_split_was(tmp_path: Path):
    """On its own, a test split of up to 1,000 would be one of 10 bits."""
    train = [np.uint16(4095), np.uint16(0), np.uint16(0), np.uint16(0)]
    dataset = folder(tmp_path / "d", "png", train, [np.uint16(819), np.uint16(0), np.uint16(409), np.uint16(0)])
    assert np.allclose(seen(dataset, "test")[0], [51, 0, 25.5, 0], atol=1)
    larger = folder(tmp_path / "e", "png", train, [np.uint16(9000), np.uint16(0)])
    with pytest.raises(DataError, match="values up to 9000 are no part of 0-4095"):
        cache.load(Source(larger), "test", 4)


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
        cache.load(Source(folder(tmp_path / "d", form, values)), "train", 4)


GREY = np.full((4, 4), 4095, ">u2").tobytes()


def files(root: Path, form: str, first: bytes, second: bytes) -> Dataset:
    for label, content in (("a", first), ("b", second)):
        for split in ("train", "test"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            (root / split / label / f"0.{form}").write_bytes(content)
    return Dataset(path=str(root))


@pytest.mark.parametrize(("stated", "expected"), [(4095, [255, 128]), (65534, [16, 8]), (65535, [255, 128])])
def test_a_grey_ppm_file_states_its_full_scale(tmp_path: Path, stated: int, expected: list[int]):
    """4095 and 2048 of 4095, of 65534, and of 65535: that is every writer's default, so the values say more."""
    half = np.full((4, 4), 2048, ">u2").tobytes()
    found, _ = seen(files(tmp_path, "pgm", *(b"P5 4 4 %d\n" % stated + pixels for pixels in (GREY, half))))
    assert np.allclose(found, expected, atol=1)


@pytest.mark.parametrize(("high", "expected"), [(65535, 255), (4095, None)])
def test_16_bit_colours_are_read_at_their_upper_bits_or_refused(tmp_path: Path, high: int, expected: int | None):
    """PIL gives the upper 8 bits alone: 12-bit values would be 0-15."""
    content = b"P6 4 4 65535\n" + np.full((4, 4, 3), high, ">u2").tobytes()
    dataset = files(tmp_path, "ppm", content, content)
    if expected is None:
        with pytest.raises(DataError, match="none of the 2 16-bit colour images has a value above"):
            seen(dataset)
    else:
        assert seen(dataset) == ([expected] * 2, ["16-bit-colour"])


@pytest.mark.parametrize(
    ("values", "test", "said"),
    [
        (
            [np.uint16(65535), np.uint16(4095), np.uint16(9000), np.uint16(100)],
            None,
            "those of class 'b' hold values up",
        ),
        ([np.uint16(65535), np.uint16(4096), np.uint16(9000), np.uint16(100)], None, ""),
        ([np.float32(0.01), np.float32(0.005)], None, "all images of more than 8 bits hold values up to 0.01 of 0-1"),
        (
            [np.uint16(65535)] * 2,
            [np.uint16(4000), np.uint16(3000)],
            "all images of more than 8 bits hold values up to 40",
        ),
    ],
)
def test_what_stays_dark_on_the_scale_of_all_is_said(tmp_path: Path, values: list, test: list | None, said: str):
    """A 16th of 65535 is 4095.9: class b is probably of 12 bits. Floats of 0 to 0.01 are no shares of 1."""
    dataset = folder(tmp_path / "d", "tif" if isinstance(values[0], np.float32) else "png", values, test or values)
    images = cache.load(Source(dataset, "source"), "test" if test else "train", 4)  # type: ignore[arg-type]
    texts = [note.text for note in images.notes if note.kind == "dark"]
    assert len(texts) == bool(said) and all(said in text for text in texts)


def test_more_frames_than_the_first_are_said(tmp_path: Path):
    """An animated GIF, and a TIFF of two pages; the others have one frame. The first is what is read."""
    frames = [Image.new("L", (4, 4), value) for value in (9, 200)]
    for number, (name, more) in enumerate((("a.gif", 1), ("b.tif", 1), ("c.gif", 0), ("d.png", 0))):
        for split in ("train", "test"):
            path = tmp_path / "d" / split / "ab"[number % 2] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if more:
                frames[0].save(path, save_all=True, append_images=frames[1:])
            else:
                frames[0].save(path)
    images = cache.load(Source(Dataset(path=str(tmp_path / "d"))), "train", 4)
    assert images.pixels[:][:, 0, 0, 0].tolist() == [9] * 4
    assert [(note.kind, note.number) for note in images.notes] == [("frames", 2)]


@pytest.mark.parametrize("narrow", ["train", "test"])
def test_a_split_of_8_bits_does_not_stand_beside_one_of_guessed_bits(tmp_path: Path, narrow: str):
    splits = {"train": [np.uint16(4095), np.uint16(0)], "test": [np.uint16(4095), np.uint16(0)]}
    splits[narrow] = [np.uint8(9), np.uint8(7)]
    with pytest.raises(DataError, match=r"some images have 8 bits, .* in this split or in the train split"):
        seen(folder(tmp_path, "png", *splits.values()), "test")


def test_zero_may_be_white(tmp_path: Path):
    """TIFF's tag 262 is 0 then, which PIL heeds at 8 bits alone."""
    for split in ("train", "test"):
        for label, value in (("a", 0), ("b", 65535)):
            path = tmp_path / split / label / "0.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), value, np.uint16)).save(path, tiffinfo={262: 0})
    assert seen(Dataset(path=str(tmp_path)))[0] == [255, 0]


def test_images_of_8_bits_are_decoded_once_and_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoded, decode = [], cache.decode
    monkeypatch.setattr(cache, "decode", lambda *a: decoded.append(a[2]) or decode(*a))
    found, notes = seen(folder(tmp_path / "d", "png", [np.uint8(9), np.uint8(7)]))
    assert (found, notes, len(decoded)) == ([9, 7], [], 2)
