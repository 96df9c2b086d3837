"""The recipe: one TOML file that describes an experiment. The schema and its resolved form; `loading.py` reads it."""

from __future__ import annotations

import re
import types
import zlib
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, Field, field_validator, model_validator

from dtlctl.data.dataset import Dataset
from dtlctl.errors import suggest
from dtlctl.model import networks
from dtlctl.recipe.settings import Audit, Compare, Dispose, Finetune, Piggyback, Pretrain, Publish, Reference, Track
from dtlctl.strict import Strict


def _plain_name(name: str) -> str:
    """A name that becomes a file or folder: it can neither leave its folder nor surprise any file system."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        raise ValueError("a name is 1 to 64 of a-z A-Z 0-9 . _ - and starts with a letter or digit")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError("this name is reserved on Windows")
    return name


def _apart(tables: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, str] = {}
    for name in tables:
        if (other := known.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are one folder where case does not count; rename one of the two")
    return tables


Name = Annotated[str, AfterValidator(_plain_name)]
Table = TypeVar("Table")
Named = Annotated[dict[Name, Table], AfterValidator(_apart)]
"""Tables under names that are the user's."""

# The names that models have in tables and on the command line before any variant.
REFERENCES = ("scratch", "TGT", "pre", "TL")


class Model(Strict):
    """The one network of all stages. Its weights start from random numbers, unless a stage names `weights`."""

    arch: str = "resnet18"
    """A classifier of torchvision, `resnet10`, a CIFAR ResNet (`resnet8`, `20`, `32`, ... `110`), `timm:NAME`."""
    stem: Literal["small", "imagenet"] = "small"
    """`small`: a 3×3 stride-1 convolution, no max-pool, ResNets only. `imagenet`: torchvision's own first layers."""
    width: int | None = Field(None, ge=4, le=1024)
    """Channels of a CIFAR ResNet's first stage; 16 if left out. Not for other architectures."""
    image_size: int = Field(32, ge=8, le=1024)
    """Images are resized to this many pixels, square."""
    mean: list[float] = Field([*networks.MEAN], min_length=3, max_length=3)
    """What is subtracted from an image's red, green and blue in [0, 1]; ImageNet's if left out."""
    std: list[Annotated[float, Field(gt=0)]] = Field([*networks.STD], min_length=3, max_length=3)
    """What they are then divided by."""
    channels_last: bool = False
    """Memory layout of images and maps: the same numbers up to rounding, often faster. Needs a `width` >= 16."""

    @model_validator(mode="after")
    def _exists(self) -> Model:
        networks.check(*self.shape)
        if self.channels_last and (self.width or 16) < 16:
            # A strided 1x1 convolution of fewer channels than a vector has writes past its memory (oneDNN#6035).
            raise ValueError(f"channels_last needs a width of 16 or more, not {self.width}: torch crashes on narrower")
        return self

    @property
    def ends_small(self) -> bool:
        """Whether it is a ResNet whose last maps are 2 x 2 or smaller."""
        return self.arch.startswith("resnet") and self.stem == "imagenet" and self.image_size <= 64

    @property
    def shape(self) -> tuple[str, str, int | None, int]:
        """What `networks.outline` and its like ask for."""
        return self.arch, self.stem, self.width, self.image_size

    def described(self) -> dict[str, Any]:
        """What results depend on."""
        usual = {"mean", "std"} if (*self.mean, *self.std) == (*networks.MEAN, *networks.STD) else set()
        return self.model_dump(mode="json", exclude={"channels_last", *usual})


class Data(Strict):
    """The datasets by their roles."""

    source: Dataset
    """The private data, D_s: what the network may not keep."""
    target: Dataset
    """The task to publish, D_t."""
    piggyback: Named[Dataset] = Field({})
    """What an attacker has, D_p: any number of datasets, their names are yours."""

    @property
    def roles(self) -> list[str]:
        return ["source", "target", *(f"piggyback.{name}" for name in self.piggyback)]

    def of(self, role: str) -> Dataset:
        """The table for `source`, `target` or `piggyback.NAME`."""
        kind, _, name = role.partition(".")
        return self.piggyback[name] if name else getattr(self, kind)


class Recipe(Strict):
    """One experiment: its data, its network, every stage, the attacks."""

    name: Name
    """The run's folder is `OUT/<name>`."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides all randomness of the run."""
    precision: networks.Precision = "float32"
    """Of the forward passes; weights, losses and gradients are float32. `float64`: all of it; `tf32`: GPUs only."""
    checkpoint_minutes: float = Field(5.0, ge=0, le=10_080)
    """How often the state of unfinished training is saved, in minutes; 0 is every step. No result depends on it."""
    model: Model = Model()
    """The network."""
    data: Data
    """The datasets."""
    pretrain: Pretrain = Pretrain(epochs=100)
    """Training of `pre`."""
    finetune: Finetune = Finetune(epochs=50)
    """Training of `TL`."""
    target_only: Finetune | None = Field(None, alias="target-only")
    """Training of `TGT`: the keys of `finetune`, none inherited from it; without the table, as `finetune`."""
    reference: Named[Reference] = Field({})
    """Any other networks, to stand beside; their names are yours."""
    dispose: Named[Dispose] = Field({})
    """One table a variant; its name is yours."""
    piggyback: Piggyback = Piggyback(epochs=50)
    """The attacker's training."""
    audit: Audit = Audit()
    """Membership inference."""
    compare: Compare | None = None
    """The matched comparison, for the command of that name; without the table it has the defaults."""
    publish: Publish | None = None
    """Limits for what may be published."""
    track: Track = Track()
    """Where else the numbers of training go."""

    @model_validator(mode="before")
    @classmethod
    def _recommended(cls, tables: Any) -> Any:
        """Give a disposal that names no loss the one for its network; what is wrong with a table is told later."""
        with suppress(ValueError, AttributeError, TypeError):
            if Model.model_validate(tables.get("model", {})).ends_small:
                loss = {"unlearn": {"kind": "null-space"}}
                return {**tables, "dispose": {name: {**loss, **one} for name, one in tables.get("dispose", {}).items()}}
        return tables

    @field_validator("precision", mode="before")
    @classmethod
    def _no_half(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ValueError("float16 needs its loss scaled, which a product of two gradients squares; use bfloat16")
        return value

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        taken = {name.lower() for name in REFERENCES}
        for name in [*self.reference, *self.dispose]:
            if name.lower() in taken:
                table = "reference" if name in self.reference else "dispose"
                raise ValueError(f"{table}.{name}: the name belongs to a reference model; choose another")
            taken |= {name.lower()} if name in self.reference else set()
        for variant, settings in self.dispose.items():
            if self.precision == "bfloat16" and settings.unlearn.chunks > 1 and settings.unlearn.cosine is None:
                raise ValueError(
                    f"dispose.{variant}.unlearn: a collision in bfloat16 can point elsewhere (cosine 0.86 to float64 "
                    'was measured); write precision = "float32", or a bound that the run must hold, as cosine = 0.99'
                )
        if self.piggyback.search and not self.piggyback.attackers:
            raise ValueError("piggyback.search: among whose settings? name attackers, or leave it out")
        for number, attacker in enumerate(self.piggyback.attackers):
            for dataset in attacker.datasets or []:
                if dataset not in self.data.piggyback:
                    where = f"piggyback.attackers.{number}.datasets"
                    raise ValueError(f"{where}: unknown dataset {dataset!r}" + suggest(dataset, [*self.data.piggyback]))
        for table, chosen in (("piggyback", self.piggyback.models), ("audit", self.audit.models)):
            known = [*self.references, *self.dispose]
            for model in chosen or []:
                if model not in known:
                    raise ValueError(f"{table}.models: unknown model {model!r}" + suggest(model, known))
                if table == "audit" and model in ("scratch", "TGT", *self.reference):
                    raise ValueError(f"audit.models: {model} never saw the source; there is nothing to infer")
        return self

    @model_validator(mode="after")
    def _weights(self) -> Recipe:
        if self.finetune.weights and self.pretrain.weights:
            raise ValueError("pretrain.weights: TL is finetune.weights, and needs no pre; leave one of them out")
        if self.pretrain.weights and self.audit.references and not (self.pretrain.epochs or self.pretrain.steps):
            raise ValueError("pretrain: audit.references are trained as this table says; give epochs beside weights")
        return self

    @property
    def references(self) -> list[str]:
        """The models that stand in tables before any variant; without `pre` where TL comes from outside."""
        return ["scratch", "TGT", *(["pre"] * (not self.finetune.weights)), "TL", *self.reference]

    @property
    def audit_models(self) -> list[str]:
        if self.audit.models is not None:
            return self.audit.models
        return [*(["pre"] * ("pre" in self.references)), "TL", *self.dispose]

    def stream(self, tag: str) -> int:
        """A 32-bit seed for one use of randomness, independent of every other tag's."""
        shared = self.pretrain.seed if tag.startswith(("pretrain/", "pre/", "subset/source")) else None
        return stream(self.seed if shared is None else shared, tag)

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, under the names the file uses."""
        return self.model_dump(mode="json", by_alias=True)


def stream(seed: int, tag: str) -> int:
    """A 32-bit seed for one use of a recipe's seed."""
    return zlib.crc32(f"{seed}/{tag}".encode())


def json_schema() -> dict[str, Any]:
    """What an editor needs to complete, explain and check a recipe: a JSON schema, draft 2020-12.

    Whatever `loading` accepts is valid by it. What only two keys together can break is left to `loading`.
    """
    schema = Recipe.model_json_schema(by_alias=True)
    tables = schema["$defs"]
    like = {"description": "Copy this table; the other keys change the copy.", "enum": ["source", "target"]}
    keys = {"like": like, **tables["Dataset"]["properties"]}
    either = [{"required": ["path"]}, {"required": ["like"]}]
    rest = {key: value for key, value in tables["Dataset"].items() if key != "required"}
    tables["PiggybackDataset"] = {**rest, "properties": keys, "anyOf": either}
    tables["Data"]["properties"]["piggyback"]["additionalProperties"] = {"$ref": "#/$defs/PiggybackDataset"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def fields(model: Any) -> dict[str, Any]:
    """The types of a model's keys."""
    return {field.alias or name: _bare(field.annotation) for name, field in getattr(model, "model_fields", {}).items()}


def within(kind: Any, part: int | str) -> Any:
    """The type of what has this name, place or, of a union, kind within a value of the type `kind`."""
    if get_origin(kind) in (dict, list):
        return _bare(get_args(kind)[-1])
    members = {m.model_fields["kind"].default: m for m in get_args(kind) if "kind" in getattr(m, "model_fields", ())}
    return members.get(part) or fields(kind).get(str(part))


def _bare(kind: Any) -> Any:
    """A type without its annotations and without None."""
    inner = [one for one in get_args(kind) if one is not types.NoneType]
    is_union = get_origin(kind) in (Union, types.UnionType)
    return _bare(inner[0]) if get_origin(kind) is Annotated or (is_union and len(inner) == 1) else kind
