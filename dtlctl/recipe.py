"""The recipe: one TOML file that describes an experiment. Schema, loading, overrides, resolved form."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dtlctl import models
from dtlctl.data.sources import Dataset
from dtlctl.errors import RecipeError
from dtlctl.objectives.retain import Distill, Retain
from dtlctl.objectives.unlearn import GradientCollision, Unlearn
from dtlctl.strict import Strict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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

    @model_validator(mode="after")
    def _exists(self) -> Model:
        models.check(self.arch, self.stem, self.width, self.image_size)
        return self


class Data(Strict):
    source: Dataset
    target: Dataset
    piggyback: dict[Name, Dataset] = Field({}, description="any number of named datasets")


class Training(Strict):
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


class Finetune(Training):
    lr: float = Field(0.01, gt=0, le=100)


class Dispose(Training):
    """One variant: Eq. 1 with one unlearning and one retaining loss."""

    lam: float = Field(0.1, ge=0, le=1, alias="lambda", description="weight of the unlearning loss in Eq. 1")
    unlearn: Unlearn = GradientCollision()
    retain: Retain = Distill()
    repair: float = Field(0.0, ge=0, lt=1, description="last share of the steps, with lambda = 0")
    init: Literal["TL", "fresh"] = Field("TL", description="start from TL, or from a new network as a reference")
    batch_norm: Literal["train", "frozen"] = "train"

    @model_validator(mode="after")
    def _chunks_divide(self) -> Dispose:
        if self.batch_size % self.unlearn.chunks:
            size, chunks = self.batch_size, self.unlearn.chunks
            raise ValueError(f"unlearn.chunks = {chunks} does not divide batch_size = {size} (rest {size % chunks})")
        if self.batch_size // self.unlearn.chunks < 2:
            raise ValueError(f"a chunk would hold {self.batch_size // self.unlearn.chunks} image; 2 are needed")
        return self


class Piggyback(Training):
    lr: float = Field(0.05, gt=0, le=100)
    batch_size: int = Field(64, ge=2, le=65_536)
    models: list[str] | None = Field(None, min_length=1, description="default: scratch, TGT, pre, TL and all variants")


class Audit(Strict):
    attacks: list[Literal["loss"]] = Field(["loss"], min_length=1)
    models: list[str] | None = Field(None, min_length=1, description="default: pre, TL and all variants")


class Recipe(Strict):
    name: Name
    seed: int = Field(0, ge=0, lt=2**31)
    model: Model = Model()
    data: Data
    pretrain: Pretrain = Pretrain(epochs=100)
    finetune: Finetune = Finetune(epochs=50)
    target_only: Finetune | None = Field(None, alias="target-only", description="TGT; default: as finetune")
    dispose: dict[Name, Dispose] = Field({}, description="any number of named variants")
    piggyback: Piggyback = Piggyback(epochs=50)
    audit: Audit = Audit()

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for variant in self.dispose:
            if variant.lower() in {r.lower() for r in REFERENCES}:
                raise ValueError(f"dispose.{variant}: the name belongs to a reference model; choose another")
        for table, chosen in (("piggyback", self.piggyback.models), ("audit", self.audit.models)):
            known = [*REFERENCES, *self.dispose]
            for model in chosen or []:
                if model not in known:
                    raise ValueError(f"{table}.models: unknown model {model!r}" + _nearest(model, known))
                if table == "audit" and model in ("scratch", "TGT"):
                    raise ValueError(f"audit.models: {model} never saw the source; there is nothing to infer")
        return self

    @property
    def piggyback_models(self) -> list[str]:
        return self.piggyback.models or [*REFERENCES, *self.dispose]

    @property
    def audit_models(self) -> list[str]:
        return self.audit.models or ["pre", "TL", *self.dispose]

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, under the names the file uses."""
        return self.model_dump(mode="json", by_alias=True)


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a TOML file, with `key.path=value` overrides applied as if the file said so.

    Raises RecipeError, naming file, key and reason, for anything that is not a valid recipe.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for override in overrides or []:
        _merge(raw, _parse_override(override))
    try:
        _resolve_like(raw)
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(path, raw, error)) from None
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` as TOML; a value that is not TOML is a string, so that quotes may be left out in the shell."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: write key.path=value, for example --set finetune.lr=0.02")
    plain_word = not value.strip().startswith(("{", "[", '"', "'"))
    for candidate in (value, json.dumps(value)) if plain_word else (value,):
        try:
            return tomllib.loads(f"{key.strip()} = {candidate}")
        except tomllib.TOMLDecodeError as failure:
            reason = failure
    raise RecipeError(f"--set {text}: not valid TOML: {reason}")


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    # One length in two units: whoever sets the one means to replace the other.
    if ("epochs" in changes) != ("steps" in changes):
        base.pop("steps" if "epochs" in changes else "epochs", None)
    # Another kind has other keys: those of the old one go with it.
    if changes.get("kind", base.get("kind")) != base.get("kind"):
        base.clear()
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _resolve_like(raw: dict[str, Any]) -> None:
    """Replace `like = "source"` by a copy of that table with this table's changes."""
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(sets := data.get("piggyback"), dict):
        return
    for name, table in sets.items():
        if not isinstance(table, dict) or "like" not in table:
            continue
        base = data.get(table["like"]) if table["like"] in ("source", "target") else None
        if not isinstance(base, dict):
            raise ValueError(f'data.piggyback.{name}.like: {table["like"]!r} is neither "source" nor "target"')
        sets[name] = {**base, **{k: v for k, v in table.items() if k != "like"}}


def _explain(path: Path, raw: dict[str, Any], error: ValidationError) -> str:
    """One line for the first mistake, and one that names where the others are."""
    errors = error.errors(include_url=False)
    places = [_place(raw, e["loc"]) for e in errors]
    first = errors[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "unknown key" + _nearest(str(first["loc"][-1]), _fields_at(first["loc"][:-1]))
    elif first["type"] == "missing":
        reason = "this key is required"
    elif first["type"] == "union_tag_invalid":
        kinds = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        reason = f"unknown kind {first['ctx']['tag']!r}" + _nearest(first["ctx"]["tag"], kinds)
    elif first["type"] == "union_tag_not_found":
        reason = 'the table needs a kind, as in { kind = "..." }'
    elif first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        reason = f"{first['input']!r} is not valid" + _nearest(str(first["input"]), choices)
    elif first["type"] not in ("value_error",):
        reason += f" (it is {first['input']!r})"
    message = f"{path}: {places[0]}: {reason}" if places[0] else f"{path}: {reason}"
    others = list(dict.fromkeys(places[1:]))
    return message + (f"\nalso wrong: {', '.join(others[:6])}" + (", ..." if len(others) > 6 else "") if others else "")


def _place(raw: Any, loc: tuple[int | str, ...]) -> str:
    """The key as the file has it: pydantic adds the names of union members, which no file contains."""
    parts: list[str] = []
    for depth, part in enumerate(loc):
        known = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int))
        if known or depth == len(loc) - 1:
            raw = raw[part] if known else None
            if part != "[key]":
                parts.append(str(part))
    return ".".join(parts)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at this place may have."""
    schema = Recipe.model_json_schema(by_alias=True)
    node: Any = schema
    for part in loc:
        node = _step_into(schema, node, str(part))
    return sorted(_follow(schema, node).get("properties", {}))


def _step_into(schema: dict[str, Any], node: Any, part: str) -> Any:
    node = _follow(schema, node)
    if "discriminator" in node:
        return {"$ref": node["discriminator"]["mapping"].get(part, "")}
    return node.get("properties", {}).get(part) or node.get("additionalProperties") or {}


def _follow(schema: dict[str, Any], node: Any) -> dict[str, Any]:
    """A schema node behind its references; of an optional one, the part that is not null."""
    if not isinstance(node, dict):
        return {}
    if "anyOf" in node:
        node = next((n for n in node["anyOf"] if n.get("type") != "null"), {})
    if "$ref" in node:
        return schema["$defs"].get(node["$ref"].rpartition("/")[2], {})
    return node


def _nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return (f"; did you mean {near[0]!r}?" if near else "") + f" (valid: {', '.join(known)})"
