"""The recipe: one TOML file that describes an experiment. The schema and its resolved form; `loading.py` reads it."""

from __future__ import annotations

import re
import zlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dtlctl.attacks.attackers import Attacker
from dtlctl.data.dataset import Dataset
from dtlctl.errors import suggest
from dtlctl.model import networks
from dtlctl.objectives.retain import Distill, Retain
from dtlctl.objectives.unlearn import GradientCollision, Unlearn
from dtlctl.strict import Algorithm, Strict


def _plain_name(name: str) -> str:
    """A name that becomes a file or folder: it can neither leave its folder nor surprise any file system."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        raise ValueError("a name is 1 to 64 of a-z A-Z 0-9 . _ - and starts with a letter or digit")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError("this name is reserved on Windows")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]

# The names that models have in tables and on the command line before any variant.
REFERENCES = ("scratch", "TGT", "pre", "TL")


class Model(Strict):
    arch: str = "resnet18"
    stem: Literal["small", "imagenet"] = "small"
    width: int | None = Field(None, ge=4, le=1024)
    image_size: int = Field(32, ge=8, le=1024)
    channels_last: bool = Field(False, description="memory layout of images and maps; the same numbers up to rounding")

    @model_validator(mode="after")
    def _exists(self) -> Model:
        networks.check(self.arch, self.stem, self.width, self.image_size)
        if self.channels_last and (self.width or 16) < 16:
            # A strided 1x1 convolution of fewer channels than a vector has writes past its memory (oneDNN#6035).
            raise ValueError(f"channels_last needs a width of 16 or more, not {self.width}: torch crashes on narrower")
        return self


class Data(Strict):
    source: Dataset
    target: Dataset
    piggyback: dict[Name, Dataset] = Field({}, description="any number of named datasets")

    def of(self, role: str) -> Dataset:
        """The table for `source`, `target` or `piggyback.NAME`."""
        kind, _, name = role.partition(".")
        return self.piggyback[name] if name else getattr(self, kind)


class Training(Algorithm):
    """How one stage optimises. Batch size, learning rate and length are global: processes only change the speed."""

    epochs: int | None = Field(None, ge=1, le=100_000)
    steps: int | None = Field(None, ge=1, le=10_000_000)
    batch_size: int = Field(128, ge=2, le=65_536)
    lr: float = Field(0.1, gt=0, le=100)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0, le=1)
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    clip: float | None = Field(None, gt=0, description="largest gradient norm; longer gradients are scaled down")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps" + (", not both" if self.epochs else ""))
        return self

    def total_steps(self, images: int) -> int:
        """Optimiser steps over a training set of that many images."""
        return self.steps or (self.epochs or 0) * max(1, images // self.batch_size)


class Pretrain(Training):
    epochs: int | None = Field(None, ge=1, le=100_000)
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="of pre-training and the source's subset: all seeds then share one model"
    )


class Finetune(Training):
    lr: float = Field(0.01, gt=0, le=100)


class Dispose(Training):
    """One variant: Eq. 1 with one unlearning and one retaining loss."""

    lam: float = Field(0.1, ge=0, le=1, alias="lambda", description="weight of the unlearning loss in Eq. 1")
    unlearn: Unlearn = GradientCollision()
    retain: Retain = Distill()
    repair: float = Field(0.0, ge=0, lt=1, description="last share of the steps, with lambda = 0")
    init: Literal["TL", "fresh"] = Field("TL", description="start from TL, or from a new network as a reference")
    fresh_stages: int = Field(0, ge=0, description="of TL: how many of the last stages, and both heads, start anew")
    batch_norm: Literal["train", "frozen"] = "train"

    @model_validator(mode="after")
    def _chunks_divide(self) -> Dispose:
        if self.batch_size % self.unlearn.chunks:
            size, chunks = self.batch_size, self.unlearn.chunks
            raise ValueError(f"unlearn.chunks = {chunks} does not divide batch_size = {size} (rest {size % chunks})")
        if self.batch_size // self.unlearn.chunks < 2:
            raise ValueError(f"a chunk would hold {self.batch_size // self.unlearn.chunks} image; 2 are needed")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Dispose:
        if self.init == "fresh" and self.fresh_stages:
            raise ValueError(f'init = "fresh" starts everything anew; fresh_stages = {self.fresh_stages} is for TL')
        return self

    def equal_parts(self, images: int, processes: int) -> int:
        """How many of that many images a step takes: equal chunks on equal processes, 0 where there are too few."""
        parts = max(self.unlearn.chunks, processes)
        return min(self.batch_size, images) // parts * parts

    @property
    def new_heads(self) -> bool:
        """Whether the source head starts anew: only an unlearning loss that uses it trains it then."""
        return self.init == "fresh" or self.fresh_stages > 0


class Piggyback(Training):
    lr: float = Field(0.05, gt=0, le=100)
    batch_size: int = Field(64, ge=2, le=65_536)
    models: list[str] | None = Field(None, min_length=1, description="default: scratch, TGT, pre, TL and all variants")
    attackers: list[Attacker] = Field([], description="tuned attackers, besides the one setting of this table")
    attack_seeds: int = Field(1, ge=1, le=100, description="repetitions of every tuned attacker")
    choose_on: Literal["own", "test"] = Field(
        "own", description="images that choose settings: of the attacker's own, or half of the test split"
    )
    held_out: float = Field(0.25, gt=0, lt=1, description="share of the attacker's own images that chooses settings")

    def attacking(self, dataset: str) -> Piggyback:
        """The table with those attackers alone who attack that dataset."""
        chosen = [a for a in self.attackers if a.datasets is None or dataset in a.datasets]
        return self.model_copy(update={"attackers": chosen})


AttackName = Literal["loss", "entropy", "modified-entropy", "max-softmax", "adv-dist", "grad-w", "grad-x", "wb", "rmia"]


class Audit(Algorithm):
    """Membership inference, and two readouts beside it."""

    attacks: list[AttackName] = Field(["loss", "modified-entropy", "grad-w", "grad-x"], min_length=1)
    modes: list[Literal["as-is", "reprobe"]] = Field(
        ["as-is", "reprobe"], min_length=1, description="attack the source head as it is, or one fitted anew"
    )
    images: int = Field(1000, ge=10, le=1_000_000, description="at most as many members and as many non-members")
    repeats: int = Field(20, ge=1, le=1000, description="random splits into the attacker's images and judged ones")
    wb_repeats: int = Field(3, ge=1, le=1000, description="repeats of wb, which trains a network each time")
    adv_steps: int = Field(20, ge=1, le=10_000, description="steps of the search for an adversarial example")
    references: int = Field(0, ge=0, le=1024, description="reference models of rmia, trained in pairs")
    relearn_steps: int = Field(100, ge=0, le=1_000_000, description="budget of the relearning readout; 0 = none")
    relearn_lr: float = Field(0.02, gt=0, le=100)
    models: list[str] | None = Field(None, min_length=1, description="default: pre, TL and all variants")

    @model_validator(mode="after")
    def _references(self) -> Audit:
        if self.references % 2:
            raise ValueError(f"references = {self.references} is odd; they are trained in pairs")
        if ("rmia" in self.attacks) != (self.references > 0):
            raise ValueError('the attack "rmia" and references > 0 belong together; give both or neither')
        return self


class Compare(Strict):
    """Matched comparison: every unlearning loss at the λ that costs the same target accuracy (section 4.2)."""

    target_drop: float = Field(2.0, gt=0, le=100, description="points of Acc_t below TL, on validation images")
    tolerance: float = Field(1.5, gt=0, le=100, description="points; near enough to stop the search")
    disagreement: float = Field(
        0.2, gt=0, le=1, description="share of images that one of TL and a variant alone gets right, to refuse by"
    )
    rounds: int = Field(6, ge=1, le=30, description="most values of λ to try for one loss")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None, min_length=1, description="one λ for all these seeds; default: the recipe's seed"
    )

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int] | None) -> list[int] | None:
        if twice := [seed for seed in seeds or [] if (seeds or []).count(seed) > 1]:
            raise ValueError(f"{twice[0]} is there twice; give each seed once")
        return seeds


class Recipe(Strict):
    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    precision: networks.Precision = "float32"
    checkpoint_minutes: float = Field(5.0, ge=0, le=10_080, description="how often unfinished training is saved")
    model: Model = Model()
    data: Data
    pretrain: Pretrain = Pretrain(epochs=100)
    finetune: Finetune = Finetune(epochs=50)
    target_only: Finetune | None = Field(None, alias="target-only", description="TGT; default: as finetune")
    dispose: dict[Name, Dispose] = Field({}, description="any number of named variants")
    piggyback: Piggyback = Piggyback(epochs=50)
    audit: Audit = Audit()
    compare: Compare | None = Field(None, description="for the command compare")

    @field_validator("precision", mode="before")
    @classmethod
    def _no_half(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ValueError("float16 needs its loss scaled, which a product of two gradients squares; use bfloat16")
        return value

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for variant in self.dispose:
            if variant.lower() in {r.lower() for r in REFERENCES}:
                raise ValueError(f"dispose.{variant}: the name belongs to a reference model; choose another")
        for variant, settings in self.dispose.items():
            if self.precision == "bfloat16" and settings.unlearn.chunks > 1 and settings.unlearn.cosine is None:
                raise ValueError(
                    f"dispose.{variant}.unlearn: a collision in bfloat16 can point elsewhere (cosine 0.86 to float64 "
                    'was measured); write precision = "float32", or a bound that the run must hold, as cosine = 0.99'
                )
        for number, attacker in enumerate(self.piggyback.attackers):
            for dataset in attacker.datasets or []:
                if dataset not in self.data.piggyback:
                    where = f"piggyback.attackers.{number}.datasets"
                    raise ValueError(f"{where}: unknown dataset {dataset!r}" + suggest(dataset, [*self.data.piggyback]))
        for table, chosen in (("piggyback", self.piggyback.models), ("audit", self.audit.models)):
            known = [*REFERENCES, *self.dispose]
            for model in chosen or []:
                if model not in known:
                    raise ValueError(f"{table}.models: unknown model {model!r}" + suggest(model, known))
                if table == "audit" and model in ("scratch", "TGT"):
                    raise ValueError(f"audit.models: {model} never saw the source; there is nothing to infer")
        return self

    @property
    def piggyback_models(self) -> list[str]:
        return self.piggyback.models or [*REFERENCES, *self.dispose]

    @property
    def audit_models(self) -> list[str]:
        return self.audit.models or ["pre", "TL", *self.dispose]

    def stream(self, tag: str) -> int:
        """A 32-bit seed for one use of randomness, independent of every other tag's."""
        shared = self.pretrain.seed if tag.startswith(("pretrain/", "subset/source")) else None
        return zlib.crc32(f"{self.seed if shared is None else shared}/{tag}".encode())

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, under the names the file uses."""
        return self.model_dump(mode="json", by_alias=True)
