"""Subsets of a train split: the γ of the paper."""

import hashlib
import zlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dtlctl.data.dataset import Balance, Note
from dtlctl.errors import DataError

# Keeps these random numbers apart from others drawn with the same seed.
_STREAM, _HELD = zlib.crc32(b"subset"), zlib.crc32(b"held out")
WORTH_SAYING = 0.9
"""A subset with less than this share of the images that its fraction asks for is told."""


def draw(labels: np.ndarray, classes: int, fraction: float, seed: int, balance: Balance = "classes") -> np.ndarray:
    """Sorted int64 indices of a subset of `labels` (integers [N] in [0, classes)): of each class as `sizes` says.

    A class's draw depends on (seed, class) alone, and a smaller fraction's rows are among a larger one's.
    """
    if fraction == 1:
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels, minlength=classes).tolist()
    drawn = [
        np.random.default_rng([_STREAM, seed, label]).permutation(np.flatnonzero(labels == label))[:size]
        for label, size in enumerate(sizes(counts, fraction, balance))
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def held_out(labels: np.ndarray, classes: Sequence[str], share: float, seed: int, place: str) -> np.ndarray:
    """bool [N]: a share of each class, for testing; at least one image of it. labels: -1 where there is none.

    Raises DataError, naming the class and `place`, where nothing of a class would be left to train on.
    """
    held = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        size = max(1, _rounded(Fraction(str(share)) * len(rows)))
        if size >= len(rows):
            raise DataError(
                f"{place}: class {name!r} has {len(rows)} image{'s' if len(rows) != 1 else ''}, of which test = "
                f"{share:g} would leave none to train on; add some, leave the class out, or hold out less"
            )
        held[np.random.default_rng([_HELD, seed, label]).permutation(rows)[:size]] = True
    return held


def sizes(counts: Sequence[int], fraction: float, balance: Balance) -> list[int]:
    """How many images of each class a fraction of a train split is; counts: how many there are.

    Below 1 it is, with `classes`, the same number of every class: fraction * N / classes, at most what the smallest
    class has; with `keep`, that fraction of each class. Halves are rounded up, and one is the least.
    """
    if fraction == 1:
        return list(counts)
    # As a recipe writes it, 0.145 * 1000 / 10 is 14.5; in floating point it is a little less.
    share = Fraction(str(float(fraction)))
    if balance == "keep":
        return [max(1, _rounded(share * count)) for count in counts]
    return [min(max(1, _rounded(share * sum(counts) / len(counts))), *counts)] * len(counts)


def _rounded(number: Fraction) -> int:
    return int(number + Fraction(1, 2))


def imbalance(counts: Sequence[int], classes: Sequence[str], fraction: float, balance: Balance) -> Note | None:
    """What is to be said where the smallest class makes a balanced subset much smaller than its fraction asks for."""
    asked, drawn = fraction * sum(counts), sum(sizes(counts, fraction, balance))
    limited = drawn == len(counts) * min(counts)  # else it is rounding that makes it smaller
    if drawn >= WORTH_SAYING * asked or not limited or balance == "keep":
        return None
    smallest = int(np.argmin(counts))
    text = (
        f"fraction = {fraction:g} draws {drawn:,} of {sum(counts):,} training images, not {asked:,.0f}: as many of "
        f"every class, and {classes[smallest]!r} has {counts[smallest]:,}; to keep each class's share write "
        f'balance = "keep", or leave that class out (fraction = 1 takes all {sum(counts):,} as they are)'
    )
    return Note("imbalance", drawn, text)


def digest(index: np.ndarray) -> str:
    """SHA-256, in hex, of an index list as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(index, "<i8").tobytes()).hexdigest()
