import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.errors import DataError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def plain(color, size=4):
    return Image.new("RGB", (size, size), color)


def image_folder(root: Path, first=None, name="0.png", **options) -> Dataset:
    """Two classes, an image each in train (`first` in class a) and one in test."""
    for path in ("train/a", "train/b", "test/a", "test/b"):
        (root / path).mkdir(parents=True)
        plain("blue").save(root / path / "1.png")
    (root / "train/a/1.png").unlink()
    (first or plain("red")).save(root / "train/a" / name, **options)
    return Dataset(path=str(root))


def first_pixels(dataset, size=4) -> np.ndarray:
    """[size, size, 3] of the first training image."""
    return cache.load(Source(dataset), "train", size).pixels[0].transpose(1, 2, 0)


def palette(**info) -> Image.Image:
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.info.update(info)
    return picture


MODES = {
    "RGB": (plain((10, 20, 30)), "png", (10, 20, 30)),
    "1": (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 100), "png", (100, 100, 100)),
    "LA": (Image.new("LA", (4, 4), (200, 128)), "png", (227, 227, 227)),
    "P": (palette(), "png", (255, 0, 0)),
    "P, transparent": (palette(transparency=0), "png", (255, 255, 255)),
    "RGB, transparent": (plain((255, 0, 0)), "png", (255, 255, 255)),
    "RGBA": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "png", (255, 255, 255)),
    "RGBA, opaque": (Image.new("RGBA", (4, 4), (1, 2, 3, 255)), "png", (1, 2, 3)),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "tif", (255, 0, 0)),
    "I;16": (Image.fromarray(np.full((4, 4), 0x8080, np.uint16)), "png", (128, 128, 128)),
    "I": (Image.fromarray(np.full((4, 4), 65535, np.int32)), "tif", (255, 255, 255)),
    "F": (Image.fromarray(np.full((4, 4), 0x8080, np.float32)), "tif", (128, 128, 128)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    """Over white, grey 200 at alpha 128 is (200 * 128 + 255 * 127) / 255 = 227.4; 16 bits are divided by 257, and
    0x8080 / 257 = 0x80."""
    picture, extension, expected = MODES[mode]
    options = {"transparency": (255, 0, 0)} if mode == "RGB, transparent" else {}
    dataset = image_folder(tmp_path / "d", picture, f"0.{extension}", **options)
    assert (first_pixels(dataset) == expected).all()


def test_wide_values_out_of_range_are_refused(tmp_path):
    picture = Image.fromarray(np.full((4, 4), 65536, np.int32))
    with pytest.raises(DataError, match=r"d/train/a/0.tif: .* values from 65536 to 65536 are on no known scale"):
        first_pixels(image_folder(tmp_path / "d", picture, "0.tif"))


def test_the_centre_is_kept(tmp_path):
    """Of 8x4 pixels, red but for the four green columns in the middle, exactly those are left."""
    picture = Image.new("RGB", (8, 4), "red")
    picture.paste((0, 255, 0), (2, 0, 6, 4))
    assert (first_pixels(image_folder(tmp_path / "d", picture)) == (0, 255, 0)).all()


def test_orientation_is_applied(tmp_path):
    """Orientation 3 is a half turn."""
    picture = plain("black")
    picture.paste((255, 255, 255), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = first_pixels(image_folder(tmp_path / "d", picture, exif=exif))
    assert (pixels[:, :2] == 0).all() and (pixels[:, 2:] == 255).all()


def bomb(side: int) -> bytes:
    """A PNG file of 70 bytes that claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 50_000])
def test_a_bomb_is_refused_and_nothing_global_is_changed(tmp_path, side):
    """10,000 x 10,000 is above PIL's limit, where it only warns; 50,000 x 50,000 above twice that."""
    dataset = image_folder(tmp_path / "d")
    (tmp_path / "d/train/b/1.png").write_bytes(bomb(side))
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with pytest.raises(DataError, match=r"d/train/b/1.png: the image is too large"):
        cache.load(Source(dataset), "train", 4)
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


@pytest.mark.parametrize("broken", [b"", b"not an image", None])
def test_a_broken_image_is_named_and_leaves_nothing_half_made(tmp_path, cache_folder, broken):
    dataset = image_folder(tmp_path / "d")
    path = tmp_path / "d/train/b/1.png"
    path.write_bytes(path.read_bytes()[:45] if broken is None else broken)
    with pytest.raises(DataError, match=r"/d/train/b/1.png: the image cannot be decoded: ") as error:
        cache.load(Source(dataset), "train", 4)
    assert "\n" not in str(error.value) and "BytesIO" not in str(error.value)
    assert ("replace it, or remove it" in str(error.value)) == (broken is None)
    assert [path.suffix for path in cache_folder.iterdir()] == [""]
    assert cache.cached(Source(dataset), "train", 4) is None


def test_all_broken_images_are_named_at_once(tmp_path):
    """Who has to mend his folder should not have to begin again for each; what could be decoded is kept."""
    dataset = image_folder(tmp_path / "d")
    for name in ("a/0", "b/0", "b/1"):
        (tmp_path / f"d/train/{name}.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a/0.png: the image cannot be decoded: .*\n2 more: .*b/0.png', .*b/1.png'$"):
        cache.load(Source(dataset), "train", 4)
    (tmp_path / "d/train/b/1.png").rename(tmp_path / "d/train/b/K\u00e4fer.png")
    with pytest.raises(DataError, match=r"\n2 more: .*b/0.png', .*b/K\u00e4fer.png'$"):  # no code points: no class name
        cache.load(Source(dataset), "train", 4)
    (tmp_path / "d/train/b/K\u00e4fer.png").unlink()
    with pytest.raises(DataError, match=r"a/0.png: the image cannot be decoded: .*\n1 more: .*b/0.png'$"):
        cache.load(Source(dataset), "train", 4)


def test_postscript_is_not_even_identified(tmp_path):
    """PIL would hand it to Ghostscript."""
    dataset = image_folder(tmp_path / "d")
    (tmp_path / "d/train/b/1.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"b/1.png: the image cannot be decoded: it is no image of a known format"):
        cache.load(Source(dataset), "train", 4)
