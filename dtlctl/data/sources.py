"""Where images come from: the hub, local files, or builtin. Nothing is decoded; the network is for a hub id only."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dtlctl.data import builtin, files, subset, tables, webdataset
from dtlctl.data.classes import align, some
from dtlctl.data.dataset import USUAL, Asked, Dataset, Note, Rows, Split, builtin_name, kind_of
from dtlctl.data.shards import files_in
from dtlctl.errors import DataError


class Source:
    """One dataset of a recipe, `data.ROLE`, and its splits. Files are looked at once, when they are first asked for.

    seed: draws a test split that is a share. All raise DataError.
    """

    def __init__(self, dataset: Dataset, role: str = "<role>", seed: int = 0):
        self.dataset, self.role, self.seed, self.kind = dataset, role, seed, kind_of(dataset.path)
        self.where = Asked(dataset, role).where
        named = dataset if isinstance(dataset.test, str) else dataset.model_copy(update={"test": "test"})
        self._asked = Asked(named, role)

    def rows(self, split: Split, image_size: int, scratch: Path | None) -> Rows:
        """A split; its classes are those of the train split, to which labels are matched by name.

        scratch: a folder, made if need be, that lives as long as the rows do; an image of a table needs it, and so do
        copies of one image, which a test split that is a share has on one side.
        """
        share = self.dataset.test
        if scratch:
            scratch.mkdir(parents=True, exist_ok=True)
        if isinstance(share, str):
            return self._named(split, image_size, scratch)
        whole = self._named("train", image_size, scratch)
        if there := [name for name in whole.splits if name.casefold() in USUAL["test"] and name != self.dataset.train]:
            raise DataError(
                f"data.{self.role}.test: {self.dataset.path} has a split {there[0]!r}, so test = {share:g} would hold "
                f'out a second one; write test = "{there[0]}", or move that split away'
            )
        drawn = subset.held_out(whole.labels, whole.classes, share, self.seed, self.where(split))
        held = drawn[_first_copies(whole, scratch / "copies.npy") if scratch else slice(None)]
        for label, name in enumerate(whole.classes):
            if len({*held[whole.labels == label].tolist()}) == 1:
                raise DataError(
                    f"{self.where(split)}: too many images of class {name!r} are copies of each other to hold out "
                    f"test = {share:g}; remove copies, or leave the class out"
                )
        notes = list(whole.notes)
        if moved := int((held != drawn).sum()):
            copies = f"{moved:,} {'copy' if moved == 1 else 'copies'} of images"
            text = f"{self.where('train')}: {copies} went to the side of test = {share:g} where the image is"
            notes.append(Note("copies-beside", moved, text))
        chosen = np.flatnonzero(held if split == "test" else ~held)
        pictures, place = whole.pictures, whole.place
        return whole._replace(
            labels=whole.labels[chosen],
            pictures=lambda rows: pictures(chosen[list(rows)].tolist()),
            place=lambda row: place(int(chosen[row])),
            notes=tuple(notes) if split == "train" else (),
        )

    def listed(self, split: Split) -> Rows | None:
        """As `rows` of local data, of which file names and columns of labels are read and no image is; else None."""
        return self.rows(split, 0, None) if self.kind == "local" else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this dataset's content from another's without reading it: JSON values.

        Of local files the size and time, of those too that tables name, and the image formats that can be read. A hub
        id without a revision is taken for the same whenever it is asked for.
        """
        dataset = self.dataset
        if self.kind == "builtin":
            return {"builtin": builtin_name(dataset), "version": builtin.VERSION}
        columns = {"image": dataset.image, "label": dataset.label, "train": dataset.train}
        if self.kind == "hub":
            return {"hub": dataset.path, "config": dataset.config, "revision": dataset.revision or "main", **columns}
        try:
            own = os.stat(self._root)
            stats = [*self._tree.stats] if self._tree else [(str(self._root), own.st_size, own.st_mtime_ns)]
            packed = [name for name, _, _ in stats if name.lower().endswith(tables.SUFFIXES)]
            named = {path for name in packed for path in files_in(os.path.join(self._root, name), dataset.image)}
            stats += [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in sorted(named)]
        except OSError as error:
            raise DataError(f"data.{self.role}.path: {error.filename}: {error.strerror}") from error
        listing = hashlib.sha256(json.dumps(stats).encode()).hexdigest()  # once: there may be a million files
        return {"local": str(self._root), "files": listing, "formats": files.formats(), **columns}

    @cached_property
    def _root(self) -> Path:
        root = Path(os.path.abspath(os.path.expanduser(self.dataset.path)))
        if not root.exists():
            raise DataError(f"data.{self.role}.path: {self.dataset.path} does not exist (looked for {root})")
        return root

    @cached_property
    def _tree(self) -> files.Tree | None:
        return files.Tree(self._root, self.role) if self._root.is_dir() else None

    @cached_property
    def _opened(self) -> Callable[[Split, Path | None], Rows]:
        if self.kind == "hub":
            return tables.from_hub(self._asked).rows
        if not self._tree:
            return tables.from_file(self._asked, self._root).rows
        if found := tables.from_folder(self._asked, self._tree):
            return found.rows
        packed = webdataset.from_folder(self._asked, self._tree)
        images = cache(packed or partial(files.opened, self._asked, self._tree))
        return lambda split, scratch: images(split)

    def _named(self, split: Split, image_size: int, scratch: Path | None) -> Rows:
        if self.kind == "builtin":
            pictures, numbers, names = builtin.load(builtin_name(self.dataset), self._asked.name(split), image_size)
            labels, place = np.array(numbers, np.int64), partial(self.where, split)
            return Rows(labels, tuple(names), lambda rows: [pictures[row] for row in rows], place)
        own, train = self._opened(split, scratch), self._opened("train", None).classes
        unused = sorted({*own.splits} - {self._asked.dataset.train, self._asked.dataset.test, ""})
        if unused and split == "train":
            text = f"{self.dataset.path}: not used, as neither split of the recipe: {some(unused)}"
            own = own._replace(notes=(*own.notes, Note("unused", len(unused), text)))
        return align(own, train, self._asked.where(split), self.dataset.train)


def _first_copies(whole: Rows, file: Path) -> np.ndarray:
    """int64 [N]: by row the first one whose image has the same bytes, in its file or, of a picture, in its pixels.

    file: where this is kept, as every image is read for it.
    """
    with suppress(OSError, ValueError, EOFError):
        return np.load(file)
    first, known = np.arange(len(whole.labels)), dict[bytes, int]()
    for row in np.flatnonzero(whole.labels >= 0).tolist():
        with suppress(DataError):  # of an image that cannot be read; it is told where it is decoded
            (picture,) = whole.pictures([row])
            blob = picture if isinstance(picture, bytes) else picture.tobytes()
            first[row] = known.setdefault(hashlib.blake2b(blob, digest_size=16).digest(), row)
    np.save(file, first)
    return first
