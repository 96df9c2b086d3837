"""Piggyback attackers: what somebody with a few labelled images does to a model before and while training it.

Each kind is one class: its recipe fields, and `prepare`, which changes the model before the training starts. A new
one is a class here and its name in `Attacker`.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as pruning
from torch.optim.swa_utils import update_bn

from dtlctl.attacks.features import EMBEDDING, logistic
from dtlctl.attacks.tuning import WEIGHT_DECAY, Setting
from dtlctl.data.dataset import Augment
from dtlctl.errors import RecipeError
from dtlctl.model.batchnorm import BatchNorm, scale_invariant
from dtlctl.model.networks import Classifier, renew
from dtlctl.strict import Algorithm

Weighted = nn.Linear | nn.Conv2d
NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm)
"""Normalisations with weights of their own."""
ImageParts = Iterable[Tensor]
Rate = Annotated[float, Field(gt=0, le=100)]


def weighted(backbone: nn.Module) -> list[Weighted]:
    return [layer for layer in backbone.modules() if isinstance(layer, Weighted)]


class LowRank(nn.Module):
    """W + up · down, with W as it is and up zero at first (LoRA, arXiv:2106.09685); start: fresh weights, for down."""

    def __init__(self, start: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(start.detach().flatten(1)[:rank].clone())
        self.up = nn.Parameter(start.new_zeros(len(start), len(self.down)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class _Attacker(Algorithm):
    kind: str
    tried: ClassVar[str]
    """The field whose values are tried."""
    varied: ClassVar[tuple[str, ...]] = ()
    """The fields that say how much `prepare` may do, whose values are tried too."""
    datasets: list[str] | None = Field(None, min_length=1)
    """The piggyback datasets to attack; without it all."""

    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        """Change it in place. fresh: a new one of its kind; images: parts [n, 3, S, S]; amount: of `amounts()`."""

    def amounts(self) -> Sequence[float | None]:
        return [amount for name in self.varied for amount in getattr(self, name)] or (None,)

    def table(self) -> dict[str, Any]:
        """What a recipe would say of him, wherever he attacks."""
        return {"kind": self.kind, **self.model_dump(mode="json", exclude_defaults=True, exclude={"datasets"})}


class _Trained(_Attacker):
    """What every attacker who trains by gradients can vary."""

    tried: ClassVar[str] = "lr"
    revision: ClassVar[int] = 2
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """`sgd` has momentum 0.9."""
    lr: list[Rate] = Field([0.001, 0.01, 0.1, 1.0], min_length=1)
    """Learning rates to try."""
    steps: int = Field(150, ge=1, le=10_000_000)
    """Longest training; the held-out images choose when to stop, at one of some ten looks."""
    batch_size: int = Field(64, ge=2, le=65_536)
    """Images a step; a smaller training part is one batch."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls to zero along a cosine."""
    weight_decay: float = Field(WEIGHT_DECAY, ge=0, le=1)
    """Weight decay, of all weights."""
    layer_decay: float | None = Field(None, gt=0, lt=1)
    """Of `adamw`: the new head has `lr`, each stage before it this share of the next one's."""
    augment: Augment | None = None
    """What is done to his images; default: what the dataset's table says."""
    head: Literal["drawn", "fitted"] = "drawn"
    """The new head begins as it is drawn, or (`fitted`) as a logistic regression on the features (arXiv:2202.10054)."""

    @model_validator(mode="after")
    def _layered(self) -> "_Trained":
        if self.layer_decay is not None and self.optimizer != "adamw":
            raise ValueError(f'layer_decay = {self.layer_decay:g} is for optimizer = "adamw"')
        return self

    def grid(self, stages: Sequence[str] = ()) -> list[Setting]:
        return [Setting(self.kind, self.optimizer, rate, None, much) for much in self.amounts() for rate in self.lr]


class Full(_Trained):
    """All weights are trained under a new head: the paper's attacker (section 3.3), tuned."""

    kind: Literal["full"] = "full"


class LastBlock(_Trained):
    """Some last stages of the backbone are drawn anew, then all weights are trained: deep features may be the trap."""

    revision: ClassVar[int] = 3
    varied: ClassVar[tuple[str, ...]] = ("stages",)
    kind: Literal["last-block"] = "last-block"
    stages: list[Annotated[int, Field(ge=1)]] = Field([1, 2], min_length=1)
    """How many of the last stages are drawn anew: numbers to try."""

    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        renew(model.backbone, fresh.backbone, int(amount or 0))


class _Renormalised(_Attacker):
    @torch.no_grad()
    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        """Give scale-invariant convolutions the norm of new ones, and batch normalisation the images' statistics.

        Rescaled they compute the same, and the effective learning rate, which goes with 1 / |w|^2, is that of a new
        network (arXiv:1706.05350). Others stay as they are. Parts of the images weigh the same.
        """
        if not any(isinstance(module, BatchNorm) for module in model.modules()):
            raise RecipeError("piggyback.attackers: to renormalise needs a model with batch normalisation")
        parts = iter(images)
        first = next(parts)
        for name in scale_invariant(fresh, first.shape[1:]):
            old, new = (cast(nn.Conv2d, network.backbone.get_submodule(name)) for network in (model, fresh))
            # By a power of two first, which is exact: no square leaves the range of the type, however small it is.
            power = math.frexp(float(old.weight.abs().max()))[1]
            for parameter in old.parameters():
                parameter.mul_(2.0 ** -max(-126, min(126, power)))
            scale = new.weight.norm() / old.weight.norm().clamp(min=1e-12)
            for parameter in old.parameters():
                parameter.mul_(scale)
        update_bn(chain([first], parts), model)


class Renorm(_Renormalised, _Trained):
    """Convolutions before batch normalisation get the norm of new ones, and it new statistics; then all are trained.

    This undoes what only hides knowledge under batch normalisation (`renormalise`), without which it is refused.
    """

    revision: ClassVar[int] = 3
    kind: Literal["renorm"] = "renorm"


class Norms(_Trained):
    """The normalisations' weights are trained, with a new head; all else stays. Refused without normalisations."""

    kind: Literal["norms"] = "norms"

    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        model.backbone.requires_grad_(False)
        for norm in (m for m in model.backbone.modules() if isinstance(m, NORMS)):
            norm.requires_grad_(True)


class Lora(_Trained):
    """A change of low rank to each convolution and linear layer is trained, with a new head (arXiv:2106.09685)."""

    varied: ClassVar[tuple[str, ...]] = ("rank",)
    kind: Literal["lora"] = "lora"
    rank: list[Annotated[int, Field(ge=1, le=4096)]] = Field([4], min_length=1)
    """Ranks to try."""

    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        model.backbone.requires_grad_(False)
        for layer, start in zip(weighted(model.backbone), weighted(fresh.backbone), strict=True):
            parametrize.register_parametrization(layer, "weight", LowRank(start.weight, int(amount or 1)))


class SelfTraining(_Trained):
    """All weights are trained, also on images without labels, by his own answers where he is sure of them.

    Pseudo-labels (Lee 2013, ICML workshop on challenges in representation learning) above a threshold, as in FixMatch
    (arXiv:2001.07685). The images are those that `fraction` leaves out of the dataset; their labels are never read.
    """

    kind: Literal["self-training"] = "self-training"
    threshold: float = Field(0.8, ge=0, lt=1)
    """The probability from which on an answer counts as a label. A step has `batch_size` images without labels."""


class Frozen(_Attacker):
    """Attackers who train nothing but a classifier of features.

    Features are computed once, in eval mode, without augmentation, and standardised with the training images' moments.
    """

    stage: Literal["any", "embedding"] = "any"
    """`any`: the mean of each stage's maps, or the embedding, whichever is best; `embedding`: it alone."""

    @abstractmethod
    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Any:
        """What scikit-learn makes of features [N, F] and labels [N]; rate: one of `tried`."""

    def grid(self, stages: Sequence[str] = (EMBEDDING,)) -> list[Setting]:
        """stages: names of the features that the network has."""
        seen = stages if self.stage == "any" else (EMBEDDING,)
        rates = getattr(self, self.tried)
        return [Setting(self.kind, None, r, name, n) for n in self.amounts() for name in seen for r in rates]


class _Linear(Frozen):
    """L2-regularised logistic regression, at most 300 steps of L-BFGS."""

    tried: ClassVar[str] = "C"
    revision: ClassVar[int] = 4
    C: list[Rate] = Field([0.01, 0.1, 1.0, 10.0], min_length=1)
    """Inverse strengths of the L2 term to try."""

    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Any:
        return logistic(features, labels, rate)


class Probe(_Linear):
    """A linear classifier (L2-regularised logistic regression) on the features that the published model computes."""

    kind: Literal["probe"] = "probe"


class RenormProbe(_Renormalised, _Linear):
    """A linear classifier on the features of a model that is prepared as `renorm` does. Needs batch normalisation."""

    revision: ClassVar[int] = 5
    kind: Literal["renorm-probe"] = "renorm-probe"


class Compressed(_Linear):
    """A linear classifier on the features of a model of less precision: what it hides can come back."""

    varied: ClassVar[tuple[str, ...]] = ("bits", "prune")
    kind: Literal["compressed"] = "compressed"
    bits: list[Annotated[int, Field(ge=2, le=16)]] = Field([8, 4], min_length=0)
    """Bits of a weight to try; each output channel has a scale of its own."""
    prune: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.5], min_length=0)
    """Shares of each layer's weights to try without, the smallest."""

    @torch.no_grad()
    def prepare(self, model: Classifier, fresh: Classifier, images: ImageParts, amount: float | None = None) -> None:
        """Round every convolution's and linear layer's weights to `amount` bits, or zero a share below 1 of them.

        Rounded: a whole number from -(2^(bits-1) - 1) to 2^(bits-1) - 1 times the output channel's own scale, its
        largest weight's. Zeroed: that share of each layer's weights, the smallest.
        """
        amount = amount or 32  # bits, which are all there are
        for layer in weighted(model.backbone):
            if amount < 1:
                pruning.remove(pruning.l1_unstructured(layer, "weight", amount), "weight")
            else:
                rows = layer.weight.flatten(1)
                scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (int(amount) - 1) - 1)
                layer.weight.copy_(((rows / scale).round() * scale).view_as(layer.weight))


class Knn(Frozen):
    """The nearest of his images, by the cosine of features; nothing is trained."""

    tried: ClassVar[str] = "k"
    revision: ClassVar[int] = 3
    kind: Literal["knn"] = "knn"
    k: list[Annotated[int, Field(ge=1, le=100_000)]] = Field([1, 5, 20], min_length=1)
    """Numbers of neighbours to try."""

    def fit(self, features: np.ndarray, labels: np.ndarray, rate: float) -> Any:
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # Each of them has a vote of 1 / distance.
        voting = KNeighborsClassifier(min(int(rate), len(labels)), metric="cosine", weights="distance")
        return make_pipeline(StandardScaler(), voting).fit(features, labels)


Attacker = Annotated[
    Full | Probe | LastBlock | Renorm | RenormProbe | Norms | Lora | SelfTraining | Compressed | Knn,
    Field(discriminator="kind"),
]
"""Every attacker that a recipe can name."""
