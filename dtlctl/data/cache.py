"""Images, decoded and resized once, each when it is first asked for, and kept in one array; streamed, only looked at.

An entry's name is a hash of all that its content depends on. It is renamed into its place, then filled (`entry`), so
that any number of processes may ask for it at once.
"""

import hashlib
import json
import os
import platform
import shutil
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dtlctl.console.machine import cores
from dtlctl.data import entry as entries
from dtlctl.data.classes import show, some
from dtlctl.data.dataset import Rows, Split
from dtlctl.data.entry import Entry, Images, Wanted
from dtlctl.data.pixels import Depth, Rule, decide, decode, hashed
from dtlctl.data.sources import Source
from dtlctl.data.stream import Streamed
from dtlctl.errors import CheckpointError, DataError, one_line
from dtlctl.storage import lock
from dtlctl.storage.checkpoint import sync, write

# Changing how images are chosen, decoded, resized or stored must change this number: it is part of the key.
_FORMAT = 8
_BATCH, _BYTES = 64, 1 << 20  # images a task, at most, and bytes of their pixels

Progress = Callable[[int, int], None]
Decoded = tuple[entries.Part, dict[int, Depth], dict[int, DataError]]
"""A part of an entry and, by place in it: depths where there are any, what is wrong with some."""


def load(
    source: Source, split: Split, image_size: int, wanted: Wanted | None = None, progress: Progress | None = None
) -> Images:
    """A split as RGB images of `image_size` x `image_size` pixels, decoded (`pixels.decode`) unless they were before.

    wanted: of the train split, the images that are; else all are. Where one of these has more than 8 bits, all are
    decoded; of a test split, those of the train split too, whose rule it is read by. `progress(done, total)` is called
    with numbers of images. Raises DataError.
    """

    def train_rule(whole: bool) -> Rule:
        return load(source, "train", image_size, None if whole else wanted, progress).rule

    if there := cached(source, split, image_size, wanted):
        return there
    own = wanted if split == "train" else None
    streamed = _is_streamed(source, split, image_size, own)
    place = _place(source, split, image_size, streamed)
    try:
        with _workplace(place) as work:
            rows = source.rows(split, image_size, _rows_of(place) if streamed else work / "scratch")
            entry = entries.read(place, image_size, streamed)
            if entry is None:
                check_classes(rows, split, source.where(split))
                entries.create(rows, work / "entry", image_size, source.where(split), streamed)
                entry = _publish(work / "entry", place, image_size, streamed)
            _decode(rows, entry, own, train_rule if split == "test" else None, progress)
    except OSError as error:
        raise DataError(f"cannot write the image cache {place.parent}: {error}; set DTLCTL_CACHE") from error
    found = cached(source, split, image_size, wanted)
    assert found
    return found


def cached(source: Source, split: Split, image_size: int, wanted: Wanted | None = None) -> Images | None:
    """What `load` would return, if it needs no decoding. Of local files only names, sizes and times are read."""
    own = wanted if split == "train" else None
    for streamed in {"cache": (False,), "stream": (True,), "auto": (False, True)}[source.dataset.decode]:
        place = _place(source, split, image_size, streamed)
        entry = entries.read(place, image_size, streamed)
        if entry is not None and not entry.missing(own).size:
            opened = partial(source.rows, split, image_size, _rows_of(place))
            stream = partial(Streamed, opened, entry.arrays["hashes"], entry.full, image_size)
            return entry.images(own, stream() if streamed else entry.arrays["pixels"])
    return None


def _is_streamed(source: Source, split: Split, image_size: int, wanted: Wanted | None) -> bool:
    """As the recipe says; or where the decoded images would take more than half of what is free on the cache's disk."""
    if source.dataset.decode != "auto" or source.kind == "builtin":
        return source.dataset.decode == "stream"
    rows = source.rows(split, image_size, None)
    check_classes(rows, split, source.where(split))
    labels = rows.labels[rows.labels >= 0]
    asked = labels if wanted is None else wanted(labels, len(rows.classes))
    images = max(len(asked), min(len(labels), entries.WHOLE))
    there = next(path for path in (folder(), *folder().parents) if path.exists())
    return 3 * image_size**2 * images > shutil.disk_usage(there).free // 2


def _rows_of(place: Path) -> Path:
    """Where a table's rows stay as long as they may be streamed: in an image's own bytes, not decoded."""
    return place.with_name(f"{place.name}.rows")


def folder() -> Path:
    """`$DTLCTL_CACHE`, else `dtlctl` under `$XDG_CACHE_HOME`, else `~/.cache/dtlctl`."""
    if chosen := os.environ.get("DTLCTL_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtlctl"


def _place(source: Source, split: Split, image_size: int, streamed: bool) -> Path:
    dataset = source.dataset
    if split == "test" and dataset.test == dataset.train:
        raise DataError(
            f"data.{source.role}.test: it is {dataset.test!r} as is `train`, so models would be tested on the images "
            "that they are trained on; name another split"
        )
    key = {
        "format": _FORMAT,
        "source": source.identity,
        "split": [split, dataset.test, None if isinstance(dataset.test, str) else source.seed],
        "image_size": image_size,
        **({"decode": "stream"} if streamed else {}),
    }
    return folder() / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


@contextmanager
def _workplace(place: Path) -> Iterator[Path]:
    """A folder beside the place, removed at the end; before, those that others left half-made when they died.

    Whose owner lives is told by locks: containers number their processes each for itself, and may share a name.
    """
    start = f"{place.name}.{platform.node()}"  # some file systems lock on one machine only
    for left in place.parent.glob(f"{start}.*.tmp"):
        with suppress(CheckpointError), lock.held(left):
            shutil.rmtree(left, ignore_errors=True)
    work = place.with_name(f"{start}.{uuid.uuid4().hex}.tmp")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        with suppress(CheckpointError):  # of a file system that knows no locks, where nothing is removed either
            stack.enter_context(lock.held(work))
        yield work


def _publish(work: Path, place: Path, image_size: int, streamed: bool) -> Entry:
    """Rename a new entry into its place, or take the one that another process put there meanwhile."""
    while True:
        try:
            os.rename(work, place)
        except OSError:  # there is one already, which may be damaged
            if not place.exists():
                raise
        sync(place.parent)
        if entry := entries.read(place, image_size, streamed):
            return entry
        # Renamed first: a reader must never see half a folder.
        damaged = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
        with suppress(FileNotFoundError):  # another process did it
            os.rename(place, damaged)
        shutil.rmtree(damaged, ignore_errors=True)


def _decode(
    source: Rows, entry: Entry, wanted: Wanted | None, train: Callable[[bool], Rule] | None, progress: Progress | None
) -> None:
    """Decode what is missing of an entry. train: gives a test split the rule of its train split, whole or as wanted.

    Of images of more than 8 bits only the depths are noted at first. If there are any, all others are decoded too, and
    these again by the rule that then is known for all.
    """
    kept, needed = np.flatnonzero(source.labels >= 0), entry.needed(wanted)
    if entry.classes != source.classes or not np.array_equal(entry.labels, source.labels[kept]):
        raise DataError(f"{entry.name}: it is not what it was when it was first read; remove {entry.place}")
    depths: dict[int, Depth] = {}

    def decoded(rows: np.ndarray, rule: Rule | None) -> Iterator[entries.Part]:
        size = max(1, min(_BATCH, _BYTES // (3 * entry.size**2)))
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        failed: list[DataError] = []
        with closing(_parallel(partial(_batch, source, entry.size, rule, kept, needed), chunks)) as batches:
            for number, (part, found, broken) in enumerate(batches, 1):
                depths.update(found)
                failed += [error for place, error in broken.items() if needed[place]]
                if unneeded := [error for place, error in broken.items() if not needed[place]]:
                    write(entry.place / entries.SAID, one_line(unneeded[0]).encode())
                yield part
                if progress:
                    progress(min(number * size, len(rows)), len(rows))
        if failed:  # all of them at once, so that nobody has to begin again for each
            others = [str(error).partition(": the image ")[0] for error in failed[1:]]
            raise DataError(f"{failed[0]}" + (f"\n{len(others)} more: {some(others, 20, repr)}" if others else ""))

    entry.write(decoded(entry.missing(wanted), entry.rule))
    if entry.rule is None:
        wide = bool(depths)
        if wide:
            left = np.flatnonzero(entry.arrays["state"] == 0)
            entry.write(decoded(np.setdiff1d(left, [*depths]), None))
        rule, notes = entries.read_rule(entry.place)  # of a process that has decoded some of them meanwhile
        if rule is None:
            rule, notes = decide(depths, entry.labels, entry.classes, entry.name, train(wide) if train else None)
        if wide:
            write(entry.place / entries.RULE, json.dumps({"rule": rule, "notes": notes}, indent=1).encode())
            entry.write(decoded(np.array(sorted(depths)), rule))


def _batch(
    source: Rows, size: int, rule: Rule | None, kept: np.ndarray, needed: np.ndarray, places: np.ndarray
) -> Decoded:
    """These places of an entry, which are the rows `kept` of the source.

    Without the `rule` images of more than 8 bits are not there, and black; so is one that is `needed` and broken.
    """
    pixels, states = np.zeros((len(places), 3, size, size), np.uint8), np.zeros(len(places), np.uint8)
    depths, broken, read = {}, dict[int, DataError](), []
    with suppress(DataError):  # that of one is raised below
        read = source.pictures(kept[places].tolist())
    for at, place in enumerate(places.tolist()):
        row = int(kept[place])
        try:
            picture = read[at] if read else source.pictures([row])[0]
            image, depth, frames = decode(picture, size, source.place(row), rule and rule.full)
        except DataError as error:
            broken[place] = error
            states[at] = 0 if needed[place] else entries.BROKEN
            continue
        if depth is not None:
            depths[place] = depth
        if image is not None and (rule or depth is None):
            pixels[at], states[at] = image, entries.FRAMES if frames else entries.DECODED
    return (places, pixels, hashed(pixels), states), depths, broken


def check_classes(source: Rows, split: Split, place: str) -> None:
    """Raise DataError, naming `place`, for a split that nothing could be learned from."""
    labels, classes = source.labels[source.labels >= 0], source.classes
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if not len(labels):
        raise DataError(f"{place}: no row has a label")
    if split == "train" and len(classes) < 2:
        raise DataError(f"{place}: only one class, {show(classes[0])}, and two are the least")
    if split == "train" and len(missing):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{place}: class {classes[missing[0]]!r}{more} has no image; add some, or take the name away")


def _parallel(task: Callable[[np.ndarray], Decoded], chunks: Iterable[np.ndarray]) -> Generator[Decoded, None, None]:
    """Results in order, never many ahead of the reader. PIL frees the interpreter while it decodes and resizes."""
    threads, waiting = cores(), deque[Future[Decoded]]()
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # PIL only warns of a picture that is up to twice too large.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for chunk in chunks:
            waiting.append(pool.submit(task, chunk))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
