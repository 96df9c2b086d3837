"""Images, decoded and resized once, kept as one memory-mapped array.

An entry is a folder of `pixels.npy`, `labels.npy` and `meta.json` whose name is a hash of everything that its content
depends on. It is written beside its place and renamed into it, so that any number of processes may ask for it at once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dtlctl.console.machine import cores
from dtlctl.data import files
from dtlctl.data.dataset import Dataset, Note, Split, where
from dtlctl.data.sources import Rows, identity, rows
from dtlctl.errors import DataError
from dtlctl.storage.checkpoint import sync

# Changing how images are decoded, resized or stored must change this number: it is part of the key.
_FORMAT = 3
_BATCH = 64  # images a task

Progress = Callable[[int, int], None]


class Images(NamedTuple):
    """One split in memory, or nearly so."""

    pixels: np.ndarray  # uint8 [N, 3, S, S], RGB, memory-mapped, read-only
    labels: np.ndarray  # int64 [N], indices into `classes`
    classes: tuple[str, ...]
    fingerprint: str  # SHA-256, in hex, of pixels, labels and class names: the content, not the file
    dropped: int  # rows without a label, which are not among the N
    notes: tuple[Note, ...] = ()


def load(
    dataset: Dataset, split: Split, image_size: int, *, role: str = "<role>", progress: Progress | None = None
) -> Images:
    """A split as RGB images of `image_size` x `image_size` pixels, decoded unless that has been done before.

    A picture that is not square is cut to its centre; transparency becomes white; 16-bit values are scaled to 8 bits;
    EXIF orientation is applied. `role` is the name of the dataset's table under `[data]`, for messages.
    `progress(done, total)` is called with numbers of images. Raises DataError: a source that cannot be read as the
    recipe says, an image that cannot be decoded, a class without a training image, a cache that cannot be written.
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
            _decode(source, image_size, work, where(dataset, split), progress)
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
        images = Images(
            pixels, labels, classes, meta["fingerprint"], meta["dropped"], tuple(Note(*n) for n in meta["notes"])
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    shape = (len(labels), 3, image_size, image_size)
    return images if (pixels.shape, pixels.dtype, labels.dtype) == (shape, np.uint8, np.int64) else None


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


def _decode(source: Rows, size: int, work: Path, name: str, progress: Progress | None) -> None:
    """Write a whole entry into the folder `work`. name: of the split."""
    kept = np.flatnonzero(source.labels >= 0)
    labels = source.labels[kept]
    shape = (len(kept), 3, size, size)
    digest = hashlib.sha256(json.dumps([source.classes, shape]).encode())
    digest.update(labels.astype("<i8").tobytes())

    def batch(start: int) -> np.ndarray:
        numbers = kept[start : start + _BATCH].tolist()
        pictures = source.pictures(numbers)
        return np.stack([_pixels(p, size, source.place(n)) for n, p in zip(numbers, pictures, strict=True)])

    # Plain writes, not stores into a map: on a full disk a store is a SIGBUS.
    with open(work / "pixels.npy", "wb") as file, closing(_parallel(batch, range(0, len(kept), _BATCH))) as batches:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        done = 0
        for pixels in batches:
            file.write(pixels.data)
            digest.update(pixels.data)
            done += len(pixels)
            if progress:
                progress(done, len(kept))
    np.save(work / "labels.npy", labels)
    meta = {
        "classes": source.classes,
        "fingerprint": digest.hexdigest(),
        "dropped": len(source.labels) - len(kept),
        "notes": source.notes,
        "source": name,
    }
    (work / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in [*work.glob("*.*"), work]:
        sync(path)


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


def _parallel(task: Callable[[int], np.ndarray], items: Sequence[int]) -> Generator[np.ndarray, None, None]:
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


def _pixels(picture: bytes | Image.Image, size: int, place: str) -> np.ndarray:
    """uint8 [3, size, size] of an image file's bytes or of a picture. Raises DataError, naming `place`."""
    try:
        if isinstance(picture, bytes):
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(picture), formats=files.formats()))
        # Cuts the centre in the wanted proportion, then resizes it; does nothing at the right size.
        fitted = ImageOps.fit(_rgb(picture), (size, size), Image.Resampling.BICUBIC)
    except UnidentifiedImageError as error:  # PIL's own text has the address of the bytes
        assert isinstance(picture, bytes)
        raise DataError(f"{place}: the image cannot be decoded: {files.reason(picture)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{place}: the image is too large to be decoded: {error}") from error
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{place}: the image cannot be decoded: {error}") from error
    return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def _rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode as RGB; transparency over white; wide modes (I;16, I, F) are taken to hold 16 bits."""
    if picture.mode.startswith(("I", "F")):
        picture = _narrow(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _narrow(picture: Image.Image) -> Image.Image:
    """16 bits to 8: 65535 becomes 255."""
    values = np.asarray(picture, np.float64)
    if not (values.min() >= 0 and values.max() <= 65535):
        raise ValueError(f"mode {picture.mode} with values outside [0, 65535]")
    return Image.fromarray((values / 257).round().astype(np.uint8))
