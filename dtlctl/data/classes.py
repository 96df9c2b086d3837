"""Class names of two splits, brought together by name: a number means a class only beside its own split's names."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dtlctl.data.dataset import Note, Rows
from dtlctl.errors import DataError, nearest

# Cyrillic and Greek small letters that print as these Latin ones.
_TWINS = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u03bf\u03b1", "aeopcyxijsoa")


def numbered(labels: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [N], -1 for None, and the sorted labels that they number, as text."""
    known = sorted({*labels} - {None})
    index = {label: number for number, label in enumerate(known)}
    return np.array([index.get(label, -1) for label in labels], np.int64), tuple(map(str, known))


def align(own: Rows, train: tuple[str, ...], place: str, train_name: str) -> Rows:
    """A split's rows with labels that index `train`, the classes of split `train_name`, and notes on what that took.

    place: names the split. Raises DataError for a class that training lacks.
    """
    notes = list(own.notes)
    if wrong := [name for name in own.classes if any("\ud800" <= c <= "\udfff" for c in name)]:
        raise DataError(f"{place}: the name of class {wrong[0]!a} is not UTF-8; rename it")
    number = {name: index for index, name in enumerate(train)}
    if strange := [name for name in own.classes if name not in number]:
        hint = nearest(strange[0], train) or f" ({some(train)})"
        if twins := [name for name in train if _skeleton(name) == _skeleton(strange[0])]:
            hint = f"; it looks like {show(twins[0])} but is spelt otherwise: rename one of the two"
        known = f"none of the {len(train)} classes of split {train_name!r}"
        raise DataError(f"{place}: class {some(strange)} is {known}{hint}")
    new = [number[name] for name in own.classes]
    if new != sorted(new):
        ours, theirs = some(own.classes), some([name for name in train if name in own.classes])
        text = f"{place}: classes stand in another order than in split {train_name!r}, and are matched by name"
        notes.append(Note("reordered", len(new), f"{text}: {ours}; there {theirs}"))
    labels = np.array([*new, -1], np.int64)[own.labels]
    counts = np.bincount(labels[labels >= 0], minlength=len(train))
    if counts.any() and (empty := [name for name, images in zip(train, counts, strict=True) if not images]):
        notes.append(Note("empty-classes", len(empty), f"{place}: no image of class {some(empty)}"))
    if dropped := int((labels < 0).sum()):
        text = f"{place}: {dropped} of {len(labels)} rows have no label (nothing, nan or below 0) and were dropped"
        notes.append(Note("unlabelled", dropped, text))
    if own.classes is train and (alike := _alike(train)):  # once: not for the test split again
        text = f"{place}: class names that look alike are different classes: {some(alike)}"
        notes.append(Note("alike", len(alike), text))
    return own._replace(labels=labels, classes=train, notes=tuple(notes))


def show(name: str) -> str:
    """A class name in quotes, with code points where other characters could print the same."""
    return repr(name) if name.isascii() else f"{name!r} ({ascii(name)[1:-1]})"


def some(names: Sequence[str], most: int = 6, quoted: Callable[[str], str] = show) -> str:
    """Names in quotes, of classes with their code points; of many, the first."""
    return ", ".join(map(quoted, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _skeleton(name: str) -> str:
    """The same for names that differ in Unicode form, case, blanks, twin letters or zeros of a number."""
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_TWINS)
    plain = " ".join("".join(c for c in folded if unicodedata.category(c) != "Cf").split())
    return f"{float(plain):g}" if re.fullmatch(r"[+-]?\d+(\.\d*)?", plain) else plain


def _alike(names: Sequence[str]) -> list[str]:
    groups = defaultdict(list)
    for name in names:
        groups[_skeleton(name)].append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]
