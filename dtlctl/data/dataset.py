"""What a recipe says of one dataset, and how errors name it. Nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from dtlctl.data import builtin
from dtlctl.errors import DataError, NoSplit, nearest, one_line
from dtlctl.strict import Strict

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "test"]
Augment = Literal["none", "crop", "crop-flip", "resized-crop-flip"]
Balance = Literal["classes", "keep"]
"""What a subset has of each class: the same number, as in the paper, or its share."""


class Note(NamedTuple):
    """Something that was dropped, guessed, merged, rescaled or reordered while a split was opened or decoded.

    It is said once, counted in the sidecar and shown by `check`.
    """

    kind: str  # a short word for the sidecar, such as "unlabelled"
    number: int  # of files, rows, classes or images
    text: str  # one line: what, how many, where, and what to do if it was not meant


class Rows(NamedTuple):
    """One split, opened: `pictures(numbers)` reads those rows as image-file bytes, or as finished RGB pictures."""

    labels: np.ndarray  # int64 [N], an index into `classes`, or -1 for a row without a label
    classes: tuple[str, ...]
    pictures: Callable[[Sequence[int]], list[bytes | Image.Image]]
    place: Callable[[int], str]  # how an error names a row: its file where there is one
    notes: tuple[Note, ...] = ()
    splits: tuple[str, ...] = ()  # names of all that the dataset has, as far as they are known


def unlabelled(value: object) -> bool:
    """Whether a table's label says that there is none: nothing, blanks, "nan", a number below 0 as number or text."""
    text = "" if value is None else str(value).strip()
    try:
        return not float(text) >= 0  # nan, too, is not
    except ValueError:
        return not text


def label_text(value: object, place: str) -> str | None:
    """What a list or a JSON says of an image's class; None: nothing. Raises DataError, naming `place`, for no label."""
    if isinstance(value, bool | float | list | dict):
        raise DataError(f"{place} has the label {one_line(repr(value))}, which is neither text nor an integer")
    return None if unlabelled(value) else str(value)


# What people call their splits. One of the second group is offered where the test split is missing.
USUAL: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation", "eval", "dev"),
}

_BUILTIN = "builtin:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


class Dataset(Strict):
    """One dataset, and how much of it is used.

    A path that begins with `.`, `/` or `~`, or that exists, is local; a relative one starts at the working directory. A
    folder holds `train/<class>/*.png` and `test/<class>/*.png`, images beside `train.csv` and `test.csv`, parquet or
    arrow files as the hub lays them out, webdataset shards, or what `save_to_disk` wrote. Columns are guessed only from
    one candidate.

    A fraction below 1 is drawn by the seed. The images of a smaller one are among those of a larger one.
    """

    path: str
    """A hub id (`owner/name`), a local folder or file, or `builtin:letters`, `builtin:greek`, `builtin:digits`."""
    config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset; pin it."""
    image: str | None = None
    """Image column; guessed where there is exactly one."""
    label: str | None = None
    """Label column; guessed where there is exactly one `ClassLabel`. Of a webdataset `.cls`, or `label` in `.json`."""
    train: str = Field("train", min_length=1)
    """Name of the train split."""
    test: str | float = "test"
    """Name of the test split; accuracies are measured on all of it. Or the share of each class of the train split that
    the recipe's seed holds out as the test split, where there is none; copies of an image stay on one side."""
    fraction: float = Field(1.0, gt=0, le=1)
    """γ: the share of the train split that is used."""
    balance: Balance = "classes"
    """What a fraction below 1 has of each class: the same number, as in the paper, or (`keep`) its share."""
    augment: Augment = "crop-flip"
    """Of training batches. `crop`: shifts by up to an eighth of the image, black moving in; `flip`: mirrors half.
    `resized-crop`: 8 to 100 % of the image at a ratio of 3/4 to 4/3, enlarged to the whole, as photographs are trained.
    """
    decode: Literal["auto", "cache", "stream"] = "auto"
    """`cache`: every image once, kept at 3 bytes a pixel; `stream`: once to look at it, then whenever a batch needs it,
    by processes of their own, kept nowhere. `auto` streams what would take more than half of the room left on the
    cache's disk. Images and results are the same."""

    @field_validator("test")
    @classmethod
    def _a_name_or_a_share(cls, test: str | float) -> str | float:
        if test and (isinstance(test, str) or 0 < test < 1):
            return test
        raise ValueError(f"{test!r} is neither a split's name nor a share between 0 and 1, such as 0.2")

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Dataset:
        if (info.context or {}).get("finished"):
            return self  # a finished run is looked at wherever it is, and its data may be out of reach there
        kind = kind_of(self.path)
        if kind == "builtin":
            self._check_builtin()
        elif kind == "hub" and not _HUB_ID.fullmatch(self.path):
            known = ", ".join(_BUILTIN + name for name in builtin.NAMES)
            said = f"is no existing file or folder, and neither a hub id (owner/name) nor a builtin ({known})"
            raise ValueError(f"path {self.path!r} {said}")
        elif kind == "local" and (self.config is not None or self.revision is not None):
            raise ValueError(f"config and revision are for hub ids; {self.path!r} is local")
        return self

    def _check_builtin(self) -> None:
        name, names = builtin_name(self), builtin.NAMES
        if name not in names:
            raise ValueError(f"no builtin dataset {name!r}{nearest(name, names)} (builtin: {', '.join(names)})")
        for key in ("config", "revision", "image", "label"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} means nothing for a builtin dataset; remove it")
        for split in (self.train, self.test):
            if split not in ("train", "test"):  # a share neither
                raise ValueError(f"a builtin dataset has the splits train and test, not {split!r}")


class Asked(NamedTuple):
    """A dataset under the name of its table, `data.ROLE`."""

    dataset: Dataset
    role: str

    @property
    def usual(self) -> set[str]:
        """What its splits may be called: as the recipe says, or as people do."""
        return {self.dataset.train, str(self.dataset.test), *USUAL["train"], *USUAL["test"]}

    def name(self, split: Split) -> str:
        return getattr(self.dataset, split)

    def where(self, split: Split, row: int | None = None) -> str:
        """How an error names a place in a dataset."""
        name = self.name(split)
        part = f"{name:g} of split {self.dataset.train!r}" if isinstance(name, float) else f"split {name!r}"
        return f"{self.dataset.path}, {part}" + ("" if row is None else f", row {row}")

    def check(self, split: Split, names: Iterable[str]) -> None:
        """Raise NoSplit unless the split that `split` stands for is among `names`."""
        wanted, names, role = self.name(split), sorted(map(str, names)), f"data.{self.role}"
        if wanted in names:
            return
        usual = [name for name in names if name.casefold() in (*USUAL[split], wanted.casefold())]
        hint = f'; write {split} = "{usual[0]}" in [{role}]' if usual else nearest(wanted, names)
        if split == "test" and not hint and self.dataset.train in names:
            hint = f"; write test = 0.2 in [{role}] to hold out a part of {self.dataset.train!r}"
        if split == "train" and not hint and len(names) == 1:
            hint = f'; add it, or divide the one that is there: train = "{names[0]}" and test = 0.2 in [{role}]'
        said = f"{role}.{split}: {self.dataset.path} has no split {wanted!r} (splits: {', '.join(names) or 'none'})"
        raise NoSplit(said + hint, usual)


def kind_of(path: str) -> Literal["builtin", "local", "hub"]:
    """Told by the path alone. Raises ValueError where it can be none."""
    if not path or "\0" in path:
        raise ValueError("path is empty" if not path else "path holds a NUL character")
    if path.startswith(_BUILTIN):
        return "builtin"
    return "local" if path.startswith((".", "/", "~")) or os.path.exists(path) else "hub"


def dataset_at(path: str) -> Dataset:
    """The dataset at a path, as a recipe has it, with what a builtin one wants. ValueError where it can be none."""
    if (kind := kind_of(path)) == "local" and not path.startswith((".", "/", "~")):
        path = f"./{path}"
    return Dataset.model_validate({"path": path, **(builtin.WANTED if kind == "builtin" else {})})


def builtin_name(dataset: Dataset) -> str:
    """NAME of "builtin:NAME"."""
    return dataset.path.removeprefix(_BUILTIN)
