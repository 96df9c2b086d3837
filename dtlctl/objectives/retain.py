"""Retaining losses: what keeps the target task (Koh et al., ICCV 2023, sections 3.2.1 and 4.6).

Each kind is one class: its recipe fields and its loss. A new one is a class here and its name in `Retain`.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dtlctl.objectives.collision import dot
from dtlctl.objectives.step import Step
from dtlctl.strict import Algorithm


class _Retain(Algorithm):
    def guard(self, unlearn: Tensor, retain: Tensor, step: Step) -> Tensor:
        """The unlearning scalar to mix in, which may be bent."""
        return unlearn


class Distill(_Retain):
    """SRC-KD and TGT-KD, Eq. 2: D_KL(P(y|x; TL) || P(y|x; student)) through the target head, in nats; or their mean.

    With a temperature T both distributions are softened and the loss is scaled by T^2 (Hinton et al.,
    arXiv:1503.02531); T = 1 is Eq. 2.
    """

    kind: Literal["distill"] = "distill"
    on: Literal["source", "target", "both"] = "source"
    """Whose images: SRC-KD, TGT-KD, or the mean of the two."""
    temperature: float = Field(1.0, gt=0)
    """Softens teacher and student alike; 1 is Eq. 2."""

    @property
    def needs_target(self) -> bool:
        return self.on != "source"

    def loss(self, step: Step) -> Tensor:
        t, parts = self.temperature, list[Tensor]()
        for seen in {"source": step.chunks, "target": step.target, "both": [*step.chunks, *step.target]}[self.on]:
            student, teacher = ((logits / t).log_softmax(1) for logits in (seen.target, step.teacher(seen.x)))
            parts.append(F.kl_div(student, teacher, reduction="batchmean", log_target=True) * t**2)
        return torch.stack(parts).mean()


class _OnTarget(_Retain):
    """Cross-entropy on the target's training images."""

    needs_target: ClassVar[bool] = True

    def loss(self, step: Step) -> Tensor:
        return torch.stack([F.cross_entropy(seen.target, seen.y) for seen in step.target]).mean()


class TargetCrossEntropy(_OnTarget):
    """TGT-CE: cross-entropy on the target's training images."""

    kind: Literal["target-ce"] = "target-ce"


class AveragedGem(_OnTarget):
    """TGT-A-GEM (Chaudhry et al., arXiv:1812.00420): the unlearning gradient g may not oppose the target's, g_ref.

    Where <g, g_ref> < 0, g is replaced by g - (<g, g_ref> / |g_ref|^2) g_ref. The loss is the target's cross-entropy.
    """

    kind: Literal["a-gem"] = "a-gem"

    def guard(self, unlearn: Tensor, retain: Tensor, step: Step) -> Tensor:
        # Subtracting a constant times the target loss subtracts that constant times its gradient: the projection.
        ours, reference = step.gradient(unlearn), step.gradient(retain)
        share = dot(ours, reference).clamp(max=0) / dot(reference, reference).clamp(min=1e-12)
        return unlearn - share * retain


Retain = Annotated[Distill | TargetCrossEntropy | AveragedGem, Field(discriminator="kind")]
