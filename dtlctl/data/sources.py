"""Where images come from: the Hugging Face hub, local files, or the builtin datasets.

`rows` opens one of the splits of a `Dataset`. Nothing is decoded here, and the network is used for a hub id only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dtlctl.data import builtin
from dtlctl.data.dataset import Dataset, Note, Split, builtin_name, kind_of, where
from dtlctl.data.tables import check_split, from_files, from_hub
from dtlctl.errors import DataError, DtlError, nearest

if TYPE_CHECKING:
    from PIL import Image


class Rows(NamedTuple):
    """One split, opened: `pictures(numbers)` reads those rows as image-file bytes, or as finished RGB pictures."""

    labels: np.ndarray  # int64 [N], an index into `classes`, or -1 for a row without a label
    classes: tuple[str, ...]  # the same for both splits
    pictures: Callable[[Sequence[int]], list[bytes | Image.Image]]
    place: Callable[[int], str]  # how an error names a row: its file where there is one
    notes: tuple[Note, ...] = ()


def rows(dataset: Dataset, split: Split, image_size: int, role: str, scratch: Path) -> Rows:
    """Open a split. `role` is the name of the dataset's table under `[data]`; `scratch` is an existing folder that
    has to live as long as the rows do. Class names are those of the ClassLabel feature, else the sorted values of the
    train split. Raises DataError.
    """
    kind = kind_of(dataset.path)
    if kind == "builtin":
        pictures, numbers, names = builtin.load(builtin_name(dataset), getattr(dataset, split), image_size)
        read = lambda rows: [pictures[n] for n in rows]  # noqa: E731
        return Rows(np.array(numbers, np.int64), tuple(names), read, partial(where, dataset, split))
    if kind == "hub":
        tables = from_hub(dataset, split, role)
    else:
        tables = from_files(dataset, split, role, _local(dataset, role), scratch)
    table = tables[getattr(dataset, split)]
    image, label = _columns(dataset, role, table.features)
    labels, classes = _labels(dataset, split, role, tables, label)
    return Rows(labels, classes, _reader(dataset, split, role, table, image), partial(where, dataset, split))


def identity(dataset: Dataset, role: str) -> dict[str, Any]:
    """What tells this dataset's content from another's without reading it: JSON values. Raises DataError.

    A local dataset is its location and the size and time of every file. A hub id without a revision is taken for the
    same whenever it is asked for.
    """
    kind = kind_of(dataset.path)
    if kind == "builtin":
        return {"builtin": builtin_name(dataset), "version": builtin.VERSION}
    columns = {"image": dataset.image, "label": dataset.label, "train": dataset.train}
    if kind == "hub":
        return {"hub": dataset.path, "config": dataset.config, "revision": dataset.revision or "main", **columns}
    root = _local(dataset, role)
    return {"local": str(root), "files": _stats(root, role), **columns}


def _local(dataset: Dataset, role: str) -> Path:
    root = Path(os.path.abspath(os.path.expanduser(dataset.path)))
    if not root.exists():
        raise DataError(f"data.{role}.path: {dataset.path} does not exist (looked for {root})")
    return root


def _stats(root: Path, role: str) -> list[tuple[str, int, int]]:
    """Relative path, bytes and time in ns of every file."""
    try:
        return [(str(file.relative_to(root)), (s := file.stat()).st_size, s.st_mtime_ns) for file in _walk(root)]
    except OSError as error:
        raise DataError(f"data.{role}.path: {error.filename}: {error.strerror}") from error


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError):
        raise error

    if root.is_file():
        yield root
        return
    # Links are followed because `train` is often one.
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        subfolders.sort()
        yield from (Path(folder, file) for file in sorted(files))


def _columns(dataset: Dataset, role: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the image and the label column."""
    from datasets import ClassLabel, Image

    image = _column(dataset, role, features, "image", Image)
    if dataset.label is None and list(features) == [image]:
        raise DataError(
            f"{dataset.path} has images but no labels: of a folder, every image must lie at split/class/image, all at "
            "one depth, in at least two classes"
        )
    return image, _column(dataset, role, features, "label", ClassLabel)


def _column(
    dataset: Dataset, role: str, features: Mapping[str, Any], key: Literal["image", "label"], kind: type
) -> str:
    name, known = getattr(dataset, key), ", ".join(features)
    if name in features:
        return name
    if name is not None:
        raise DataError(
            f"data.{role}.{key}: {dataset.path} has no column {name!r}{nearest(name, features)} (columns: {known})"
        )
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise DataError(
            f"{dataset.path}: {len(found) or 'no'} columns of type {kind.__name__}, so the {key} column cannot be "
            f"guessed; set data.{role}.{key} (columns: {known})"
        )
    return found[0]


def _labels(
    dataset: Dataset, split: Split, role: str, tables: Mapping[str, Any], column: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [N], and the classes."""
    from datasets import ClassLabel

    table = tables[getattr(dataset, split)]
    feature = table.features[column]
    values = table.data.column(column).to_pylist()
    if isinstance(feature, ClassLabel):
        index: dict[Any, int] = {number: number for number in range(len(feature.names))}
        classes = tuple(feature.names)
    elif re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(feature, "dtype", ""))):
        # A test split may lack a class, so the train split alone says which there are.
        check_split(dataset, "train", role, tables)
        known = sorted({v for v in tables[dataset.train].data.column(column).to_pylist() if v not in (None, -1)})
        index = {value: number for number, value in enumerate(known)}
        classes = tuple(str(value) for value in known)
    else:
        raise DataError(
            f"data.{role}.label: {column!r} of {dataset.path} is {feature}, not ClassLabel, integer or text"
        )
    index.update({None: -1, -1: -1})
    for row, value in enumerate(values):
        if value not in index:
            raise DataError(f"{where(dataset, split, row)}: label {value!r} is none of the {len(classes)} classes")
    return np.array([index[value] for value in values], np.int64), classes


def _reader(dataset: Dataset, split: Split, role: str, table: Any, column: str) -> Callable[[Sequence[int]], list]:
    import datasets

    try:
        # Decoding is left to us, so that an error can name the row.
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except DtlError:
        raise
    except Exception as error:  # pyarrow's casts raise TypeError, ValueError and its own
        raise DataError(
            f"data.{role}.image: column {column!r} of {dataset.path} is {table.features[column]}, not images"
        ) from error

    def read(row: int, value: dict[str, Any] | None) -> bytes:
        if value and value["bytes"] is not None:
            return value["bytes"]
        if not value or value["path"] is None:
            raise DataError(f"{where(dataset, split, row)}: there is no image")
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{where(dataset, split, row)}: {value['path']}: {error.strerror}") from error

    return lambda numbers: [read(n, value) for n, value in zip(numbers, table[list(numbers)][column], strict=True)]
