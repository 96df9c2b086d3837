"""Reading a recipe: TOML, `--set` overrides, and mistakes told in one line that names file, key and remedy."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtlctl.errors import RecipeError, suggest
from dtlctl.recipe.schema import Dispose, Recipe

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
        _resolve_like(raw)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {_plain(error)}") from None
    return validated(raw, path)


def validated(raw: dict[str, Any], path: Path | str) -> Recipe:
    """The recipe of what a file says. Raises RecipeError, naming file, key and reason, where it is not valid."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(path, raw, error)) from None
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
    return blob.decode("utf-8")


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
    raise RecipeError(f"--set {_plain(text)}: not valid TOML: {_plain(reason)}")


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


def _explain(path: Path | str, raw: dict[str, Any], error: ValidationError) -> str:
    """One line for the first mistake, and one that names where the others are."""
    errors = error.errors(include_url=False)
    places = [_place(raw, e["loc"]) for e in errors]
    first = errors[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "unknown key" + suggest(str(first["loc"][-1]), _fields_at(first["loc"][:-1]))
    elif first["type"] == "missing":
        reason = "this key is required"
    elif first["type"] == "union_tag_invalid":
        kinds = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        reason = f"unknown kind {first['ctx']['tag']!r}" + suggest(first["ctx"]["tag"], kinds)
    elif first["type"] == "union_tag_not_found":
        reason = 'the table needs a kind, as in { kind = "..." }'
    elif first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        reason = f"{first['input']!r} is not valid" + suggest(str(first["input"]), choices)
    elif first["type"] not in ("value_error",):
        reason += f" (it is {first['input']!r})"
    reason = _plain(reason, 500)
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
                parts.append(_plain(part, 80))
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
    return node.get("properties", {}).get(part) or node.get("additionalProperties") or node.get("items") or {}


def _follow(schema: dict[str, Any], node: Any) -> dict[str, Any]:
    """A schema node behind its references; of an optional one, the part that is not null."""
    if not isinstance(node, dict):
        return {}
    if "anyOf" in node:
        node = next((n for n in node["anyOf"] if n.get("type") != "null"), {})
    if "$ref" in node:
        return schema["$defs"].get(node["$ref"].rpartition("/")[2], {})
    return node
