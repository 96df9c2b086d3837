"""Class-balanced subsets of a train split: the γ of the paper."""

from __future__ import annotations

import hashlib
import zlib
from fractions import Fraction

import numpy as np

# Keeps these random numbers apart from others drawn with the same seed.
_STREAM = zlib.crc32(b"subset")


def balanced(labels: np.ndarray, classes: int, fraction: float, seed: int) -> np.ndarray:
    """Sorted int64 indices of a subset of `labels` (integers [N] in [0, classes)).

    `fraction` = 1 is every row. A smaller one takes the same number from every class: fraction * N / classes, halves
    rounded up, at least one and at most what the smallest class has. A class's draw depends on (seed, class) alone,
    and a smaller fraction's rows are among a larger one's. Raises ValueError for a fraction outside (0, 1] and for a
    label outside [0, classes) or without a row.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is not in (0, 1]")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels are not in [0, {classes})")
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        raise ValueError(f"class {counts.argmin()} has no rows")
    if fraction == 1:
        return np.arange(len(labels), dtype=np.int64)
    each = per_class(fraction, len(labels), classes, int(counts.min()))
    drawn = [
        np.random.default_rng([_STREAM, seed, label]).permutation(np.flatnonzero(labels == label))[:each]
        for label in range(classes)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def per_class(fraction: float, images: int, classes: int, smallest: int) -> int:
    """How many images of every class a fraction below 1 of a train split is; smallest: images of its smallest class."""
    # As a recipe writes it, 0.145 * 1000 / 10 is 14.5; in floating point it is a little less.
    share = Fraction(str(float(fraction))) * images / classes
    return min(max(1, int(share + Fraction(1, 2))), smallest)


def digest(index: np.ndarray) -> str:
    """SHA-256, in hex, of an index list as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(index, "<i8").tobytes()).hexdigest()
