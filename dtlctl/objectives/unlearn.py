"""Unlearning losses: what drives the source knowledge out (Koh et al., ICCV 2023, section 3.2), and one of our own.

Each kind is one class: its recipe fields and its loss. A new one is a class here and its name in `Unlearn`.
"""

import math
import zlib
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from dtlctl.console import devices
from dtlctl.data.tensors import sent
from dtlctl.errors import RecipeError
from dtlctl.objectives.collision import KnownGradient
from dtlctl.objectives.step import Step
from dtlctl.strict import Algorithm


class _Unlearn(Algorithm):
    needs_maps: ClassVar[bool] = False
    """Whether `ChunkOutputs.maps` are wanted."""
    trains_source_head: ClassVar[bool] = True
    no_price: ClassVar[str] = ""
    """Why no λ can be found for a price, if none can."""
    way_out: ClassVar[str] = ""
    """Of `least_images`: what else to change, beside the images or the kind."""

    def least_images(self, processes: int) -> tuple[int, str]:
        """Images that a batch needs on so many processes, and what needs them."""
        return 2, "a step needs"

    def remark(self, classes: int, images: int) -> str:
        """What to say of so many target classes and images a step; empty if nothing."""
        return ""


class OnePart(_Unlearn):
    """A loss of the global batch in one part: there are no graphs to hold one by one."""

    chunks: ClassVar[int] = 1
    memory: ClassVar[Literal["keep"]] = "keep"
    cosine: ClassVar[None] = None


class GradientCollision(_Unlearn):
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

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        value, surrogate = step.collide(lambda c: F.cross_entropy(c.source, c.y), self_pairs=self.self_pairs)
        return surrogate, value


class RandomLabels(OnePart):
    """RAND, Eq. 11: cross-entropy to labels drawn once for every source image, uniformly over the classes."""

    kind: Literal["random-labels"] = "random-labels"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        (seen,) = step.chunks
        labels = random_labels(step.images, seen.source.shape[1], step.seed)
        loss = F.cross_entropy(seen.source, sent(labels[seen.rows], seen.y.device))
        return loss, loss.detach()


class Uniform(OnePart):
    """UNIF, Eq. 12: D_KL(U || P), in nats; 0 when the source head says nothing."""

    kind: Literal["uniform"] = "uniform"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        # D_KL(U || P) = sum_y 1/K (log 1/K - log P(y)) = -log K - mean_y log P(y)
        (seen,) = step.chunks
        loss = -seen.source.log_softmax(1).mean() - math.log(seen.source.shape[1])
        return loss, loss.detach()


class NegativeCrossEntropy(OnePart):
    """NEG, Eq. 13: gradient ascent on the source task. Unbounded below."""

    kind: Literal["negative-ce"] = "negative-ce"
    no_price: ClassVar[str] = "has no bound, so no price would hold; write lambda instead, 0.01 or less"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        (seen,) = step.chunks
        loss = -F.cross_entropy(seen.source, seen.y)
        return loss, loss.detach()


class NullSpace(OnePart):
    """The share of the representation that the target's answers do not explain, in [0, 1]. Ours, not the paper's.

    H is a stage's output on the source images of the global batch, flattened, Z their target logits (detached), both
    less their means. What Z explains of H linearly is Z M, with M = argmin |H - Z M|^2; the loss is
    |H - Z M|^2 / |H|^2, averaged over the stages. Scaling a stage does not change it. Of many target classes the
    leading principal components of Z count, one for three images of the batch: all of them would explain any H.

    Raises RecipeError for a backbone with fewer stages.
    """

    kind: Literal["null-space"] = "null-space"
    stages: int | None = Field(None, ge=1)
    """How many of the backbone's last stages are narrowed; default: all. A ResNet has 4, a CIFAR ResNet 3."""
    needs_maps: ClassVar[bool] = True
    trains_source_head: ClassVar[bool] = False

    def remark(self, classes: int, images: int) -> str:
        if (most := components(images)) >= classes - 1:
            return ""
        return (
            f"of the answers for {classes} target classes the {most} leading components count with {images} images a "
            f"step; {3 * (classes - 1)} would keep all"
        )

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        (seen,) = step.chunks
        images = len(seen.x) * step.processes
        count = self.stages or max(1, len(seen.maps))
        if len(seen.maps) < count:
            raise RecipeError(f"null-space: stages = {count}, but only {len(seen.maps)} of this model are known")
        answers = seen.target.detach()
        answers = answers - answers.mean(1, keepdim=True)  # softmax does not see the mean of the logits
        (total,) = step.all_reduce([answers.sum(0)])
        answers = answers - total / images
        (square,) = step.all_reduce([answers.T @ answers])
        # Once for all stages: on an accelerator the eigenvalues behind it are waited for. It raises for what is not
        # finite, which is to reach the loss, so that the training is stopped and named as diverged.
        finite = devices.able(square.nan_to_num(0, 0, 0))
        sizes, axes = torch.linalg.eigh(finite)  # ascending
        sizes, axes = sizes[-components(images) :], axes[:, -components(images) :]
        inverse = ((axes * torch.where(sizes > 1e-5 * sizes[-1], 1 / sizes, 0)) @ axes.T).to(square.device)
        parts = [_unexplained(map_.flatten(1), answers, inverse, step) for map_ in seen.maps[-count:]]
        scalars, values = zip(*parts, strict=True)
        return torch.stack(scalars).mean(), torch.stack(values).mean()


def components(images: int) -> int:
    """How many principal components of the target's answers to so many images may explain the representation."""
    return max(1, images // 3)  # by chance they explain a third then


def _unexplained(rows: Tensor, by: Tensor, inverse: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """|H - Z M|^2 / |H|^2 of this process's share of H [B, F] and Z [B, K], over the global batch: scalar and value.

    Z has no mean; inverse: (Z'Z)^-1 [K, K] of its leading components. Means and M are constants: both sums are least
    there.
    """
    rows = rows.to(by.dtype)
    (total,) = step.all_reduce([rows.detach().sum(0)])
    rows = rows - total / (len(rows) * step.processes)
    (product,) = step.all_reduce([by.T @ rows.detach()])
    hidden = (rows - by @ (inverse @ product)).square().sum()
    whole = rows.square().sum()
    over, under = step.all_reduce([hidden.detach(), whole.detach()])
    return step.processes * (hidden - over / under * whole) / under, over / under


class SimulatedAttacker(OnePart):
    """The loss of an attacker after a few steps of fine-tuning with a new head: first-order meta-learning.

    As in SOPHON (arXiv:2404.12699) and TAR (arXiv:2408.00761). The global batch is cut into `steps` + 1 parts: plain
    SGD on the cross-entropy of one part after the other leads from the student to theta'. The loss is SOPHON's inverse
    cross-entropy, E[-log(1 - P(y|x; theta'))] on the last part: 0 where the attacker is always wrong. Its gradient at
    theta' counts as the student's (first order).

    Raises RecipeError for a batch whose parts would be below two images on a process.
    """

    revision: ClassVar[int] = 2
    kind: Literal["simulated-attacker"] = "simulated-attacker"
    steps: int = Field(3, ge=1, le=100)
    """Steps of the attacker, each on a part of the batch."""
    lr: list[Annotated[float, Field(gt=0, le=10)]] = Field([0.003, 0.03, 0.3], min_length=1)
    """Learning rates of the attacker: one is drawn for each step."""
    trains_source_head: ClassVar[bool] = False
    way_out: ClassVar[str] = ", or take fewer steps"

    def least_images(self, processes: int) -> tuple[int, str]:
        # Two in each part on each process.
        return 2 * (self.steps + 1) * processes, f"steps = {self.steps} needs"

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        (seen,), student = step.chunks, step.student
        assert student is not None
        least, what = self.least_images(step.processes)
        if len(seen.x) * step.processes < least:
            raise RecipeError(f"simulated-attacker: {what} a batch_size of {least} or more")
        # Drawn by the step: the same on all processes, and again where a run goes on.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{step.seed}/{step.number}".encode()))
        weights = {name: p.detach().requires_grad_() for name, p in student.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        for name in ("heads.source.weight", "heads.source.bias"):  # as nn.Linear begins
            bound = weights["heads.source.weight"].shape[1] ** -0.5
            fresh = torch.empty(weights[name].shape).uniform_(-bound, bound, generator=generator)
            weights[name] = sent(fresh, seen.y.device).to(weights[name].dtype).requires_grad_()
        lr = self.lr[int(torch.randint(len(self.lr), (), generator=generator))]

        def answer(x: Tensor) -> Tensor:
            return functional_call(student, {**weights, **buffers}, (x, "source"))

        def gradient(scalar: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(scalar, list(weights.values()), materialize_grads=True)

        *inner, (x, y) = zip(seen.x.tensor_split(self.steps + 1), seen.y.tensor_split(self.steps + 1), strict=True)
        for images, labels in inner:
            shares = step.all_reduce(gradient(F.cross_entropy(answer(images), labels)))
            moved = torch._foreach_add(list(weights.values()), shares, alpha=-lr / step.processes)
            weights = {name: value.detach().requires_grad_() for name, value in zip(weights, moved, strict=True)}
        logits = answer(x)
        others = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        loss = (logits.logsumexp(1) - others).mean()
        grads = zip(weights, gradient(loss), strict=True)
        own = [g * 0 if name.startswith("heads.") else g for name, g in grads]
        return KnownGradient.apply(own, *step.parameters), loss.detach()


class Nothing(OnePart):
    """No unlearning: with `init = "fresh"` the reference `distilled`, a new network that only ever saw TL's answers."""

    kind: Literal["none"] = "none"
    no_price: ClassVar[str] = "has no lambda to find; leave it out"
    trains_source_head: ClassVar[bool] = False

    def loss(self, step: Step) -> tuple[Tensor, Tensor]:
        zero = step.chunks[0].source.sum() * 0
        return zero, zero.detach()


@lru_cache(maxsize=2)
def random_labels(images: int, classes: int, seed: int) -> Tensor:
    """The labels of D-tilde in Eq. 11: int64 [images], the same for the whole disposal."""
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


Unlearn = Annotated[
    GradientCollision | RandomLabels | Uniform | NegativeCrossEntropy | NullSpace | SimulatedAttacker | Nothing,
    Field(discriminator="kind"),
]
"""Every `loss(step)` returns (scalar to back-propagate, value to report)."""
