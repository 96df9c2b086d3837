"""Images that stand in two places, told by the hashes of their decoded pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dtlctl.data.cache import Images
from dtlctl.data.dataset import Note
from dtlctl.errors import DataError

COPIED = 0.5
"""Of a test split: with more of it in the train split, accuracy would be that on training images."""


def among(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: whether each image, of n hashes, is among the others, of m hashes."""
    known = set(others.tolist())
    return np.fromiter((one in known for one in hashes.tolist()), bool, len(hashes))


def within(role: str, train: Images, test: Images) -> list[Note]:
    """What is to be said of images that occur twice in a role's data.

    Raises DataError where more than half of the test split is in the train split.
    """
    both = int(among(test.hashes, train.hashes).sum())
    if both > COPIED * len(test.hashes):
        raise DataError(
            f"data.{role}: {both:,} of {len(test.hashes):,} test images are in the train split too, so models would be "
            "tested on the images that they are trained on\nsplit the images anew, each into one of the two"
        )
    splits = (train, test)
    labelled = {pair for one in splits for pair in zip(one.hashes.tolist(), one.labels.tolist(), strict=True)}
    torn = len(labelled) - len({image for image, _ in labelled})
    notes = [
        Note("test-in-train", both, f"{both:,} of {len(test.hashes):,} test images are in the train split too"),
        Note("two-classes", torn, f"{torn:,} images are there under two classes"),
    ]
    for name, images in (("train", train), ("test", test)):
        again = len(images.hashes) - len(set(images.hashes.tolist()))
        text = f"{again:,} of {len(images.hashes):,} {name} images are there twice"
        notes.append(Note(f"twice-in-{name}", again, text))
    return [note for note in notes if note.number]


def across(data: Mapping[str, tuple[Images, Images]]) -> dict[str, list[Note]]:
    """By role, how many of its images are training images of another role's data. data: (train, test) by role.

    Of training images in two roles the later role is told. Of roles that share one dataset, as `like = "source"` makes
    them, the first stands for all: within one, splits were compared.
    """
    found: dict[str, list[Note]] = {role: [] for role in data}
    for role, (own, test) in data.items():
        compared = {own.fingerprint}
        for other, (train, _) in data.items():
            if train.fingerprint in compared:
                continue
            compared.add(train.fingerprint)
            splits = {"test": test} if [*data].index(role) < [*data].index(other) else {"test": test, "train": own}
            for name, images in splits.items():
                if both := int(among(images.hashes, train.hashes).sum()):
                    text = f"{both:,} of {len(images.hashes):,} {name} images are training images of data.{other}"
                    found[role].append(Note(f"{name}-in-{other}", both, text))
    return found
