"""One image as RGB bytes, and the one rule by which a dataset's values of more than 8 bits become bytes."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dtlctl.data import files
from dtlctl.data.classes import some
from dtlctl.data.dataset import Note
from dtlctl.errors import DataError

# What may become 255, smallest first. 8-bit values are also stored in wider files.
_SCALES = {1: "shares of 1", 255: "8-bit values", 1023: "10-bit values", 4095: "12-bit values", 16383: "14-bit values",
           65535: "16-bit values"}  # fmt: skip
# These stand beside images of 8 bits without a guess; the others are only the smallest that holds the values.
_CERTAIN = (1, 255, 65535)
# PIL's decoders. Of a grey PPM file it scales values by the maximum that the file states, which is 65535 by default.
_STATED = re.compile(r"'ppm\w*'.*'L', (?!65535\b)|I;12")
DARK = 1 / 16
"""Of the full scale: where no value is above it, the images are probably of another depth."""
_COLOUR = re.compile(r";16[BLN]|'ppm\w*'.*'RGB', 65535\b")
HASH = np.dtype("V16")


class Depth(NamedTuple):
    """What one image of more than 8 bits holds.

    kind: "integer", which floats without fractions are too; "float"; "either", floats that are all 0 or 1; "stated",
    integers whose full scale the file states, scaled to 65535; or "colour", 16 bits of which PIL keeps the upper 8.
    """

    kind: str
    high: float  # the largest value


class Rule(NamedTuple):
    """How the images of a split became bytes."""

    full: int | None = None  # what became 255 in images of wide modes; None: there are none
    colour: bool = False  # whether there are 16-bit colour images, read at their upper 8 bits
    narrow: bool = True  # whether there are images of 8 bits


def decode(
    picture: bytes | Image.Image, size: int, place: str, full: int | None = None
) -> tuple[np.ndarray | None, Depth | None, bool]:
    """uint8 [3, size, size] of an image file's bytes or of a picture, upright, its centre, transparency white; its
    depth where it has more than 8 bits; and whether it has more frames or pages than the first, which is read.

    Values of wide modes (I;16, I, F) are divided by full / 255; without `full` such an image gives its depth alone.
    Raises DataError, naming `place`.
    """
    depth, frames = None, False
    try:
        if isinstance(picture, bytes):
            opened = Image.open(io.BytesIO(picture), formats=files.formats())
            decoder = str(opened.tile[:1])  # gone once the pixels are loaded
            picture = ImageOps.exif_transpose(opened)
            with suppress(Exception):  # a second frame may be broken; a photograph's is its preview (MPO)
                frames = opened.format != "MPO" and getattr(opened, "is_animated", False)
            if opened.mode.startswith(("I", "F")):
                values, depth = _wide(picture, decoder)
                if full is None:
                    return None, depth, frames
                picture = _narrow(values, full, opened)
            elif _COLOUR.search(decoder):
                depth = Depth("colour", float(np.asarray(picture)[..., :3].max()))
        # Cuts the centre in the wanted proportion, then resizes it; does nothing at the right size.
        fitted = ImageOps.fit(_rgb(picture), (size, size), Image.Resampling.BICUBIC)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{place}: the image is too large to be decoded: {error}; reduce or remove it") from error
    except UnidentifiedImageError as error:  # PIL's own text has the address of the bytes
        assert isinstance(picture, bytes)
        raise DataError(f"{place}: the image cannot be decoded: {files.reason(picture)}") from error
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{place}: the image cannot be decoded: {error}; replace it, or remove it") from error
    return np.asarray(fitted).transpose(2, 0, 1), depth, frames


def hashed(images: np.ndarray) -> np.ndarray:
    """Of each image, 16 bytes that are equal for equal pixels."""
    digests = b"".join(hashlib.blake2b(image.data, digest_size=HASH.itemsize).digest() for image in images)
    return np.frombuffer(digests, HASH)


def decide(
    depths: Mapping[int, Depth], labels: np.ndarray, classes: Sequence[str], name: str, train: Rule | None
) -> tuple[Rule, list[Note]]:
    """The rule for a split, and notes on it. depths: by place in `labels`; name: the split's, for messages.

    The full scale is the smallest usual one that holds all values. A test split is read as its `train` split was.
    Raises DataError for values that fit no scale, and for images that together have none for certain.
    """
    highs: dict[str, float] = {}
    counts: dict[str, int] = {}
    for kind, high in depths.values():
        highs[kind], counts[kind] = max(high, highs.get(kind, 0)), counts.get(kind, 0) + 1
    if (black_or_white := highs.pop("either", None)) is not None and not highs.keys() - {"colour"}:
        highs["float"] = black_or_white
    rule, notes = Rule(None, "colour" in counts, len(labels) > len(depths)), list[Note]()
    if rule.colour:
        notes.append(_said_of_colour(highs.pop("colour"), counts.pop("colour"), name, train))
    others = rule.narrow or rule.colour
    if train is not None and train.full is not None:
        full = train.full
        for kind, high in highs.items():
            as_train = {"integer": full > 1, "float": (full == 1) == (high <= 1), "stated": full == 65535}
            if high > full or not as_train[kind]:
                raise DataError(
                    f"{name}: values up to {high:g} are no part of 0-{full}, by which the train split is read; "
                    "convert the images of both to 8 bits in the same way"
                )
    elif highs:
        scales = {_scale(kind, high, name) for kind, high in highs.items()}
        full = max(scales)
        if len(scales) > 1:
            raise DataError(
                f"{name}: images of more than 8 bits hold {' and '.join(_SCALES[s] for s in sorted(scales))}, which "
                "no one scale fits; convert them to 8 bits"
            )
        others = others or (train is not None and (train.narrow or train.colour))
    else:
        return rule, notes
    if others and full not in _CERTAIN:
        raise DataError(
            f"{name}: some images have 8 bits, or 16 in colour, and others hold what seem to be {_SCALES[full]} "
            f"(0-{full}), in this split or in the train split; convert all to 8 bits in the same way"
        )
    if not highs:
        return rule, notes
    how = f"{_SCALES[full]}{' as in the train split' if train else ''} (up to {max(highs.values()):g}): 0-{full}"
    if highs.keys() == {"stated"}:
        how = "values up to the maximum that each file states, which"
    text = f"{name}: {sum(counts.values())} images of more than 8 bits hold {how} became 0-255"
    notes.append(Note("more-than-8-bits", sum(counts.values()), text))
    return rule._replace(full=full), notes + _said_of_dark(depths, labels, classes, name, full)


def _said_of_dark(
    depths: Mapping[int, Depth], labels: np.ndarray, classes: Sequence[str], name: str, full: int
) -> list[Note]:
    """Of classes whose images of more than 8 bits stay in the dark of the scale."""
    highest: dict[int, float] = {}
    for place, depth in depths.items():
        if depth.kind != "colour":
            highest[labels[place]] = max(depth.high, highest.get(labels[place], 0))
    low = sorted(label for label, high in highest.items() if high <= full * DARK)
    if not low:
        return []
    names, high = some([classes[label] for label in low]), max(highest[label] for label in low)
    who = "all images of more than 8 bits" if len(low) == len(highest) else f"those of class {names}"
    text = (
        f"{name}: {who} hold values up to {high:g} of 0-{full}, so they come out nearly black; if they are of another "
        "depth, convert all images to 8 bits, each by its own full scale"
    )
    return [Note("dark", len(low), text)]


def _said_of_colour(high: float, images: int, name: str, train: Rule | None) -> Note:
    """PIL drops the lower 8 of 16 bits, which is right for 16-bit values alone; 12-bit ones come out as 0-15."""
    if high < 64 and not (train and train.colour):
        raise DataError(
            f"{name}: none of the {images} 16-bit colour images has a value above {256 * int(high) + 255}, so they "
            "hold fewer bits, and how many is not known; convert them to 8 bits"
        )
    text = f"{name}: {images} colour images of 16 bits are read at their upper 8 bits"
    return Note("16-bit-colour", images, text)


def _scale(kind: str, high: float, name: str) -> int:
    """The full scale of images of one kind by themselves."""
    if kind == "stated":
        return 65535
    full = next(scale for scale in _SCALES if high <= scale)
    if kind == "integer" and full == 1:
        raise DataError(f"{name}: images of more than 8 bits hold integers, none above 1; convert them to 0-255")
    if kind == "float" and 1 < high <= full / 2:
        raise DataError(
            f"{name}: images hold fractions up to {high:g}, on no known scale; convert them to 8 bits, or to 0-1"
        )
    return full


def _wide(picture: Image.Image, decoder: str) -> tuple[np.ndarray, Depth]:
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 65535):  # nor NaN
        raise ValueError(f"values from {low:g} to {high:g} are on no known scale from 0 to 1, 255, ..., 65535")
    if 1 < high < 1 + 1e-6:  # a share of 1, rounded
        high = 1.0
    if "I;12" in decoder:
        values, high = values * (65535 / 4095), high * (65535 / 4095)
    if _STATED.search(decoder):
        return values, Depth("stated", high)
    if picture.mode != "F" or bool((values == np.rint(values)).all()):
        return values, Depth("either" if picture.mode == "F" and high <= 1 else "integer", high)
    return values, Depth("float", high)


def _narrow(values: np.ndarray, full: int, opened: Image.Image) -> Image.Image:
    """`full` becomes 255, a transparent value too; TIFF may say that zero is white, which PIL heeds at 8 bits alone."""
    scaled = np.rint(values * (255 / full)).clip(0, 255).astype(np.uint8)
    if opened.format == "TIFF" and opened.tag_v2.get(262) == 0:  # type: ignore[attr-defined]
        scaled = 255 - scaled
    if isinstance(clear := opened.info.get("transparency"), int):
        scaled[values == clear] = 255
    return Image.fromarray(scaled)


def _rgb(picture: Image.Image) -> Image.Image:
    """A picture of 8 bits in any mode as RGB; transparency over white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")
