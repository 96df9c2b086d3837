"""Unlearning losses: what drives the source knowledge out (Koh et al., ICCV 2023, section 3.2), and one of our own.

Each kind is one class: its recipe fields and its loss. A new one is a class here and its name in `Unlearn`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dtlctl.data.tensors import sent
from dtlctl.errors import RecipeError
from dtlctl.objectives.step import ChunkOutputs, Step
from dtlctl.strict import Algorithm


class OnePart(Algorithm):
    """A loss of the global batch in one part: there are no graphs to hold one by one."""

    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"
    cosine: ClassVar[None] = None
    needs_maps: ClassVar[bool] = False
    """Whether `ChunkOutputs.maps` are wanted."""
    trains_source_head: ClassVar[bool] = True


class GradientCollision(Algorithm):
    """GC, Eq. 8: the mean inner product of the gradients of the batch's chunks.

    See `collision.py` for the mathematics.
    """

    kind: Literal["gradient-collision"] = "gradient-collision"
    chunks: int = Field(2, ge=2)
    """Parts of the global batch whose gradients collide: a divisor of `batch_size`, two images each or more."""
    self_pairs: bool = False
    """Collide a chunk with itself too, as the paper's Algorithm 1 does."""
    memory: Literal["auto", "batched", "keep", "recompute"] = "auto"
    """Chunks in one pass, one by one with their graphs kept, or one graph at a time. The result is the same."""
    cosine: float | None = Field(None, gt=0, le=1)
    """Least cosine of the first batch's gradient to float64's, or the disposal stops. `bfloat16` requires it."""
    trains_source_head: ClassVar[bool] = True
    needs_maps: ClassVar[bool] = False

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        value, surrogate = step.collide(_source_loss, self_pairs=self.self_pairs)
        return surrogate, value


class RandomLabels(OnePart):
    """RAND, Eq. 11: cross-entropy to labels drawn once for every source image, uniformly over the classes."""

    kind: Literal["random-labels"] = "random-labels"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        classes = step.chunks[0].source.shape[1]
        labels = random_labels(step.images, classes, step.seed)
        wrong = [sent(labels[chunk.rows], chunk.y.device) for chunk in step.chunks]
        loss = _mean([F.cross_entropy(c.source, y) for c, y in zip(step.chunks, wrong, strict=True)])
        return loss, loss.detach()


class Uniform(OnePart):
    """UNIF, Eq. 12: D_KL(U || P), in nats; 0 when the source head says nothing."""

    kind: Literal["uniform"] = "uniform"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        # D_KL(U || P) = sum_y 1/K (log 1/K - log P(y)) = -log K - mean_y log P(y)
        loss = _mean([-c.source.log_softmax(1).mean() - math.log(c.source.shape[1]) for c in step.chunks])
        return loss, loss.detach()


class NegativeCrossEntropy(OnePart):
    """NEG, Eq. 13: gradient ascent on the source task. Unbounded below."""

    kind: Literal["negative-ce"] = "negative-ce"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        loss = _mean([-F.cross_entropy(c.source, c.y) for c in step.chunks])
        return loss, loss.detach()


class NullSpace(OnePart):
    """The share of the representation that the target's answers do not explain, in [0, 1]. Ours, not the paper's.

    H is a stage's output on the source images of the global batch, flattened, Z their target logits (detached), both
    less their means. What Z explains of H linearly is Z M, with M = argmin |H - Z M|^2; the loss is
    |H - Z M|^2 / |H|^2, averaged over the last `stages` stages. Scaling a stage does not change it.

    Raises RecipeError for a backbone with fewer stages, or a batch in which Z explains much by chance.
    """

    kind: Literal["null-space"] = "null-space"
    stages: int = Field(2, ge=1)
    """How many of the backbone's last stages are narrowed; a ResNet has 4, a CIFAR ResNet 3."""
    needs_maps: ClassVar[bool] = True
    trains_source_head: ClassVar[bool] = False

    @staticmethod
    def least_images(classes: int) -> int:
        """Images that a batch needs: with fewer, that many target classes explain much by chance."""
        return 3 * classes

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        (seen,) = step.chunks
        classes, images = seen.target.shape[1], len(seen.x) * step.processes
        if images < (least := self.least_images(classes)):
            raise RecipeError(f"null-space: batch_size is {images}; {classes} target classes need {least} or more")
        if len(seen.maps) < self.stages:
            raise RecipeError(f"null-space: stages = {self.stages}, but only {len(seen.maps)} of this model are known")
        answers = seen.target.detach()
        answers = answers - answers.mean(1, keepdim=True)  # softmax does not see the mean of the logits
        (total,) = step.all_reduce([answers.sum(0)])
        answers = answers - total / images
        (square,) = step.all_reduce([answers.T @ answers])
        # Once for all stages: on an accelerator the eigenvalues behind it are waited for.
        inverse = torch.linalg.pinv(square, rtol=1e-5, hermitian=True)
        parts = [_unexplained(map_.flatten(1), answers, inverse, step) for map_ in seen.maps[-self.stages :]]
        scalars, values = zip(*parts, strict=True)
        return _mean(list(scalars)), _mean(list(values))


def _unexplained(rows: Tensor, by: Tensor, inverse: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """|H - Z M|^2 / |H|^2 of this process's share of H [B, F] and Z [B, K], over the global batch: scalar and value.

    Z has no mean; inverse: (Z'Z)^-1 [K, K] of the global batch. Means and M are held constant: both sums are least at
    theirs, so the gradient is the same.
    """
    rows = rows.to(by.dtype)
    (total,) = step.all_reduce([rows.detach().sum(0)])
    rows = rows - total / (len(rows) * step.processes)
    (product,) = step.all_reduce([by.T @ rows.detach()])
    hidden = (rows - by @ (inverse @ product)).square().sum()
    whole = rows.square().sum()
    over, under = step.all_reduce([hidden.detach(), whole.detach()])
    return step.processes * (hidden - over / under * whole) / under, over / under


class Nothing(OnePart):
    """No unlearning: with `init = "fresh"` the reference `distilled`, a new network that only ever saw TL's answers."""

    kind: Literal["none"] = "none"
    trains_source_head: ClassVar[bool] = False

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        zero = step.chunks[0].source.sum() * 0
        return zero, zero.detach()


@lru_cache(maxsize=2)
def random_labels(images: int, classes: int, seed: int) -> Tensor:
    """The labels of D-tilde in Eq. 11: int64 [images], the same for the whole disposal."""
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


def _source_loss(chunk: ChunkOutputs) -> Tensor:
    return F.cross_entropy(chunk.source, chunk.y)


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


Unlearn = Annotated[
    GradientCollision | RandomLabels | Uniform | NegativeCrossEntropy | NullSpace | Nothing, Field(discriminator="kind")
]
"""Every `loss(step)` returns (scalar to back-propagate, value to report)."""
