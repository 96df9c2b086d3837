"""Images, decoded and resized once, kept as one memory-mapped array.

An entry is a folder of `pixels.npy`, `labels.npy`, `hashes.npy` and `meta.json` whose name is a hash of everything that
its content depends on. It is written beside its place and renamed into it, so that any number of processes may ask for
it at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from dtlctl.console.machine import cores
from dtlctl.data.dataset import Dataset, Note, Split, where
from dtlctl.data.pixels import Depth, Rule, decide, decode
from dtlctl.data.sources import Rows, identity, rows
from dtlctl.errors import DataError
from dtlctl.storage.checkpoint import sync

# Changing how images are chosen, decoded, resized or stored must change this number: it is part of the key.
_FORMAT = 4
_BATCH = 64  # images a task
_HASH = np.dtype("V16")

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Images(NamedTuple):
    """One split in memory, or nearly so."""

    pixels: np.ndarray  # uint8 [N, 3, S, S], RGB, memory-mapped, read-only
    labels: np.ndarray  # int64 [N], indices into `classes`
    classes: tuple[str, ...]
    fingerprint: str  # SHA-256, in hex, of hashes, labels and class names: the content, not the file
    dropped: int  # rows without a label, which are not among the N
    notes: tuple[Note, ...]
    hashes: np.ndarray  # 16 bytes [N], memory-mapped: equal for images of equal pixels
    rule: Rule  # by which values of more than 8 bits became bytes


def load(
    dataset: Dataset, split: Split, image_size: int, *, role: str = "<role>", progress: Progress | None = None
) -> Images:
    """A split as RGB images of `image_size` x `image_size` pixels, decoded unless that has been done before.

    See `pixels.decode` for what becomes of an image. A test split is read by the rule that its train split gave, which
    is decoded first. `role` is the name of the dataset's table under `[data]`, for messages. `progress(done, total)` is
    called with numbers of images. Raises DataError: a source that cannot be read as the recipe says, an image that
    cannot be decoded, a class without a training image, a cache that cannot be written.
    """
    place = _place(dataset, split, image_size, role)
    images = _read(place, image_size)
    if images is None:
        work = place.with_name(f"{place.name}.{platform.node()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        try:
            _sweep(place)
            (work / "scratch").mkdir(parents=True)
            source = rows(dataset, split, image_size, role, work / "scratch")
            _check_classes(source, dataset, split)
            train = load(dataset, "train", image_size, role=role, progress=progress).rule if split == "test" else None
            _decode(source, image_size, work, where(dataset, split), train, progress)
            shutil.rmtree(work / "scratch")
            images = _publish(work, place, image_size)
        except OSError as error:
            raise DataError(f"cannot write the image cache {place.parent}: {error}; set DTLCTL_CACHE") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return images


def cached(dataset: Dataset, split: Split, image_size: int, *, role: str = "<role>") -> Images | None:
    """What `load` would return, if it needs no decoding. Of local files only names, sizes and times are read.

    Raises DataError for a local path that does not exist.
    """
    return _read(_place(dataset, split, image_size, role), image_size)


def folder() -> Path:
    """`$DTLCTL_CACHE`, else `dtlctl` under `$XDG_CACHE_HOME`, else `~/.cache/dtlctl`."""
    if chosen := os.environ.get("DTLCTL_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtlctl"


def _place(dataset: Dataset, split: Split, image_size: int, role: str) -> Path:
    if split == "test" and dataset.test == dataset.train:
        raise DataError(
            f"data.{role}.test: it is {dataset.test!r} as is `train`, so models would be tested on the images that "
            "they are trained on; name another split"
        )
    key = {
        "format": _FORMAT,
        "source": identity(dataset, role),
        "split": getattr(dataset, split),
        "image_size": image_size,
    }
    return folder() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _sweep(place: Path) -> None:
    """Remove what processes of this machine left half-made when they died."""
    for path in place.parent.glob(f"{place.name}.{platform.node()}.*.tmp"):
        with suppress(ValueError, PermissionError):
            try:
                os.kill(int(path.name.split(".")[-3]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)


def _read(place: Path, image_size: int) -> Images | None:
    """A complete entry, or None. Content is not verified: only a crash of the machine could have changed it."""
    try:
        meta = json.loads((place / "meta.json").read_bytes())
        classes = tuple(meta["classes"])
        pixels = np.load(place / "pixels.npy", mmap_mode="r")
        labels = np.load(place / "labels.npy")
        hashes = np.load(place / "hashes.npy", mmap_mode="r")
        notes, rule = tuple(Note(*note) for note in meta["notes"]), Rule(*meta["rule"])
        images = Images(pixels, labels, classes, meta["fingerprint"], meta["dropped"], notes, hashes, rule)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    shape = (len(labels), 3, image_size, image_size)
    fits = (pixels.shape, pixels.dtype, labels.dtype) == (shape, np.uint8, np.int64)
    return images if fits and (hashes.shape, hashes.dtype) == ((len(labels),), _HASH) else None


def _publish(work: Path, place: Path, image_size: int) -> Images:
    """Rename a finished entry into its place, or take the one that another process put there meanwhile."""
    while True:
        try:
            os.rename(work, place)
        except OSError:
            theirs = _read(place, image_size)
            if theirs is not None:
                return theirs
            if not place.exists():
                raise
            # Renamed first: a reader must never see half a folder.
            damaged = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
            with suppress(FileNotFoundError):  # another process did it
                os.rename(place, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            sync(place.parent)
            images = _read(place, image_size)
            assert images is not None
            return images


def _decode(
    source: Rows, size: int, work: Path, name: str, train: Rule | None, progress: Progress | None = None
) -> None:
    """Write a whole entry into the folder `work`. name: of the split; train: the rule of a test split's train split.

    Images of wide modes are looked at first, and decoded again once the rule for all of them is known.
    """
    kept = np.flatnonzero(source.labels >= 0)
    labels, hashes = source.labels[kept], np.zeros(len(kept), _HASH)
    shape, depths = (len(kept), 3, size, size), {}
    # Plain writes, not stores into a map: on a full disk a store is a SIGBUS.
    with open(work / "pixels.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        start = file.tell()

        def write(chunks: Sequence[Sequence[int]], total: int, full: int | None = None) -> None:
            done = 0
            with closing(_parallel(lambda chunk: _batch(source, kept[chunk], size, full), chunks)) as batches:
                for chunk, (pixels, digests, found) in zip(chunks, batches, strict=True):
                    file.seek(start + chunk[0] * pixels[0].nbytes)
                    file.write(pixels.data)
                    hashes[chunk[0] : chunk[0] + len(chunk)] = digests
                    depths.update({chunk[place]: depth for place, depth in found.items()})
                    done += len(chunk)
                    if progress:
                        progress(done, total)

        everything = range(len(kept))
        write([everything[place : place + _BATCH] for place in everything[::_BATCH]], len(kept))
        rule, notes = decide(depths.values(), len(kept), name, train)
        if wide := [[place] for place, depth in depths.items() if depth.kind != "colour"]:
            write(wide, len(wide), rule.full)
    np.save(work / "labels.npy", labels)
    np.save(work / "hashes.npy", hashes)
    digest = hashlib.sha256(json.dumps([source.classes, shape]).encode())
    for part in (labels.astype("<i8"), hashes):
        digest.update(part.tobytes())
    meta = {
        "classes": source.classes,
        "fingerprint": digest.hexdigest(),
        "dropped": len(source.labels) - len(kept),
        "notes": [*source.notes, *notes],
        "rule": rule,
        "source": name,
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in [*work.glob("*.*"), work]:
        sync(path)


def _batch(
    source: Rows, rows: np.ndarray, size: int, full: int | None
) -> tuple[np.ndarray, np.ndarray, dict[int, Depth]]:
    """uint8 [n, 3, size, size], their hashes, and the depths there are, by place; black for what `full` must scale."""
    numbers = rows.tolist()
    pixels, depths = np.zeros((len(numbers), 3, size, size), np.uint8), {}
    for place, (number, picture) in enumerate(zip(numbers, source.pictures(numbers), strict=True)):
        image, depth = decode(picture, size, source.place(number), full)
        if image is not None:
            pixels[place] = image
        if depth is not None:
            depths[place] = depth
    digests = b"".join(hashlib.blake2b(image.data, digest_size=_HASH.itemsize).digest() for image in pixels)
    return pixels, np.frombuffer(digests, _HASH), depths


def _check_classes(source: Rows, dataset: Dataset, split: Split) -> None:
    labels, classes = source.labels[source.labels >= 0], source.classes
    if not len(labels):
        raise DataError(f"{where(dataset, split)}: no row has a label")
    if split == "test":
        return
    if len(classes) < 2:
        raise DataError(f"{where(dataset, split)}: only one class, {classes}")
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(missing):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{where(dataset, split)}: class {classes[missing[0]]!r}{more} has no image")


def _parallel(task: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Results in order, never many ahead of the reader. PIL frees the interpreter while it decodes and resizes."""
    threads = cores()
    waiting: deque = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # PIL only warns of a picture that is up to twice too large.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
