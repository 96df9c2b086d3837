"""Where images come from: the Hugging Face hub, local files, or the builtin datasets.

`rows` opens one of the splits of a `Dataset`. Nothing is decoded here, and the network is used for a hub id only.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtlctl.data import builtin, files, subset, tables
from dtlctl.data.classes import align, some
from dtlctl.data.dataset import USUAL, Dataset, Note, Rows, Split, builtin_name, kind_of, where
from dtlctl.data.shards import files_in
from dtlctl.errors import DataError


def rows(dataset: Dataset, split: Split, image_size: int, role: str, scratch: Path | None, seed: int = 0) -> Rows:
    """Open a split. `role` is the name of the dataset's table under `[data]`; `scratch` is an existing folder that
    has to live as long as the rows do; without it no image of a table can be read. The classes are those of the train
    split, and the test split's labels are matched to them by name. `seed` draws what `test` holds out, where it is a
    share; with `scratch`, copies of one image are then put on one side. Raises DataError.
    """
    share = dataset.test
    if isinstance(share, str):
        return _named(dataset, split, image_size, role, scratch)
    whole = _named(dataset.model_copy(update={"test": "test"}), "train", image_size, role, scratch)
    if there := [name for name in whole.splits if name.casefold() in USUAL["test"]]:
        raise DataError(
            f"data.{role}.test: {dataset.path} has a split {there[0]!r}, so test = {share:g} would hold out a second "
            f'one; write test = "{there[0]}", or move that split away'
        )
    pictures, place = whole.pictures, whole.place
    drawn = subset.held_out(whole.labels, whole.classes, share, seed, where(dataset, split))
    held = drawn[_first_copies(whole) if scratch else slice(None)]
    for label, name in enumerate(whole.classes):
        if len({*held[whole.labels == label].tolist()}) == 1:
            raise DataError(f"{where(dataset, split)}: too many images of class {name!r} are copies of each other to "
                            f"hold out test = {share:g}; remove copies, or leave the class out")  # fmt: skip
    notes = list(whole.notes)
    if moved := int((held != drawn).sum()):
        text = f"{where(dataset, 'train')}: {moved:,} copies of images went to the side of test = {share:g} where the "
        notes.append(Note("copies-beside", moved, text + "image is"))
    chosen = np.flatnonzero(held if split == "test" else ~held)
    return whole._replace(
        labels=whole.labels[chosen],
        pictures=lambda rows: pictures(chosen[list(rows)].tolist()),
        place=lambda row: place(int(chosen[row])),
        notes=tuple(notes) if split == "train" else (),
    )


def _first_copies(whole: Rows) -> np.ndarray:
    """int64 [N]: by row the first one whose image has the same bytes, in its file or, of a picture, in its pixels."""
    first, known = np.arange(len(whole.labels)), dict[bytes, int]()
    for row in np.flatnonzero(whole.labels >= 0).tolist():
        with suppress(DataError):  # of an image that cannot be read; it is told where it is decoded
            (picture,) = whole.pictures([row])
            blob = picture if isinstance(picture, bytes) else picture.tobytes()
            first[row] = known.setdefault(hashlib.blake2b(blob, digest_size=16).digest(), row)
    return first


def _named(dataset: Dataset, split: Split, image_size: int, role: str, scratch: Path | None) -> Rows:
    """A split that the dataset has by name."""
    kind = kind_of(dataset.path)
    if kind == "builtin":
        pictures, numbers, names = builtin.load(builtin_name(dataset), getattr(dataset, split), image_size)
        read = lambda rows: [pictures[n] for n in rows]  # noqa: E731
        return Rows(np.array(numbers, np.int64), tuple(names), read, partial(where, dataset, split))
    source: tables.Source | None
    if kind == "hub":
        source = tables.from_hub(dataset, role)
    elif (root := _local(dataset, role)).is_file():
        source = tables.from_file(dataset, split, role, root, scratch)
    else:
        tree = files.walk(root, role)
        source = tables.from_folder(dataset, split, role, tree, scratch)
    if source is None:
        own = files.opened(dataset, split, role, tree)
        train = own.classes if split == "train" else files.opened(dataset, "train", role, tree).classes
    else:
        own = tables.opened(dataset, split, role, source)
        train = own.classes if split == "train" else tables.labels(dataset, "train", role, source)[1]
    unused = sorted({*own.splits} - {dataset.train, dataset.test, ""})
    if unused and split == "train":
        text = f"{dataset.path}: not used, as neither split of the recipe: {some(unused)}"
        own = own._replace(notes=(*own.notes, Note("unused", len(unused), text)))
    return align(own, train, where(dataset, split), dataset.train)


def listed(dataset: Dataset, split: Split, role: str) -> Rows | None:
    """As `rows` of local data, of which names of files and columns of labels are read and no image is; else None."""
    if kind_of(dataset.path) != "local":
        return None
    return rows(dataset, split, 0, role, None)


def identity(dataset: Dataset, role: str) -> dict[str, Any]:
    """What tells this dataset's content from another's without reading it: JSON values. Raises DataError.

    A local dataset is its location, the size and time of every file, of those too that its tables name, and the image
    formats that can be read. A hub id without a revision is taken for the same whenever it is asked for.
    """
    kind = kind_of(dataset.path)
    if kind == "builtin":
        return {"builtin": builtin_name(dataset), "version": builtin.VERSION}
    columns = {"image": dataset.image, "label": dataset.label, "train": dataset.train}
    if kind == "hub":
        return {"hub": dataset.path, "config": dataset.config, "revision": dataset.revision or "main", **columns}
    root = _local(dataset, role)
    names = files.walk(root, role).files if root.is_dir() else [""]
    try:
        # Of as many files as there may be, paths of pathlib would take longer than the rest.
        paths = [os.path.join(root, name) if name else str(root) for name in names]
        stats = [(name, (s := os.stat(path)).st_size, s.st_mtime_ns) for name, path in zip(names, paths, strict=True)]
        packed = [
            (path, stat[2]) for path, stat in zip(paths, stats, strict=True) if path.lower().endswith(tables.SUFFIXES)
        ]
        named = {path for table, time in packed for path in files_in(Path(table), dataset.image, time)}
        stats += [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in sorted(named)]
    except OSError as error:
        raise DataError(f"data.{role}.path: {error.filename}: {error.strerror}") from error
    return {"local": str(root), "files": stats, "formats": files.formats(), **columns}


def _local(dataset: Dataset, role: str) -> Path:
    root = Path(os.path.abspath(os.path.expanduser(dataset.path)))
    if not root.exists():
        raise DataError(f"data.{role}.path: {dataset.path} does not exist (looked for {root})")
    return root
