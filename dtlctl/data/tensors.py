"""Batches as tensors: taken from decoded images, or from those that a stream decodes, augmented on the device."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtlctl.console import devices
from dtlctl.data.entry import Kept
from dtlctl.data.stream import AHEAD, Streamed

Pixels = np.ndarray | Kept | Streamed
"""uint8 [N, 3, S, S]: `pixels[rows]` is an array of these rows."""


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
    pixels: one or several, taken one after the other, with labels; index: the rows to train on; no other is read.
    """

    def __init__(
        self,
        pixels: Pixels | list[Pixels],
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
        self.pixels = pixels if isinstance(pixels, list) else [pixels]
        self._ahead = AHEAD * any(isinstance(one, Streamed) for one in self.pixels)
        self._resident = None if self._ahead else _resident(self.pixels, self.rows, device)
        self._order = lru_cache(2)(self._shuffled)  # at the end of an epoch the next one's may be needed too
        self._begun: dict[int, Callable[[], np.ndarray]] = {}

    def __getitem__(self, step: int) -> Batch:
        places, there = self._places(step)
        if self._resident is None:
            steps = range(step, step + self._ahead + 1)
            self._begun = {number: self._begun.get(number) or self._begin(number) for number in steps}
            x = sent(torch.from_numpy(self._begun[step]()), self.device)
        else:
            x = self._resident.index_select(0, there)
        if self.augment == "resized-crop-flip":
            x = resized_crop_and_flip(x, self._boxes(step, x.shape[-1]))
        elif self.augment != "none":
            x = crop_and_flip(x, *self._draw(step, x.shape[-1] // 8))
        return Batch(_scaled(x), self.labels[there], self.rows[places])

    def _begin(self, step: int) -> Callable[[], np.ndarray]:
        return _begin(self.pixels, self.rows[self._places(step)[0]].numpy())

    def _places(self, step: int) -> tuple[Tensor, Tensor]:
        """Which of the rows this process takes at a step: on the CPU, and on the device."""
        epoch, place = divmod(step, self.images // self.batch_size)
        part = slice(place * self.batch_size, (place + 1) * self.batch_size)
        order, there = self._order(epoch)
        return self.share.of(order[part]), self.share.of(there[part])

    def _shuffled(self, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch's rows on the CPU and on the device: sent once an epoch, not a part of it every step."""
        order = torch.randperm(self.images, generator=_generator(self.seed, 0, epoch))
        return order, sent(order, self.device)

    def _draw(self, step: int, padding: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, 1, step)
        shifts = torch.randint(-padding, padding + 1, (self.batch_size, 2), generator=generator)
        flips = torch.rand(self.batch_size, generator=generator) < (0.5 if self.augment == "crop-flip" else 0.0)
        return self.share.of(shifts), self.share.of(flips)

    def _boxes(self, step: int, size: int) -> Tensor:
        """int64 [B, 5]: top, left, height, width, and whether mirrored, as torchvision's RandomResizedCrop draws them.

        A share of 0.08 to 1 of the image, a ratio of 3/4 to 4/3 on a logarithmic scale, the first of ten that fit.
        """
        drawn = torch.rand(3, self.batch_size, 10, dtype=torch.float64, generator=(g := _generator(self.seed, 1, step)))
        area, ratio = size**2 * (0.08 + 0.92 * drawn[0]), (3 / 4) ** (1 - 2 * drawn[1])
        sides = torch.stack([area / ratio, area * ratio]).sqrt().round().clamp(1)
        fits = (sides <= size).all(0)
        first = fits.long().argmax(1, keepdim=True)
        sides = sides.gather(2, first.expand(2, -1, 1))[..., 0].clamp(max=size)
        corners = (torch.rand(2, self.batch_size, dtype=torch.float64, generator=g) * (size + 1 - sides)).floor()
        return self.share.of(torch.cat([corners, sides, (drawn[2, :, :1] < 0.5).T]).long().T)


def evaluation_batches(
    pixels: Pixels,
    labels: np.ndarray,
    rows: np.ndarray | None = None,
    *,
    device: torch.device,
    share: Share = Share(),
    batch_size: int | None = None,
) -> Iterator[Batch]:
    """This process's share of a split, or of some rows of it, in order, a batch at a time (512, of large images less).

    Of a stream a few more are decoded ahead.
    """
    batch_size = batch_size or min(512, 512 * 64**2 // pixels.shape[-1] ** 2 + 1)
    chosen = torch.arange(len(labels)) if rows is None else torch.from_numpy(rows)
    parts, ahead = share.of(chosen).split(batch_size), AHEAD * isinstance(pixels, Streamed)
    begun: dict[int, Callable[[], np.ndarray]] = {}
    for number, part in enumerate(parts):
        due = range(number, min(number + ahead + 1, len(parts)))
        begun = {place: begun.get(place) or _begin([pixels], parts[place].numpy()) for place in due}
        x, y = (sent(torch.from_numpy(values), device) for values in (begun[number](), labels[part.numpy()]))
        yield Batch(_scaled(x), y, part)


def crop_and_flip(x: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shift every image by its own (dy, dx), black moving in, and mirror those where `flips` is true.

    x: [B, C, S, S] of any dtype, on any device; shifts: int64 [B, 2], |shift| < S, and flips: bool [B], on the CPU.
    """
    channels, size = x.shape[1:3]
    lines = (shifts.unsqueeze(2) + torch.arange(1, size + 1)).clamp(0, size + 1)  # [B, 2, S], of a framed image
    lines[:, 1] = torch.where(flips.unsqueeze(1), lines[:, 1].flip(1), lines[:, 1])
    ys, columns = sent(lines, x.device).unbind(1)
    places = torch.add(columns.unsqueeze(1), ys.unsqueeze(2), alpha=size + 2)  # [B, S, S]
    framed = F.pad(x, (1, 1, 1, 1)).flatten(2)
    return framed.gather(2, places.view(len(x), 1, -1).expand(-1, channels, -1)).view(x.shape)


def resized_crop_and_flip(x: Tensor, boxes: Tensor) -> Tensor:
    """float [B, C, S, S]: of every image its own box, enlarged to the whole, bilinearly; as torchvision resizes a crop.

    x: [B, C, S, S]; boxes: int64 [B, 5] on the CPU: top, left, height, width, and whether mirrored. No box is larger
    than the image, so nothing is ever made smaller, and there is nothing for an antialias filter to do.
    """
    size = x.shape[-1]
    start, sides, mirrored = boxes.float().split([2, 2, 1], 1)
    lines = torch.arange(size).add(0.5) * (sides / size).unsqueeze(2) - 0.5  # [B, 2, S], in pixels of the box
    places = lines.clamp(min=0).minimum(sides.unsqueeze(2) - 1) + start.unsqueeze(2)  # nothing from outside of it
    places[:, 1] = torch.where(mirrored > 0, places[:, 1].flip(1), places[:, 1])
    ys, columns = sent(places * (2 / max(size - 1, 1)) - 1, x.device).unbind(1)
    grid = torch.stack(torch.broadcast_tensors(columns.unsqueeze(1), ys.unsqueeze(2)), 3)
    return F.grid_sample(x.float(), grid, align_corners=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. From memory that is not pinned, a copy would wait for all that a GPU has to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _scaled(x: Tensor) -> Tensor:
    """Bytes to [0, 1]: in place, because on the CPU a second array would cost more than the division."""
    return x.float().div_(255)


def _begin(pixels: Sequence[Pixels], rows: np.ndarray) -> Callable[[], np.ndarray]:
    """These rows of pixels that follow each other, for when they are called for; a stream's are begun at once."""
    first, *rest = pixels
    if not rest:
        return first.ask(rows) if isinstance(first, Streamed) else partial(first.__getitem__, rows)
    here = rows < len(first)
    own, others = _begin([first], rows[here]), _begin(rest, rows[~here] - len(first))

    def joined() -> np.ndarray:
        found = np.empty((len(rows), *first.shape[1:]), np.uint8)
        found[here], found[~here] = own(), others()
        return found

    return joined


def _resident(pixels: Sequence[Pixels], rows: Tensor, device: torch.device) -> Tensor | None:
    """The rows on the accelerator, where they take at most a quarter of its free memory; else None."""
    shape = pixels[0].shape[1:]
    size = len(rows) * math.prod(shape)
    room = devices.memory(device)
    if room is None or size > room[0] // 4:
        return None
    there = torch.empty(len(rows), *shape, dtype=torch.uint8, device=device)
    for start in range(0, len(rows), 4096):
        part = rows[start : start + 4096]
        there[start : start + len(part)] = torch.from_numpy(_begin(pixels, part.numpy())()).to(device)
    return there


def _generator(*numbers: int) -> torch.Generator:
    """An independent stream for every tuple of numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(seed[0]) << 32 | int(seed[1]))
