"""Piggyback attackers: what somebody with a few labelled images does to a model before and while training it.

Each kind is one class: its recipe fields, and `prepare`, which changes the model before the training starts. A new
one is a class here and its name in `Attacker`. How an attacker is tuned on data of his own is in `tuning.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dtlctl.attacks import layers
from dtlctl.attacks.features import EMBEDDING, Nearest
from dtlctl.attacks.logistic import Logistic
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


class Norms(_Trained):
    """The normalisations' weights are trained, with a new head; all else stays. Refused without normalisations."""

    kind: Literal["norms"] = "norms"

    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        model.backbone.requires_grad_(False)
        for norm in (m for m in model.backbone.modules() if isinstance(m, layers.NORMS)):
            norm.requires_grad_(True)


class Lora(_Trained):
    """A change of low rank to each convolution and linear layer is trained, with a new head (arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: list[Annotated[int, Field(ge=1, le=4096)]] = Field([4], min_length=1)
    """Ranks to try."""

    def amounts(self) -> Sequence[float | None]:
        return self.rank

    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        layers.adapt(model, fresh, int(amount or 1))


class Frozen(_Attacker):
    """Attackers who train nothing but a classifier of features.

    Features are computed once, in eval mode, without augmentation, and standardised with the training images' moments.
    """

    stage: Literal["any", "embedding"] = "any"
    """`any`: the mean of each stage's maps, or the embedding, whichever is best; `embedding`: it alone."""

    @abstractmethod
    def rates(self) -> Sequence[float]:
        """What is tuned besides the stage and `amounts()`."""

    @abstractmethod
    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Logistic | Nearest: ...

    def grid(self, stages: Sequence[str] = (EMBEDDING,)) -> list[Setting]:
        """stages: names of the features that the network has."""
        seen = stages if self.stage == "any" else (EMBEDDING,)
        return [Setting(self.kind, None, r, name, n) for n in self.amounts() for name in seen for r in self.rates()]


class _Linear(Frozen):
    """L2-regularised logistic regression, at most 300 steps of L-BFGS."""

    revision: ClassVar[int] = 2
    C: list[Rate] = Field([0.01, 0.1, 1.0, 10.0], min_length=1)
    """Inverse strengths of the L2 term to try."""

    def rates(self) -> Sequence[float]:
        return self.C

    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Logistic | Nearest:
        return Logistic(features, labels, rate)


class Probe(_Linear):
    """A linear classifier (L2-regularised logistic regression) on the features that the published model computes."""

    kind: Literal["probe"] = "probe"


class RenormProbe(_Renormalised, _Linear):
    """A linear classifier on the features of a model that is prepared as `renorm` does. Needs batch normalisation."""

    kind: Literal["renorm-probe"] = "renorm-probe"


class Compressed(_Linear):
    """A linear classifier on the features of a model of less precision: what it hides can come back."""

    kind: Literal["compressed"] = "compressed"
    bits: list[Annotated[int, Field(ge=2, le=16)]] = Field([8, 4], min_length=1)
    """Bits of a weight to try; each output channel has a scale of its own."""
    prune: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.5], min_length=0)
    """Shares of each layer's weights to try without, the smallest."""

    def amounts(self) -> Sequence[float | None]:
        return [*self.bits, *self.prune]

    def prepare(self, model: Classifier, fresh: Classifier, images: Images, amount: float | None = None) -> None:
        layers.compress(model.backbone, amount or 32)


class Knn(Frozen):
    """The nearest of his images, by the cosine of features; nothing is trained."""

    kind: Literal["knn"] = "knn"
    k: list[Annotated[int, Field(ge=1, le=100_000)]] = Field([1, 5, 20], min_length=1)
    """Numbers of neighbours to try."""

    def rates(self) -> Sequence[float]:
        return self.k

    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Logistic | Nearest:
        return Nearest(features, labels, int(rate))


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


Attacker = Annotated[
    Full | Probe | LastBlock | Renorm | RenormProbe | Norms | Lora | Compressed | Knn, Field(discriminator="kind")
]
"""Every attacker that a recipe can name."""
