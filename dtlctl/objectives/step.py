"""What an objective sees of one disposal step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtlctl.objectives.batched import Tape, collide_batched
from dtlctl.objectives.collision import Collision, collide


@dataclass(frozen=True)
class ChunkOutputs:
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

    chunks: Sequence[ChunkOutputs]
    """The source batch in equal chunks."""
    target: Sequence[ChunkOutputs]
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
    """Where `chunks` came out of one pass: its record."""
    again: Callable[[int], ChunkOutputs] | None = None
    """Where graphs are not to be held: computes one chunk anew."""

    def collide(self, loss: Callable[[ChunkOutputs], Tensor], *, self_pairs: bool = False) -> Collision:
        """The collision (Eq. 8) of the gradients of a loss of each chunk, over all processes' chunks."""
        options: Any = {"self_pairs": self_pairs, "processes": self.processes, "all_reduce": self.all_reduce}
        if self.tape is not None:
            return collide_batched([loss(chunk) for chunk in self.chunks], self.parameters, self.tape, **options)
        if (again := self.again) is not None:
            numbers = range(len(self.chunks))
            return collide(lambda m: loss(again(m)), self.parameters, numbers, recompute=True, **options)
        return collide(loss, self.parameters, self.chunks, **options)
