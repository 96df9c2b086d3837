"""Datasets that need no network: letters and Greek, printed in matplotlib's fonts; scikit-learn's handwritten digits.

Drawing is deterministic: the random numbers of image i of a split depend on the dataset, the split and i alone.
"""

import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Changing how images are drawn must change this number: it is part of the cache key.
VERSION = 1

# The merged classes of EMNIST: capitals, and the lower-case letters that look different from their capital.
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghnqrt"
GREEK = "αβγδεζηθικλμνξοπρστυφχψω"

_UPRIGHT_AND_SLANTED = [
    f"DejaVu{family}{style}"
    for family, slanted in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slanted}", f"-Bold{slanted}")
]
_STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
_COMPUTER_MODERN = ["cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"]
_PRINTED = {
    "letters": (LATIN, _UPRIGHT_AND_SLANTED + _STIX + _COMPUTER_MODERN),
    "greek": (GREEK, _UPRIGHT_AND_SLANTED + _STIX),
}
NAMES = (*_PRINTED, "digits")
WANTED = {"augment": "crop"}
"""Keys of a recipe's table of any of them: letters and digits must not be mirrored."""

_CANVAS = 64  # glyphs are drawn at this size, then reduced: smooth edges at any image size


def load(name: str, split: str, image_size: int) -> tuple[list[Image.Image], list[int], list[str]]:
    """RGB pictures of image_size x image_size, labels, and class names; of letters 200 and 40 images a class."""
    if name == "digits":
        return _digits(split, image_size)
    import matplotlib

    alphabet, names = _PRINTED[name]
    folder, each = Path(matplotlib.get_data_path()) / "fonts" / "ttf", {"train": 200, "test": 40}[split]
    fonts = [ImageFont.truetype(str(folder / f"{font}.ttf"), _CANVAS * 2 // 3) for font in names]
    pictures, labels = [], []
    for label, letter in enumerate(alphabet):
        for index in range(each):
            rng = np.random.default_rng([zlib.crc32(f"{name}/{split}".encode()), label, index])
            pictures.append(_draw(letter, fonts[rng.integers(len(fonts))], image_size, rng))
            labels.append(label)
    return pictures, labels, list(alphabet)


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int, rng: np.random.Generator) -> Image.Image:
    """One glyph under random size, slant, rotation, shift, ink, paper and noise."""
    half = _CANVAS / 2
    glyph = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(glyph).text((half, half), letter, font=font, fill=255, anchor="mm")

    scale = rng.uniform(0.8, 1.3)
    angle, slant = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)
    shift = rng.uniform(-0.1, 0.1, 2) * _CANVAS
    cos, sin = np.cos(angle), np.sin(angle)
    # PIL wants the map from output to input pixels, about the centre.
    inverse = np.linalg.inv(scale * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, slant], [0, 1]]))
    offset = half - inverse @ (half + shift)
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    glyph = glyph.transform(glyph.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)

    mask = np.asarray(glyph.resize((size, size), Image.Resampling.BOX), np.float32)[..., None] / 255
    paper, ink = rng.uniform(0, 70, 3), rng.uniform(150, 255, 3)
    pixels = paper + mask * (ink - paper) + rng.normal(0, rng.uniform(5, 25), (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _digits(split: str, size: int) -> tuple[list[Image.Image], list[int], list[str]]:
    """1,000 training and 797 test images, of 8x8 pixels (UCI): drawn once, stratified, with a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=797, stratify=labels, random_state=0)
    values, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    pixels = (values.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    # Two pixels of paper around the 6x6 ink, as the printed letters have it, then one smooth enlargement.
    pictures = [
        Image.fromarray(np.pad(p, 1)).resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for p in pixels
    ]
    return pictures, labels.tolist(), [str(d) for d in range(10)]
