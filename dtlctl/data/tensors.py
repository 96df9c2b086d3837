"""Batches as tensors: cut from the decoded array, moved once, augmented all together on the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """x: float [B, 3, S, S] in [0, 1]; y: int64 [B]; rows: int64 [B] on the CPU, places in the dataset."""

    x: Tensor
    y: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes."""

    rank: int = 0
    processes: int = 1

    def of(self, items: Tensor) -> Tensor:
        """A contiguous share of dimension 0; shares differ in size by at most one."""
        n = len(items)
        return items[n * self.rank // self.processes : n * (self.rank + 1) // self.processes]


class Batches:
    """Training batches: batch number i is a pure function of (seed, i), on any number of processes.

    Every epoch is a fresh permutation; a rest smaller than a batch is left to the next epoch's luck. A dataset
    smaller than one batch is one batch. Crops and flips are drawn for the global batch, then shared out.

    pixels: uint8 arrays [N, 3, S, S], taken one after the other; labels: integers, one an image of all of them; index:
    the rows, of all of them, that are trained on. Nothing else of the arrays is read or moved.
    """

    def __init__(
        self,
        pixels: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray,
        index: np.ndarray,
        *,
        batch_size: int,
        augment: str,
        seed: int,
        device: torch.device,
        share: Share = Share(),
    ):
        self.batch_size = min(batch_size, len(index))
        self.images = len(index)
        self.augment, self.seed, self.device, self.share = augment, seed, device, share
        self.rows = torch.from_numpy(np.ascontiguousarray(index))
        self.labels = torch.from_numpy(np.asarray(labels)[index]).to(device)
        self.pixels = [_shared(array) for array in ([pixels] if isinstance(pixels, np.ndarray) else pixels)]
        self._resident = _resident(self.pixels, self.rows, device)
        self._epoch, self._order, self._order_there = -1, self.rows, self.rows

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.images // self.batch_size)
        if epoch != self._epoch:
            order = torch.randperm(self.images, generator=_generator(self.seed, 0, epoch))
            self._epoch, self._order = epoch, order
            self._order_there = sent(order, self.device)  # once an epoch, not a part of it every step
        part = slice(place * self.batch_size, (place + 1) * self.batch_size)
        places, there = self.share.of(self._order[part]), self.share.of(self._order_there[part])
        rows = self.rows[places]
        if self._resident is None:
            x = sent(_taken(self.pixels, rows), self.device)
        else:
            x = self._resident.index_select(0, there)
        if self.augment != "none":
            x = crop_and_flip(x, *self._draw(step, x.shape[-1] // 8))
        return Batch(_scaled(x), self.labels[there], rows)

    def _draw(self, step: int, padding: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, 1, step)
        shifts = torch.randint(-padding, padding + 1, (self.batch_size, 2), generator=generator)
        flips = torch.rand(self.batch_size, generator=generator) < (0.5 if self.augment == "crop-flip" else 0.0)
        return self.share.of(shifts), self.share.of(flips)


def evaluation_batches(
    pixels: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    device: torch.device,
    share: Share = Share(),
    batch_size: int = 512,
) -> Iterator[Batch]:
    """This process's share of a split, or of some rows of it, in order, as it is; no more than a batch is copied."""
    chosen = torch.arange(len(labels)) if rows is None else torch.from_numpy(rows)
    for part in share.of(chosen).split(batch_size):
        x, y = (sent(torch.from_numpy(np.array(values[part.numpy()])), device) for values in (pixels, labels))
        yield Batch(_scaled(x), y, part)


def crop_and_flip(x: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift every image by its own (dy, dx), black moving in, and mirror those where `flips` is true.

    x: [B, C, S, S] of any dtype, on any device; shifts: int64 [B, 2], |shift| < S, and flips: bool [B], on the CPU.
    """
    channels, size = x.shape[1:3]
    moves = shifts + (size - 1)
    moves[:, 1].add_(flips, alpha=2 * size - 1)
    ys, columns = _lines(size, x.device)[sent(moves, x.device)].unbind(1)  # [B, S]
    places = torch.add(columns.unsqueeze(1), ys.unsqueeze(2), alpha=size + 2)  # [B, S, S]
    framed = F.pad(x, (1, 1, 1, 1)).flatten(2)
    return framed.gather(2, places.view(len(x), 1, -1).expand(-1, channels, -1)).view(x.shape)


@lru_cache
def _lines(size: int, device: torch.device) -> Tensor:
    """int64 [2(2S - 1), S]: what a line shows when moved by 1 - S to S - 1, then the same mirrored.

    Place 0 and place S + 1 are the black frame around an image.
    """
    moved = torch.arange(2 - size, 2 * size, device=device).clamp(0, size + 1).unfold(0, size, 1)
    return torch.cat([moved, moved.flip(1)])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. From memory that is not pinned, a copy would wait for all that a GPU has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _scaled(x: Tensor) -> Tensor:
    """Bytes to [0, 1]: in place, because on the CPU a second array would cost more than the division."""
    return x.float().div_(255)


def _shared(pixels: np.ndarray) -> Tensor:
    """The array as a tensor on the CPU that shares its memory."""
    with warnings.catch_warnings():
        # torch warns that a read-only memory map must not be written to; rows are only ever gathered from it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(pixels)


def _taken(arrays: Sequence[Tensor], rows: Tensor) -> Tensor:
    """These rows of arrays that follow each other."""
    if len(arrays) == 1:  # `index_select` copies whole images and is several times as fast as an index in brackets
        return arrays[0].index_select(0, rows)
    found, start = arrays[0].new_empty(len(rows), *arrays[0].shape[1:]), 0
    for array in arrays:
        here = (rows >= start) & (rows < start + len(array))
        found[here] = array.index_select(0, rows[here] - start)
        start += len(array)
    return found


def _resident(arrays: Sequence[Tensor], rows: Tensor, device: torch.device) -> Tensor | None:
    """The rows on the accelerator, where they take at most a quarter of its free memory; else None."""
    size = len(rows) * arrays[0][:1].nbytes
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] // 4:
        return None
    there = torch.empty(len(rows), *arrays[0].shape[1:], dtype=arrays[0].dtype, device=device)
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        there[start : start + len(part)] = _taken(arrays, part).to(device)
    return there


def _generator(*numbers: int) -> torch.Generator:
    """An independent stream for every tuple of numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(seed[0]) << 32 | int(seed[1]))
