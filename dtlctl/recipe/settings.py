"""What a recipe says of each stage: training, disposal, attacks, comparison. `schema.py` puts the tables together."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dtlctl.attacks.attackers import Attacker
from dtlctl.attacks.search import Search
from dtlctl.objectives.retain import Distill, Retain
from dtlctl.objectives.unlearn import GradientCollision, Unlearn
from dtlctl.strict import Algorithm, Strict


class Training(Algorithm):
    """How a stage optimises, by SGD with momentum. All values are global: processes only change the speed."""

    epochs: int | None = Field(None, ge=1, le=100_000)
    """Length in passes over the training set; a rest smaller than a batch is left out. Either this or `steps`."""
    steps: int | None = Field(None, ge=1, le=10_000_000)
    """Length in optimiser steps. Either this or `epochs`."""
    batch_size: int = Field(128, ge=2, le=65_536)
    """Images a step; a smaller training set is one batch."""
    lr: float = Field(0.1, gt=0, le=100)
    """Learning rate; the peak of the schedule."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(5e-4, ge=0, le=1)
    """Weight decay, of all weights."""
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    """`one-cycle` rises to `lr` and falls again; `cosine` falls from `lr` to zero."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the gradient; a longer one is scaled down to it."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None) and (self.epochs or not getattr(self, "weights", None)):
            raise ValueError("give either epochs or steps" + (", not both" if self.epochs else ""))
        return self

    def total_steps(self, images: int) -> int:
        """Optimiser steps over a training set of that many images."""
        return self.steps or (self.epochs or 0) * max(1, images // self.batch_size)


class Adoptable(Training):
    """Training of a model from labels, or instead of it a network that exists."""

    weights: str | None = Field(None, min_length=1)
    """A network that exists, adopted and never trained: a `.safetensors` file with torchvision's names of tensors, a
    run's `pre`, an exported folder, or `torchvision:NAME`. Its keys of training are then for others (`rmia`, `TGT`)."""
    classes: list[str] | None = Field(None, min_length=1)
    """Of `weights`: the names of its head's outputs, in order. Without: those that the file names, or the data's."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`adamw`, for networks that SGD does not train well, such as transformers. It has no `momentum`."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a label that is spread over all classes."""
    layer_decay: float | None = Field(None, gt=0, lt=1)
    """Of `adamw`: the head has `lr`, each stage before it this share of the next one's; for trained networks."""
    patience: int | None = Field(None, ge=1, le=100_000)
    """Stop after so many epochs without a better accuracy on held-out images; the best weights are kept."""
    held_out: float = Field(0.1, gt=0, le=0.5)
    """With `patience`: this share of the smallest class's training images, of every class, is not trained on."""

    @model_validator(mode="after")
    def _adoptable(self) -> Adoptable:
        if self.layer_decay is not None and self.optimizer != "adamw":
            raise ValueError(f'layer_decay = {self.layer_decay:g} is for optimizer = "adamw"')
        if self.optimizer == "adamw" and self.lr > 0.01:
            raise ValueError(f"lr = {self.lr:g} is a step for SGD; adamw needs 0.01 or less, such as 0.001")
        if self.classes and not self.weights:
            raise ValueError("classes name the outputs of weights; give weights too")
        return self


class Pretrain(Adoptable):
    """Training of `pre`, a new network, on the source. An epoch is one of the source."""

    seed: int | None = Field(None, ge=0, lt=2**31)
    """Of pre-training and the source's subset, instead of the recipe's: all seeds then share one pre-trained model."""


class Finetune(Adoptable):
    """Training on the target: of `TL`, from `pre`, and of `TGT`, a new network. An epoch is one of the target."""

    lr: float = Field(0.01, gt=0, le=100)
    """Learning rate; the peak of the schedule."""


class Reference(Algorithm):
    """Another network, attacked like the rest: what an attacker has anyway, for instance."""

    weights: str = Field(min_length=1)
    """A `.safetensors` file, an exported folder or `torchvision:NAME`, of the recipe's architecture."""


PRICE, PASSES, STEPS = 1.0, 6, 1200
"""Of a disposal that says neither price nor λ, and no length: points of target accuracy, passes, least steps."""


class Dispose(Training):
    """One variant: minimises `(1 − lambda) · retain + lambda · unlearn` (Eq. 1). Recommended: an empty table."""

    revision: ClassVar[int] = 6
    batch_size: int = Field(64, ge=2, le=65_536)
    """Images a step."""
    clip: float | None = Field(10.0, gt=0)
    """Largest norm of a gradient; a longer one is scaled down."""
    lam: float | None = Field(None, ge=0, le=1, alias="lambda")
    """λ, the weight of the unlearning loss; default: the run finds it, by `price`."""
    price: float | None = Field(None, gt=0, le=100)
    """Points of target accuracy that it may cost, instead of `lambda`: the run finds λ, by the target images that
    `data.target.fraction` leaves out; a `TL` from outside is measured on test images. Default, without `lambda`: 1."""
    unlearn: Unlearn = GradientCollision(chunks=4)
    """What drives the source out. Default: gradient collision; `null-space` for a ResNet that ends in maps of 2×2 or
    less: with ImageNet's stem, on images of 64 pixels or fewer."""
    retain: Retain = Distill(on="both", temperature=4.0)
    """The retaining loss: what keeps the target."""
    least_steps: int = Field(0, ge=0, le=10_000_000)
    """Steps at least, however few images `epochs` pass over: a new network needs some. Without a length 1,200."""
    repair: float = Field(0.0, ge=0, lt=1)
    """The last share of the steps trains on the retaining loss alone."""
    settle: int | None = Field(None, ge=2, le=40)
    """End early: where at so many checks in a row (of some 40) neither price nor probe moved by more than a point; with
    a price to find λ for, after 70 % of the steps. The probe looks at test images of the source, and without a `price`
    the price so far at those of the target: report that the run saw them."""
    init: Literal["TL", "fresh"] = "fresh"
    """Where it starts: from a new network (`fresh`), or from `TL`, which is the default beside `fresh_stages`."""
    fresh_stages: int = Field(0, ge=0)
    """So many of the last stages of `TL`, and both heads, start anew."""
    draws: int = Field(3, ge=1, le=100)
    """Of a new network or fresh stages with a `price`: where all of its interval is above, by 5 points at most, it is
    drawn anew, up to so many draws in all; the cheapest is kept."""
    batch_norm: Literal["train", "frozen"] = "train"
    """Batch normalisation takes a batch's statistics, or (`frozen`) the running ones of the start."""

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, table: Any) -> Any:
        """With the defaults that depend on what else the table says."""
        if not isinstance(table, dict):
            return table
        length = {"epochs": PASSES, "least_steps": STEPS}
        filled: dict[str, Any] = {} if {"epochs", "steps"} & table.keys() else length
        if table.get("fresh_stages"):
            filled["init"] = "TL"
        if not {"lambda", "price"} & table.keys():
            loss = table.get("unlearn")
            kind = loss.get("kind") if isinstance(loss, dict) else getattr(loss, "kind", None)
            filled |= {"lambda": 0.0} if kind == "none" else {"price": PRICE}
        return {**filled, **table}

    @model_validator(mode="after")
    def _belong_together(self) -> Dispose:
        size, chunks = self.batch_size, self.unlearn.chunks
        if size % chunks:
            raise ValueError(f"unlearn.chunks = {chunks} does not divide batch_size = {size} (rest {size % chunks})")
        if size // chunks < 2:
            raise ValueError(f"a chunk would hold {size // chunks} image; 2 are needed")
        if self.price is not None and self.unlearn.no_price:
            raise ValueError(f'price: unlearn = {{ kind = "{self.unlearn.kind}" }} {self.unlearn.no_price}')
        if self.lam is not None and self.price is not None:
            raise ValueError(f"price = {self.price:g} finds lambda, and lambda = {self.lam:g} is given; leave one out")
        if self.price is not None and self.repair:
            raise ValueError(f"repair = {self.repair:g} is for a given lambda; a price lowers lambda where it must")
        if self.repair and self.settle is not None:
            raise ValueError(f"settle = {self.settle}: it would end before repair = {self.repair:g}; leave one out")
        if self.init == "fresh" and self.fresh_stages:
            raise ValueError(f'init = "fresh" starts everything anew; fresh_stages = {self.fresh_stages} is for TL')
        return self

    def total_steps(self, images: int) -> int:
        return max(self.least_steps, super().total_steps(images))

    def equal_parts(self, images: int, processes: int) -> int:
        """How many of that many images a step takes: equal chunks on equal processes, 0 where there are too few."""
        parts = max(self.unlearn.chunks, processes)
        return min(self.batch_size, images) // parts * parts

    @property
    def new_heads(self) -> bool:
        """Whether the source head starts anew: only an unlearning loss that uses it trains it then."""
        return self.init == "fresh" or self.fresh_stages > 0

    @property
    def most_draws(self) -> int:
        return self.draws if self.price is not None and self.new_heads else 1


class Piggyback(Training):
    """How the attacker fine-tunes: the same for all models and datasets. An epoch is one of the piggyback dataset."""

    lr: float = Field(0.05, gt=0, le=100)
    """Learning rate; the peak of the schedule."""
    batch_size: int = Field(64, ge=2, le=65_536)
    """Images a step; a smaller training set is one batch."""
    models: list[str] | None = Field(None, min_length=1)
    """Whom to attack; without it `scratch`, `TGT`, `pre`, `TL` and all variants."""
    attackers: list[Attacker] = Field([])
    """Tuned attackers, besides the one setting of this table."""
    search: Search | None = None
    """The attackers search among their settings, instead of trying grids."""
    attack_seeds: int = Field(1, ge=1, le=100)
    """Repetitions of every tuned attacker, each with its own head, split and batches."""
    choose_on: Literal["own", "test"] = "own"
    """What chooses settings: images of the attacker's own, or half of the test split; then the other half judges."""
    held_out: float = Field(0.25, gt=0, lt=1)
    """The share of his own images that chooses settings: the same number of every class, at least one."""


AttackName = Literal[
    "loss", "entropy", "modified-entropy", "max-softmax", "adv-dist", "grad-w", "grad-x", "wb", "rmia", "lira"
]


class Audit(Algorithm):
    """Membership inference, and two readouts beside it."""

    attacks: list[AttackName] = Field(["loss", "modified-entropy", "grad-x"], min_length=1)
    """Defaults cost seconds, `grad-w`, `adv-dist`, `wb` minutes, `rmia`, `lira` a pre-training for each reference."""
    modes: list[Literal["as-is", "reprobe", "target"]] = Field(["as-is", "reprobe"], min_length=1)
    """Attack the source head as it is, or one fitted anew on the features; or ask the target head who of the *target's*
    images was trained on, which takes 20 and as many test images, and no `rmia` or `lira`."""
    images: int = Field(1000, ge=10, le=1_000_000)
    """At most as many members, and as many non-members, are attacked."""
    repeats: int = Field(20, ge=1, le=1000)
    """Random splits into the attacker's images and judged ones."""
    wb_repeats: int = Field(3, ge=1, le=1000)
    """The same for `wb`, which trains a network in each."""
    adv_steps: int = Field(20, ge=1, le=10_000)
    """Steps of the search for an adversarial example."""
    references: int = Field(0, ge=0, le=1024)
    """Reference models of `rmia` and `lira`: an even number, better 4 or more, trained to the end; 0 without either."""
    relearn_steps: int = Field(100, ge=0, le=1_000_000)
    """Budget of the relearning readout, in steps of 64 images; 0 leaves it out."""
    relearn_lr: float = Field(0.02, gt=0, le=100)
    """Learning rate of the relearning readout, constant."""
    cka: bool = False
    """Also compare every stage of `TL` and the variants with that of `TL`, `TGT`, `pre` and a new network."""
    models: list[str] | None = None
    """Whom to attack, in `[]` nobody; default: `pre`, `TL`, all variants. `scratch` and `TGT` never saw the source."""

    @model_validator(mode="after")
    def _references(self) -> Audit:
        if self.references % 2:
            raise ValueError(f"references = {self.references} is odd; they are trained in pairs")
        if not {"rmia", "lira"}.isdisjoint(self.attacks) != (self.references > 0):
            raise ValueError('"rmia" or "lira", and references > 0, belong together; give both or neither')
        if self.modes == ["target"] and {"rmia", "lira"}.issuperset(self.attacks):
            raise ValueError('mode "target" has no reference models; add an attack that needs none')
        return self


class Compare(Strict):
    """How `dtlctl compare` finds for every unlearning loss the λ that costs the same target accuracy (section 4.2).

    By real disposals: at the variant's own `lambda`, at steps from it that double until the price is passed, then
    half-way, by target images that `data.target.fraction` leaves out. One that diverges is too dear. Attacks follow.
    """

    target_drop: float = Field(2.0, gt=0, le=100)
    """Points of target accuracy below `TL`, on held-back images, mean over the seeds."""
    tolerance: float = Field(1.5, gt=0, le=100)
    """As near is near enough, in points. One that the held-back images cannot resolve is refused."""
    disagreement: float = Field(0.2, gt=0, le=1)
    """Share of images that one of `TL` and a variant alone gets right: it decides what they can resolve."""
    rounds: int = Field(6, ge=1, le=30)
    """Most values of λ to try for one loss."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(None, min_length=1)
    """One λ is chosen for all of these, each given once; without it for the recipe's `seed` alone."""

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int] | None) -> list[int] | None:
        if twice := [seed for seed in seeds or [] if (seeds or []).count(seed) > 1]:
            raise ValueError(f"{twice[0]} is there twice; give each seed once")
        return seeds


class Track(Strict):
    """Where the numbers of every training go besides its sidecar, as it runs: trackers that Accelerate knows."""

    trackers: list[
        Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
    ] = Field([], alias="with")
    """Those that write files do so in the run's folder, `track/`. Each is a package of its own."""


class Publish(Strict):
    """Limits for the model that is published, which the exit code of `dtlctl run` and of `dtlctl export` holds.

    `run` ends with exit code 5 where the model that its verdict recommends misses one, or it recommends none; `export`
    refuses it. A limit is met by a whole 95 % interval within it, and by TGT unless it is shown to be beyond.
    """

    price: float | None = Field(None, ge=0, le=100)
    """Most points of target accuracy below `TL`, on the same test images."""
    recovered: float | None = Field(None, ge=0, le=1)
    """Largest share (PL − scratch) / (TL − scratch) for the strongest attacker, wherever there is any to recover."""
