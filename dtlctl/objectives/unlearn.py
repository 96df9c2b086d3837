"""Unlearning losses: what drives the source knowledge out (Koh et al., ICCV 2023, section 3.2).

Each kind is one class: its recipe fields and its loss. A new one is a class here and its name in `Unlearn`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dtlctl.objectives.batched import collide_batched
from dtlctl.objectives.collision import collide
from dtlctl.objectives.step import Step, View
from dtlctl.strict import Strict


class GradientCollision(Strict):
    """GC, Eq. 8: the mean inner product of the chunks' gradients. See `collision.py` for the mathematics."""

    kind: Literal["gradient-collision"] = "gradient-collision"
    chunks: int = Field(2, ge=2, description="parts of the global batch whose gradients collide")
    self_pairs: bool = Field(False, description="collide a chunk with itself too, as Algorithm 1 does")
    memory: Literal["auto", "batched", "keep", "recompute"] = Field(
        "auto", description="all chunks in one pass, one by one with their graphs kept, or one graph at a time"
    )

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {
            "self_pairs": self.self_pairs,
            "processes": step.processes,
            "all_reduce": step.all_reduce,
        }
        if step.tape is not None:
            losses = [_source_loss(chunk) for chunk in step.chunks]
            value, surrogate = collide_batched(losses, step.parameters, step.tape, **options)
        elif (again := step.again) is not None:
            numbers = range(len(step.chunks))
            value, surrogate = collide(
                lambda m: _source_loss(again(m)), step.parameters, numbers, recompute=True, **options
            )
        else:
            value, surrogate = collide(_source_loss, step.parameters, step.chunks, **options)
        return surrogate, value


class RandomLabels(Strict):
    """RAND, Eq. 11: cross-entropy to labels drawn once for every source image, uniformly over the classes."""

    kind: Literal["random-labels"] = "random-labels"
    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        classes = step.chunks[0].source.shape[1]
        labels = random_labels(step.images, classes, step.seed)
        wrong = [labels[chunk.rows].to(chunk.y.device) for chunk in step.chunks]
        loss = _mean([F.cross_entropy(c.source, y) for c, y in zip(step.chunks, wrong, strict=True)])
        return loss, loss.detach()


class Uniform(Strict):
    """UNIF, Eq. 12: D_KL(U || P), in nats; 0 when the source head says nothing."""

    kind: Literal["uniform"] = "uniform"
    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        # D_KL(U || P) = sum_y 1/K (log 1/K - log P(y)) = -log K - mean_y log P(y)
        loss = _mean([-c.source.log_softmax(1).mean() - math.log(c.source.shape[1]) for c in step.chunks])
        return loss, loss.detach()


class NegativeCrossEntropy(Strict):
    """NEG, Eq. 13: gradient ascent on the source task. Unbounded below."""

    kind: Literal["negative-ce"] = "negative-ce"
    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        loss = _mean([-F.cross_entropy(c.source, c.y) for c in step.chunks])
        return loss, loss.detach()


class Nothing(Strict):
    """No unlearning: with `init = "fresh"` the reference `distilled`, a new network that only ever saw TL's answers."""

    kind: Literal["none"] = "none"
    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        zero = step.chunks[0].source.sum() * 0
        return zero, zero.detach()


@lru_cache(maxsize=2)
def random_labels(images: int, classes: int, seed: int) -> Tensor:
    """The labels of D-tilde in Eq. 11: int64 [images], the same for the whole disposal."""
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


def _source_loss(chunk: View) -> Tensor:
    return F.cross_entropy(chunk.source, chunk.y)


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


Unlearn = Annotated[
    GradientCollision | RandomLabels | Uniform | NegativeCrossEntropy | Nothing, Field(discriminator="kind")
]
"""Every `loss(step)` returns (scalar to back-propagate, value to report)."""
