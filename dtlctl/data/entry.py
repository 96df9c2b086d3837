"""One split in the cache: a folder of arrays with a place for every row, filled as rows are asked for.

`meta.json` and `labels.npy` are of the whole split. `state.npy` says which rows of `pixels.npy` (of streamed images
there is none) and `hashes.npy` have been decoded, and is written once these are on the disk. What a row becomes is the
same whoever decodes it, so any number of processes may fill an entry at once, and none of them is waited for.
`rule.json` is there where an image of more than 8 bits is: then all rows were looked at, as one rule holds for all.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtlctl.data.dataset import Note, Rows
from dtlctl.data.pixels import HASH, Rule
from dtlctl.data.stream import Streamed
from dtlctl.errors import DataError
from dtlctl.storage.checkpoint import sync

RULE, SAID = "rule.json", "broken.txt"
_SAFE = 8192  # images between two waits for the disk: no more are decoded in vain by a process that is killed
DECODED, FRAMES, BROKEN = 1, 2, 3
"""States of a row, 0 before: decoded; the same, with more frames than the first; no image that can be decoded."""
WHOLE = 10_000
"""A split of at most so many images is decoded whole, so that copies and broken images are told wherever they are."""

Wanted = Callable[[np.ndarray, int], np.ndarray]
"""The sorted places that are wanted of a split, by its labels and its number of classes."""

Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Places of rows; their pixels, hashes and states."""


class Kept:
    """uint8 [N, 3, S, S] in a file, read by any index of numpy's; not mapped: it may be larger than addresses are."""

    dtype = np.dtype("u1")

    def __init__(self, path: Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        if np.lib.format.read_magic(self._file) != (1, 0):
            raise ValueError(f"{path}: of another version")
        self.shape, _, dtype = np.lib.format.read_array_header_1_0(self._file)
        self.offset, self._each = self._file.tell(), math.prod(self.shape[1:])
        if dtype != self.dtype or os.fstat(self._file.fileno()).st_size < self.offset + len(self) * self._each:
            raise ValueError(f"{path}: not {self.shape} bytes")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = key if isinstance(key, np.ndarray) and key.dtype == np.int64 else np.arange(len(self))[key]
        found = np.empty((*rows.shape, *self.shape[1:]), np.uint8)
        for row, image in zip(rows.reshape(-1).tolist(), found.reshape(-1, self._each), strict=True):
            if os.preadv(self._file.fileno(), [image.data], self.offset + row * self._each) != self._each:
                raise OSError(f"{self._file.name}: cut short at image {row}")
        return found

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self[:]


class Images(NamedTuple):
    """One split in memory, or nearly so. Of pixels and hashes only those of `rows` are there."""

    pixels: np.ndarray | Kept | Streamed  # uint8 [N, 3, S, S], RGB: `pixels[rows]` is an array
    labels: np.ndarray  # int64 [N], indices into `classes`
    classes: tuple[str, ...]
    fingerprint: str  # SHA-256, in hex, of hashes of `rows`, labels and class names: the content, not the file
    listed: str  # the same without hashes
    dropped: int  # images without a label, which are not among the N
    notes: tuple[Note, ...]
    hashes: np.ndarray  # 16 bytes [N], memory-mapped: equal for images of equal pixels
    rule: Rule  # by which values of more than 8 bits became bytes
    rows: np.ndarray  # int64 [n], sorted: the images that have been looked at
    split: str  # the cache's name for it, the same whatever is asked for

    @property
    def known(self) -> np.ndarray:
        """The hashes of `rows`."""
        return self.hashes[self.rows]


class Entry(NamedTuple):
    """What is in the cache of a split."""

    place: Path
    labels: np.ndarray
    classes: tuple[str, ...]
    dropped: int
    name: str  # of the split, for messages
    notes: list[Note]
    rule: Rule | None  # None as long as no image of more than 8 bits has been seen
    size: int  # of an image: pixels a side
    arrays: dict[str, Any]  # hashes, state, mapped; `Kept` pixels, unless they are streamed

    def needed(self, wanted: Wanted | None) -> np.ndarray:
        """bool [N]: which images are wanted."""
        needed = np.full(len(self.labels), wanted is None)
        if wanted is not None:
            needed[wanted(self.labels, len(self.classes))] = True
        return needed

    def missing(self, wanted: Wanted | None) -> np.ndarray:
        """Places of what is yet to be decoded: images that are wanted, of a small split all others too."""
        state, needed = self.arrays["state"], self.needed(wanted)
        others = len(needed) <= WHOLE
        return np.flatnonzero(((state == 0) & (needed | others)) | ((state == BROKEN) & needed))

    def images(self, wanted: Wanted | None, pixels: Kept | Streamed) -> Images:
        """What `missing` leaves nothing of."""
        hashes, state = self.arrays["hashes"], np.array(self.arrays["state"])
        rows = np.flatnonzero(state != BROKEN if len(state) <= WHOLE else self.needed(wanted))
        listed = hashlib.sha256(json.dumps([self.classes, pixels.shape]).encode())
        listed.update(self.labels.astype("<i8").tobytes())
        content = listed.copy()
        content.update(hashes[rows].tobytes())
        frames, broken = int((state[rows] == FRAMES).sum()), int((state == BROKEN).sum()) if len(state) <= WHOLE else 0
        error, streamed = self.place / SAID, isinstance(pixels, Streamed)
        one = f" ({error.read_text('utf-8')})" if error.exists() else ""
        said = (
            ("frames", frames, f"of {frames} images with several frames or pages only the first is read"),
            ("broken", broken, f"{broken} images that cannot be decoded are outside of the subset{one}"),
            ("streamed", len(rows) * streamed, "images are decoded when a batch needs them, and not kept"),
        )
        notes = *self.notes, *(Note(kind, number, f"{self.name}: {text}") for kind, number, text in said if number)
        return Images(
            pixels, self.labels, self.classes, content.hexdigest(), listed.hexdigest(), self.dropped, notes,
            hashes, self.rule or Rule(), rows, self.place.name,
        )  # fmt: skip

    def full(self) -> int | None:
        """By what images of more than 8 bits are divided, as far as is known by now."""
        rule = read_rule(self.place)[0]
        return rule and rule.full

    def write(self, parts: Iterable[Part]) -> None:
        """Write decoded rows, part after part; their states last, once the rest is on the disk."""
        with ExitStack() as stack:
            # Plain writes, not stores into a map: on a full disk a store is a SIGBUS.
            files = {name: stack.enter_context(open(self.place / f"{name}.npy", "r+b")) for name in self.arrays}
            waiting: dict[int, np.ndarray] = {}

            def put(name: str, values: Iterable[tuple[int, np.ndarray]]) -> None:
                for row, value in values if name in files else ():
                    files[name].seek(self.arrays[name].offset + row * value.nbytes)
                    files[name].write(value.tobytes())

            def safe() -> None:
                for name, file in files.items():  # states last
                    put("state", waiting.items() if name == "state" else ())
                    file.flush()
                    os.fsync(file.fileno())
                waiting.clear()

            for rows, pixels, hashes, states in parts:
                put("pixels", zip(rows.tolist(), pixels, strict=True))
                put("hashes", zip(rows.tolist(), hashes, strict=True))
                waiting.update(zip(rows.tolist(), states, strict=True))
                if len(waiting) >= _SAFE:
                    safe()
            safe()


def create(source: Rows, work: Path, image_size: int, name: str, streamed: bool) -> None:
    """Write an entry of which no row is decoded into the new folder `work`."""
    work.mkdir(parents=True)
    kept = source.labels[source.labels >= 0]
    np.save(work / "labels.npy", kept)
    for array, (shape, dtype) in _layout(len(kept), image_size, streamed).items():
        with open(work / f"{array}.npy", "wb") as file:
            about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)  # holes take no room on the disk
    dropped = len(source.labels) - len(kept)
    meta = {"classes": source.classes, "dropped": dropped, "name": name, "notes": source.notes}
    (work / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in [*work.iterdir(), work]:
        sync(path)


def read(place: Path, image_size: int, streamed: bool) -> Entry | None:
    """A sound entry, or None. Content is not verified: only a crash of the machine could have changed it.

    Runs of one process that read the same, as a sweep's, share it: its files stay open. DataError where too many are.
    """
    try:
        return _read(place, image_size, streamed, tuple(map(_stamp, [place, *sorted(place.glob("*"))])))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{place}: {error.strerror}; allow more: ulimit -n 8192") from error
        return None


def _stamp(path: Path) -> tuple[str, int, int, int]:
    found = path.stat()
    return path.name, found.st_ino, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _read(place: Path, image_size: int, streamed: bool, stamps: tuple[tuple[str, int, int, int], ...]) -> Entry | None:
    """As `read`, of files that are as the stamps say. Raises OSError."""
    files = {name: place / f"{name}.npy" for name in _layout(0, image_size, streamed)}
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        arrays = {name: Kept(at) if name == "pixels" else np.load(at, mmap_mode="r") for name, at in files.items()}
        labels, (rule, said) = np.load(place / "labels.npy"), read_rule(place)
        classes, notes = tuple(meta["classes"]), [Note(*note) for note in meta["notes"]] + said
        entry = Entry(place, labels, classes, meta["dropped"], meta["name"], notes, rule, image_size, arrays)
    except (EOFError, ValueError, KeyError, TypeError):
        return None
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return entry if found == _layout(len(labels), image_size, streamed) and labels.dtype == np.int64 else None


def read_rule(place: Path) -> tuple[Rule | None, list[Note]]:
    """The rule for images of more than 8 bits, once there is one, and what is said of it."""
    with suppress(FileNotFoundError):
        document = json.loads((place / RULE).read_bytes())
        return Rule(*document["rule"]), [Note(*note) for note in document["notes"]]
    return None, []


def _layout(images: int, size: int, streamed: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types of the arrays, states last."""
    pixels = {} if streamed else {"pixels": ((images, 3, size, size), Kept.dtype)}
    return {**pixels, "hashes": ((images,), HASH), "state": ((images,), np.dtype("u1"))}
