"""What an objective sees of one disposal step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dtlctl.objectives.batched import Tape


@dataclass(frozen=True)
class View:
    """Images and what the student makes of them.

    x: float [B, 3, H, W] in [0, 1]; y: int64 [B]; rows: int64 [B] on the CPU, the images' places in their dataset;
    source, target: the student's logits [B, classes] through either head, with their graph. maps: the outputs [B, ...]
    of the backbone's stages, first stage first, likewise; empty where the stages are not known.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    source: Tensor
    target: Tensor
    maps: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Step:
    """This process's share of a global step.

    Every objective returns a scalar whose gradient, averaged over processes, is the objective's gradient.
    """

    chunks: Sequence[View]
    """The source batch in equal chunks."""
    target: Sequence[View]
    """A batch of the target in as many chunks, for the retaining losses whose `needs_target` is true; else empty."""
    teacher: Callable[[Tensor], Tensor]
    """x [B, 3, H, W] -> logits [B, target classes] of the frozen TL model, without a graph."""
    parameters: Sequence[Tensor]
    """All weights of the student."""
    images: int
    """Rows of the source dataset, chosen or not."""
    seed: int
    processes: int
    all_reduce: Callable[[Sequence[Tensor]], list[Tensor]]
    """Sums tensors over processes."""
    tape: Tape | None = None
    """Where `chunks` came out of one pass: its record, for `collide_batched`."""
    again: Callable[[int], View] | None = None
    """Where graphs are not to be held: makes one chunk's view anew."""
