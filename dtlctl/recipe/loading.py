"""Reading a recipe: TOML, `--set` overrides, and mistakes told in one line that names file, key and remedy."""

from __future__ import annotations

import codecs
import json
import re
import shlex
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from dtlctl.errors import RecipeError, suggest
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Dispose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


LARGEST = 1 << 20  # bytes of a recipe


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a TOML file, with `key.path=value` overrides applied one after the other as if the file said so.

    They are those of `--set` and of `--over`, and TOML but for two things. `dispose.*.KEY` is KEY of every variant with
    an unlearning loss. `dispose.NAME.odds` is a factor: λ is set to where λ / (1 − λ), the weight of the unlearning
    loss over the retaining loss's in Eq. 1, is that many times what it was. Raises RecipeError, naming file, key and
    reason, for anything that is not a valid recipe.
    """
    try:
        text = _read(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        raw = tomllib.loads(text)
    # Not only TOMLDecodeError: a number of 5,000 digits and a thousand open brackets end otherwise.
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid TOML: {_plain(error)}") from None
    try:
        for override in (one for text in overrides or [] for one in _for_each_variant(raw, text)):
            changes = _parse_override(override)
            _resolve_odds(raw, changes)
            _merge(raw, changes)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {_plain(error)}") from None
    return validated(raw, path)


def validated(raw: dict[str, Any], path: Path | str) -> Recipe:
    """The recipe of what a file says. Raises RecipeError, naming file, key and reason, where it is not valid."""
    try:
        return Recipe.model_validate(_resolve_like(raw))
    except ValidationError as error:
        try:
            reason = _explain(path, raw, error)
        except RecursionError:  # what is quoted may be a thousand tables deep
            reason = f"{path}: a key is nested too deeply"
        raise RecipeError(reason) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {_plain(error)}") from None


def _read(path: Path) -> str:
    """A recipe is a small regular file: a pipe or a device could be read for ever."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    with open(path, "rb") as file:
        blob = file.read(LARGEST + 1)
    if len(blob) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes")
    if blob.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in blob[:4]:
        raise ValueError("it is not text in UTF-8 but, it seems, in UTF-16 or UTF-32; save it as UTF-8")
    return blob.decode("utf-8-sig")  # with a byte-order mark or without


def _plain(text: object, longest: int = 300) -> str:
    """What a stranger's file may put on the terminal: one line, of printable characters, not too long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= longest else line[:longest] + "..."


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` as TOML; a value that is not TOML is a string, so that quotes may be left out in the shell."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {text}: write key.path=value, for example --set finetune.lr=0.02")
    plain_word = not value.strip().startswith(("{", "[", '"', "'"))
    for candidate in (value, json.dumps(value, ensure_ascii=False)) if plain_word else (value,):
        try:
            return tomllib.loads(f"{key.strip()} = {candidate}")
        except (ValueError, RecursionError) as failure:
            reason = failure
    quoted = re.sub(r"""\"[^"]*"|'[^']*'|[^][{}=,"']+(?!\s*=)(?=[],}])""", _quoted, value)
    try:
        tomllib.loads(f"{key.strip()} = {quoted}")
    except (ValueError, RecursionError):
        raise RecipeError(f"--set {_plain(text)}: not valid TOML: {_plain(reason)}") from None
    call = _plain(shlex.quote(f"{key}={quoted}"))
    raise RecipeError(f"--set {_plain(text)}: text in a list or table needs quotes, and they need others: --set {call}")


def _quoted(found: re.Match[str]) -> str:
    """A value within a list or table as it is, if it is TOML, or else as text."""
    value: Any = found[0].strip()
    with suppress(ValueError, RecursionError):
        value = tomllib.loads(f"x = {value}")["x"]
    return json.dumps(value, ensure_ascii=False) if value and isinstance(value, str) else found[0]


def names_in(key: str) -> list[str]:
    """The names in a dotted key, without the quotes that one with a dot has."""
    return [name.strip("\"'") for name in re.findall(r"\"[^\"]*\"|'[^']*'|[^.\s]+", key)]


def _variants(raw: dict[str, Any]) -> dict[str, Any]:
    """The tables of the variants with an unlearning loss, by name; they may hold anything else that is not valid."""
    tables = raw.get("dispose")
    return {
        name: table
        for name, table in (tables if isinstance(tables, dict) else {}).items()
        if isinstance(table, dict)
        and not (isinstance(loss := table.get("unlearn"), dict) and loss.get("kind") == "none")
    }


def _for_each_variant(raw: dict[str, Any], override: str) -> list[str]:
    """`dispose.*.KEY=VALUE` once for every variant with an unlearning loss; any other override as it is."""
    if not (star := re.match(r"\s*dispose\s*\.\s*\*\s*\.", override)):
        return [override]
    if not (names := _variants(raw)):
        raise ValueError(f"{override.partition('=')[0].strip()}: no [dispose.NAME] table has an unlearning loss")
    return [f"dispose.{json.dumps(name, ensure_ascii=False)}.{override[star.end() :]}" for name in names]


def _resolve_odds(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """Replace `dispose.NAME.odds` by the λ that it comes to."""
    tables = changes.get("dispose")
    for name, change in (tables if isinstance(tables, dict) else {}).items():
        if not isinstance(change, dict) or "odds" not in change:
            continue
        factor, variants = change.pop("odds"), _variants(raw)
        # An integer may be larger than any float, and still below infinity.
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= sys.float_info.max:
            raise ValueError(
                f"dispose.{name}.odds: {factor!r:.40} is no factor of the odds of lambda; give a number above 0"
            )
        if name not in variants:
            raise ValueError(f"dispose.{name}.odds: {name} has no unlearning loss" + suggest(name, variants))
        lam = variants[name].get("lambda", Dispose.model_fields["lam"].default)
        if type(lam) in (int, float) and 0 <= lam <= 1:  # any other is told when the recipe is validated
            change["lambda"] = float(f"{factor * lam / (1 - lam + factor * lam):g}")


def parse_value(text: str) -> list[Any]:
    """The values of `a,b,c`: TOML where it is TOML, else plain words. Raises RecipeError for tables and dates."""
    try:
        values = tomllib.loads(f"x = [{text}]")["x"]
    except (ValueError, RecursionError):  # not only TOMLDecodeError, as above
        values = [word.strip() for word in text.split(",")]
    plain = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if "" in values or not all(isinstance(one, bool | int | float | str) for one in plain):
        raise RecipeError(
            f"--over ...={_plain(text)}: numbers, words, lists of them can be swept; dates, tables and nothing cannot"
        )
    return values


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


def _resolve_like(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a copy of the table that a `like` names, and the own keys, in its place.

    A `like` that names none is left there, as a key that no dataset has. Where the table that it names is missing, so
    is what copies it: only the first is a mistake.
    """
    data = raw.get("data")
    if not isinstance(data, dict) or not isinstance(sets := data.get("piggyback"), dict):
        return raw
    resolved = {}
    for name, table in sets.items():
        if not isinstance(table, dict) or table.get("like") not in ("source", "target"):
            resolved[name] = table
        elif isinstance(base := data.get(table["like"]), dict):
            resolved[name] = {**base, **{k: v for k, v in table.items() if k != "like"}}
    return {**raw, "data": {**data, "piggyback": resolved}}


def _explain(path: Path | str, raw: dict[str, Any], error: ValidationError) -> str:
    """One line for the first mistake, unknown keys and tables before others, and one that names where the rest is."""
    errors = [e for e in error.errors(include_url=False) if not _inherited(raw, e["loc"])]
    unknown = {e["loc"][:-1] for e in errors if e["type"] == "extra_forbidden"}
    # What is missing where a key is unknown has most likely only another name there.
    errors = [e for e in errors if e["type"] != "missing" or e["loc"][:-1] not in unknown]
    errors.sort(key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    places = [_place(raw, e["loc"]) for e in errors]
    reason = _plain(_reason(errors[0]), 500)
    message = f"{path}: {places[0]}: {reason}" if places[0] else f"{path}: {reason}"
    others = list(dict.fromkeys(places[1:]))
    return message + (f"\nalso wrong: {', '.join(others[:6])}" + (", ..." if len(others) > 6 else "") if others else "")


def _reason(error: Any) -> str:
    """What is wrong with one key, from pydantic's description of it."""
    kind, loc, found, context = error["type"], error["loc"], error["input"], error.get("ctx", {})
    reason = f"{error['msg']} (it is {found!r})"
    if kind == "extra_forbidden":
        known = _fields_at(loc[:-1])
        reason = f"unknown {'table' if isinstance(found, dict) else 'key'}" + suggest(str(loc[-1]), known)
        if loc[-1] == "like" and "like" in known:
            reason = f"{found!r} is not valid" + suggest(str(found), ("source", "target"))
    elif kind == "missing":
        reason = "this key is required"
    elif kind == "union_tag_invalid":
        kinds = re.findall(r"'([^']+)'", context["expected_tags"])
        reason = f"unknown kind {context['tag']!r}" + suggest(context["tag"], kinds)
    elif kind == "union_tag_not_found":
        reason = 'the table needs a kind, as in { kind = "..." }'
    elif kind == "literal_error":
        reason = f"{found!r} is not valid" + suggest(str(found), re.findall(r"'([^']+)'", context["expected"]))
    elif kind == "value_error":
        reason = error["msg"].removeprefix("Value error, ")
    return reason


def _inherited(raw: dict[str, Any], loc: tuple[int | str, ...]) -> bool:
    """Whether a mistake in a table with `like` is one of the table that it copies, where it is told."""
    if loc[:2] != ("data", "piggyback") or len(loc) < 4 or loc[3] == "[key]":
        return False
    table = raw["data"]["piggyback"][loc[2]]
    return table.get("like") in ("source", "target") and loc[3] not in table


def _place(raw: Any, loc: tuple[int | str, ...]) -> str:
    """The key as the file has it: pydantic adds the names of union members, which no file contains."""
    parts: list[str] = []
    for depth, part in enumerate(loc):
        known = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int))
        if known or depth == len(loc) - 1:
            raw = raw[part] if known else None
            if part != "[key]":
                bare = isinstance(part, int) or re.fullmatch(r"[\w-]+", part)
                parts.append(_plain(part if bare else json.dumps(part, ensure_ascii=False), 80))
    return ".".join(parts)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at this place may have."""
    kind: Any = Recipe
    for part in loc:
        kind = _within(kind, part)
    like = ["like"] if loc[:2] == ("data", "piggyback") and len(loc) == 3 else []
    return sorted([*like, *_fields(kind)])


def _fields(model: Any) -> dict[str, Any]:
    """The types of a model's keys."""
    return {field.alias or name: _bare(field.annotation) for name, field in getattr(model, "model_fields", {}).items()}


def _within(kind: Any, part: int | str) -> Any:
    """The type of what has this name, place or, of a union, kind within a value of the type `kind`."""
    if get_origin(kind) in (dict, list):
        return _bare(get_args(kind)[-1])
    members = {member.model_fields["kind"].default: member for member in get_args(kind)}
    return members.get(part) or _fields(kind).get(str(part))


def _bare(kind: Any) -> Any:
    """A type without its annotations and without None."""
    inner = [one for one in get_args(kind) if one is not types.NoneType]
    is_union = get_origin(kind) in (Union, types.UnionType)
    return _bare(inner[0]) if get_origin(kind) is Annotated or (is_union and len(inner) == 1) else kind
