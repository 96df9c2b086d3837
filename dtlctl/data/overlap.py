"""Images that stand in two places, told by the hashes of their decoded pixels."""

from collections.abc import Mapping

import numpy as np

from dtlctl.data.dataset import Note
from dtlctl.data.entry import Images
from dtlctl.errors import DataError

COPIED = 0.5
"""Of a test split: with more of it in the train split, accuracy would be that on training images."""
FEW = 10
"""So many copies among a drawn part of a train split may be chance, whatever share of the whole they stand for."""

SAME = "its training images are those of data.source: to dispose of the source is to dispose of the target"


def among(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [n]: whether each image, of n hashes, is among the others, of m hashes."""
    known = set(others.tolist())
    return np.fromiter((one in known for one in hashes.tolist()), bool, len(hashes))


def within(role: str, train: Images, test: Images) -> list[Note]:
    """Notes on images that occur twice in a role's data, as far as its train split is drawn.

    Raises DataError where more than half of the test split is in the train split, or would be if all of it were drawn.
    """
    both, drawn = int(among(test.known, train.known).sum()), len(train.rows) / len(train.labels)
    if both > COPIED * drawn * len(test.rows) and (drawn == 1 or both > FEW):
        raise DataError(
            f"data.{role}: {both:,} of {len(test.rows):,} test images are {_in(train)}, so models would be "
            "tested on the images that they are trained on\nsplit the images anew, each into one of the two"
        )
    splits = (train, test)
    labelled = {pair for one in splits for pair in zip(one.known.tolist(), one.labels[one.rows].tolist(), strict=True)}
    torn = len(labelled) - len({image for image, _ in labelled})
    notes = [
        Note("test-in-train", both, f"{both:,} of {len(test.rows):,} test images are {_in(train)}"),
        Note("two-classes", torn, f"{torn:,} images are there under two classes"),
    ]
    for name, images in (("train", train), ("test", test)):
        again = len(images.rows) - len(set(images.known.tolist()))
        text = f"{again:,} of {len(images.rows):,} {name} images {'is' if again == 1 else 'are'} there twice"
        notes.append(Note(f"twice-in-{name}", again, text))
    return [note for note in notes if note.number]


def across(data: Mapping[str, tuple[Images, Images]]) -> dict[str, list[Note]]:
    """By role, how many of its images are training images of another role's data. data: (train, test) by role.

    Of training images in two roles the later role is told; roles that share one dataset are one (`like = "source"`).
    """
    found: dict[str, list[Note]] = {role: [] for role in data}
    marks = {role: {train.split, train.fingerprint} for role, (train, _) in data.items()}
    for role, (own, test) in data.items():
        compared = {*marks[role]}
        for other, (train, _) in data.items():
            if (role, other) == ("target", "source") and marks[role] & marks[other]:
                found[role].append(Note("same-as-source", len(own.rows), SAME))
            if compared & marks[other]:
                continue
            compared |= marks[other]
            splits = {"test": test} if [*data].index(role) < [*data].index(other) else {"test": test, "train": own}
            for name, images in splits.items():
                if both := int(among(images.known, train.known).sum()):
                    text = f"{both:,} of {len(images.rows):,} {name} images are training images of data.{other}"
                    found[role].append(Note(f"{name}-in-{other}", both, text))
    scales = {role: train.rule.full or 255 for role, (train, _) in data.items()}
    for role, full in scales.items():
        others = [other for other, scale in scales.items() if max(scale, 255) != full]
        if full > 255 and others:
            text = f"images of more than 8 bits are read by 0-{full}, as their values suggest"
            text += f", data.{others[0]} by 0-{scales[others[0]]}; if both were made alike, convert them to 8 bits"
            found[role].append(Note("other-scale", len(others), text))
    return found


def _in(train: Images) -> str:
    whole = len(train.rows) == len(train.labels)
    return "in the train split too" if whole else f"among the {len(train.rows):,} that are drawn from the train split"
