"""Piggyback attackers: what somebody with a few labelled images does to a model before and while training it.

Each kind is one class: its recipe fields, and `prepare`, which changes the model before the training starts. A new
one is a class here and its name in `Attacker`. How an attacker is tuned on data of his own is in `tuning.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dtlctl.attacks.features import EMBEDDING
from dtlctl.attacks.tuning import Setting
from dtlctl.errors import RecipeError
from dtlctl.model.networks import Classifier, renew
from dtlctl.strict import Algorithm

Images = Iterable[Tensor]
Rate = Annotated[float, Field(gt=0, le=100)]


class _Attacker(Algorithm):
    kind: str
    datasets: list[str] | None = Field(None, min_length=1)
    """The piggyback datasets to attack; without it all."""

    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        """Change `model` in place before it trains.

        fresh: a new one of its kind; images: parts [n, 3, S, S]; amount: one of `amounts()`.
        """

    def amounts(self) -> Sequence[float | None]:
        """How much `prepare` may do, to be tuned; None where that is no question."""
        return (None,)


class _Trained(_Attacker):
    """What every attacker who trains by gradients can vary."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """`sgd` has momentum 0.9; both have weight decay 0.0005."""
    lr: list[Rate] = Field([0.001, 0.01, 0.1, 1.0], min_length=1)
    """Learning rates to try."""
    steps: int = Field(150, ge=1, le=10_000_000)
    """Longest training; the held-out images choose when to stop, at one of ten looks."""
    batch_size: int = Field(64, ge=2, le=65_536)
    """Images a step; a smaller training part is one batch."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls to zero along a cosine."""

    def grid(self, stages: Sequence[str] = ()) -> list[Setting]:
        return [Setting(self.kind, self.optimizer, rate, None, much) for much in self.amounts() for rate in self.lr]


class Full(_Trained):
    """All weights are trained under a new head: the paper's attacker (section 3.3), tuned."""

    kind: Literal["full"] = "full"


class LastBlock(_Trained):
    """Some last stages of the backbone are drawn anew, then all weights are trained: deep features may be the trap."""

    revision: ClassVar[int] = 2
    kind: Literal["last-block"] = "last-block"
    stages: list[Annotated[int, Field(ge=1)]] = Field([1, 2], min_length=1)
    """How many of the last stages are drawn anew: numbers to try."""

    def amounts(self) -> Sequence[float | None]:
        return self.stages

    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        renew(model.backbone, fresh.backbone, int(amount or 0))


class _Renormalised(_Attacker):
    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        renormalise(model, fresh, images)


class Renorm(_Renormalised, _Trained):
    """Convolutions get the norm of new ones and batch statistics are taken anew, then all weights are trained.

    This undoes what only hides knowledge under batch normalisation (`renormalise`), without which it is refused.
    """

    kind: Literal["renorm"] = "renorm"


class Frozen(_Attacker):
    """Attackers who train a linear classifier alone: L2-regularised logistic regression, at most 300 steps of L-BFGS.

    Features are computed once, in eval mode, without augmentation, and standardised with the training images' moments.
    """

    revision: ClassVar[int] = 2
    stage: Literal["any", "embedding"] = "any"
    """`any`: the mean of each stage's maps, or the embedding, whichever is best; `embedding`: it alone."""
    C: list[Rate] = Field([0.01, 0.1, 1.0, 10.0], min_length=1)
    """Inverse strengths of the L2 term to try."""

    def grid(self, stages: Sequence[str] = (EMBEDDING,)) -> list[Setting]:
        """stages: names of the features that the network has."""
        seen = stages if self.stage == "any" else (EMBEDDING,)
        return [Setting(self.kind, "logistic", C, name, n) for n in self.amounts() for name in seen for C in self.C]


class Probe(Frozen):
    """A linear classifier (L2-regularised logistic regression) on the features that the published model computes."""

    kind: Literal["probe"] = "probe"


class RenormProbe(_Renormalised, Frozen):
    """A linear classifier on the features of a model that is prepared as `renorm` does. Needs batch normalisation."""

    kind: Literal["renorm-probe"] = "renorm-probe"


@torch.no_grad()
def renormalise(model: Classifier, fresh: Classifier, images: Iterable[Tensor]) -> None:
    """Give every convolution of `model` the norm that a new one has, and batch normalisation the images' statistics.

    With batch normalisation behind it a rescaled convolution computes the same, and the effective learning rate, which
    goes with 1 / |w|^2, is that of a new network (arXiv:1706.05350). Parts of the images weigh the same.
    Raises RecipeError for a model without batch normalisation.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise RecipeError("piggyback.attackers: to renormalise needs a model with batch normalisation")
    for old, new in zip(model.backbone.modules(), fresh.backbone.modules(), strict=True):
        if isinstance(old, nn.Conv2d) and isinstance(new, nn.Conv2d):
            scale = new.weight.norm() / old.weight.norm().clamp(min=1e-12)
            old.weight.mul_(scale)
            if old.bias is not None:
                old.bias.mul_(scale)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    training = model.training
    model.train()
    for part in images:
        model.embed(part)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


Attacker = Annotated[Full | Probe | LastBlock | Renorm | RenormProbe, Field(discriminator="kind")]
"""Every attacker that a recipe can name."""
