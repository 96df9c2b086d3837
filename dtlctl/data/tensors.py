"""Batches as tensors: cut from the decoded array, moved once, augmented all together on the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
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
    """

    def __init__(
        self,
        pixels: np.ndarray,
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
        self.pixels, self.labels = _resident(pixels, device), torch.from_numpy(np.array(labels)).to(device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, step: int) -> Batch:
        epoch, place = divmod(step, self.images // self.batch_size)
        if epoch != self._epoch:
            order = torch.randperm(self.images, generator=_generator(self.seed, 0, epoch))
            self._epoch, self._order = epoch, self.rows[order]
        rows = self.share.of(self._order[place * self.batch_size : (place + 1) * self.batch_size])
        where = sent(rows, self.device)
        x = self.pixels[where] if self.pixels.is_cuda else sent(self.pixels[rows], self.device)
        if self.augment != "none":
            shifts, flips = self._draw(step, x.shape[-1] // 8)
            x = crop_and_flip(x, sent(shifts, self.device), sent(flips, self.device))
        return Batch(_scaled(x), self.labels[where], rows)

    def _draw(self, step: int, padding: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, 1, step)
        shifts = torch.randint(-padding, padding + 1, (self.batch_size, 2), generator=generator)
        flips = torch.rand(self.batch_size, generator=generator) < (0.5 if self.augment == "crop-flip" else 0.0)
        return self.share.of(shifts), self.share.of(flips)


def evaluation_batches(
    pixels: np.ndarray, labels: np.ndarray, *, device: torch.device, share: Share = Share(), batch_size: int = 512
) -> Iterator[Batch]:
    """This process's share of a whole split, in order, as it is."""
    rows = share.of(torch.arange(len(labels)))
    for part in rows.split(batch_size):
        x, y = (sent(torch.from_numpy(np.array(values[part.numpy()])), device) for values in (pixels, labels))
        yield Batch(_scaled(x), y, part)


def crop_and_flip(x: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift every image by its own (dy, dx), black moving in, and mirror those where `flips` is true.

    x: [B, C, S, S] of any dtype; shifts: int64 [B, 2], |shift| < S; flips: bool [B].
    """
    channels, size = x.shape[1:3]
    line = torch.arange(size, device=x.device)
    ys = line + shifts[:, :1]  # [B, S]: the input row of every output row
    columns = torch.where(flips[:, None], size - 1 - line, line) + shifts[:, 1:]
    inside = ((ys >= 0) & (ys < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    places = ys.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None, :]
    moved = x.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(x.shape)
    return moved * inside[:, None]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. From memory that is not pinned, a copy would wait for all that a GPU has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _scaled(x: Tensor) -> Tensor:
    """Bytes to [0, 1]: in place, because on the CPU a second array would cost more than the division."""
    return x.float().div_(255)


def _resident(pixels: np.ndarray, device: torch.device) -> Tensor:
    """The whole array on the accelerator where it takes at most a quarter of its free memory, else on the CPU."""
    with warnings.catch_warnings():
        # torch warns that a read-only memory map must not be written to; rows are only ever gathered from it.
        warnings.simplefilter("ignore", UserWarning)
        whole = torch.from_numpy(pixels)
    if device.type == "cuda" and whole.nbytes <= torch.cuda.mem_get_info(device)[0] // 4:
        return whole.to(device)
    return whole


def _generator(*numbers: int) -> torch.Generator:
    """An independent stream for every tuple of numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(seed[0]) << 32 | int(seed[1]))
