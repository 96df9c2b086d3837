"""Images decoded whenever a batch needs them (`decode = "stream"`): only their hashes are kept in the cache.

Every image was looked at once before, as for the cache. From then on threads read, and processes decode, a few batches
ahead of whoever asks. torch's DataLoader serves one reader in one order; here a training, its tests and several
attackers share these processes, wherever they stand.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from threading import Lock, Thread

import numpy as np
from PIL import Image

from dtlctl.console.machine import cores
from dtlctl.data.dataset import Rows
from dtlctl.data.pixels import decode, hashed
from dtlctl.errors import DataError

_PIECE = 16
"""Images that one thread reads and one process decodes at a time."""
AHEAD = 2
"""Batches that are begun before they are asked for."""


class Streamed:
    """Rows of uint8 [N, 3, S, S]: `pixels[rows]` waits for them, `ask(rows)` begins them.

    opened: opens the split, when the first row is asked for, of which those with a label count; hashes: of the N
    images' pixels; full: by what values of more than 8 bits are divided, as `pixels.decode` has it.
    """

    def __init__(self, opened: Callable[[], Rows], hashes: np.ndarray, full: Callable[[], int | None], size: int):
        self.shape = (len(hashes), 3, size, size)
        self._opened, self._hashes, self._full = opened, hashes, full
        self._lock, (self._readers, self._decoders) = Lock(), _pools(os.getpid())
        self._source: tuple[Rows, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.ask(rows)()

    def ask(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """What is returned waits for these rows. Raises DataError for an image that is another one by now."""
        parts = [rows[start : start + _PIECE] for start in range(0, len(rows), _PIECE)]
        pieces = [self._readers.submit(self._piece, part) for part in parts]
        nothing = np.empty((0, *self.shape[1:]), np.uint8)
        return lambda: np.concatenate([nothing, *(piece.result() for piece in pieces)])

    def _piece(self, rows: np.ndarray) -> np.ndarray:
        source, labelled = self._split()
        numbers = labelled[rows].tolist()
        places = [source.place(number) for number in numbers]
        pictures = source.pictures(numbers)
        try:
            task = self._decoders.submit(_decoded, pictures, places, self.shape[-1], self._full())
            pixels, hashes = task.result()
        except BrokenProcessPool as error:
            raise DataError(f"{places[0]}: a process that decodes images was killed; is the memory full?") from error
        if others := [place for place, same in zip(places, hashes == self._hashes[rows], strict=True) if not same]:
            raise DataError(f"{others[0]}: the image is not what it was when it was first looked at; start again")
        return pixels

    def _split(self) -> tuple[Rows, np.ndarray]:
        """The split, and the places in it of the N images."""
        with self._lock:
            if self._source is None:
                rows = self._opened()
                self._source = rows, np.flatnonzero(rows.labels >= 0)
        return self._source


def _decoded(
    pictures: Sequence[bytes | Image.Image], places: Sequence[str], size: int, full: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 3, size, size] and hashes. Where `full` is missing an image of more than 8 bits is black."""
    found = np.zeros((len(pictures), 3, size, size), np.uint8)
    for image, picture, place in zip(found, pictures, places, strict=True):
        image[:] = 0 if (decoded := decode(picture, size, place, full)[0]) is None else decoded
    return found, hashed(found)


@cache
def _pools(process: int) -> tuple[ThreadPoolExecutor, ProcessPoolExecutor]:
    """Those of a process, for all that it streams; a fork of it has its own. Nothing is started before it is needed."""
    workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # Not forks of this process: its threads hold locks, and its accelerator cannot be shared.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Twice as many read as decode: each waits until what it has read is decoded.
    readers, decoders = ThreadPoolExecutor(2 * workers, "read"), ProcessPoolExecutor(workers, context, _begin)
    # Python before 3.11.5 would wait at exit, without end, for a process that was killed to read what it was to decode.
    decoders._call_queue.cancel_join_thread()  # type: ignore[attr-defined]
    return readers, decoders


def _begin() -> None:
    """A process that decodes leaves Ctrl-C to its owner, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = multiprocessing.parent_process()
    assert owner

    def follow() -> None:
        owner.join()
        os._exit(0)

    Thread(target=follow, daemon=True).start()
