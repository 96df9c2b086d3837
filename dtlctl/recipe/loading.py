"""Reading a recipe: TOML, `--set` overrides, and mistakes told in one line that names file, key and remedy."""

import codecs
import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dtlctl.errors import RecipeError, first_of, one_line, suggest
from dtlctl.recipe.overrides import apply, parsed, tomllib
from dtlctl.recipe.schema import Recipe, fields, within

LARGEST = 1 << 20  # bytes of a recipe


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a TOML file, with overrides applied one after the other as if the file said so; or RecipeError."""
    what = "cannot be read: "
    try:
        text = _read(path)
        what = "not valid TOML: "
        raw = tomllib.loads(text)
        what = ""
        for override in overrides or []:
            apply(raw, override)
    # Not only TOMLDecodeError: a number of 5,000 digits and a thousand open brackets end otherwise.
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {what}{getattr(error, 'strerror', None) or one_line(error)}") from None
    return validated(raw, path)


def validated(raw: dict[str, Any], path: Path | str) -> Recipe:
    """The recipe of what a file says. Raises RecipeError, naming file, key and reason, where it is not valid."""
    try:
        return Recipe.model_validate(_resolve_like(raw))
    except ValidationError as error:
        try:
            reason = _explain(raw, error)
        except RecursionError:  # what is quoted may be a thousand tables deep
            reason = "a key is nested too deeply"
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
    raise RecipeError(f"{path}: {reason}")


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


def _resolve_like(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a copy of the table that a `like` names, and the own keys, in its place.

    A `like` that names none stays, as a key that no dataset has. What copies a table that is missing is missing too.
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


def _explain(raw: dict[str, Any], error: ValidationError) -> str:
    """One line for the first mistake, unknown keys and tables before others, and one for the rest."""
    errors = error.errors(include_url=False)
    errors = [e for e in errors if not _inherited(raw, e["loc"], [other["loc"] for other in errors])]
    unknown = {e["loc"][:-1] for e in errors if e["type"] == "extra_forbidden"}
    # What is missing where a key is unknown has most likely only another name there.
    errors = [e for e in errors if e["type"] != "missing" or e["loc"][:-1] not in unknown]
    errors.sort(key=lambda e: (e["type"] != "extra_forbidden", len(e["loc"])))
    return first_of((_place(raw, e), _reason(e)) for e in errors)


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
    elif kind == "list_type" and isinstance(found, str):
        reason = f"it takes a list, as in {loc[-1]} = {json.dumps(parsed(found), ensure_ascii=False, default=str)}"
    elif kind in ("model_type", "dict_type", "model_attributes_type"):  # a union of kinds is the last
        reason = f"it takes a table, not {found!r}"
        if kind == "model_attributes_type" and isinstance(found, str):
            reason += f"; write {{ kind = {json.dumps(found, ensure_ascii=False)} }}"
    elif kind == "value_error":
        reason = error["msg"].removeprefix("Value error, ")
    return reason


def _inherited(raw: dict[str, Any], loc: tuple[int | str, ...], others: list[tuple[int | str, ...]]) -> bool:
    """Whether a mistake in a table with `like` is one of the table that it copies, where it is told."""
    if loc[:2] != ("data", "piggyback") or len(loc) < 3 or "[key]" in loc:
        return False
    table = raw["data"]["piggyback"][loc[2]]
    if not isinstance(table, dict) or table.get("like") not in ("source", "target"):
        return False
    return loc[3] not in table if len(loc) > 3 else ("data", table["like"]) in others


def _place(raw: Any, error: Any) -> str:
    """The key as the file has it: pydantic adds the names of union members, which no file contains."""
    parts: list[str] = []
    for depth, part in enumerate(error["loc"], 1):
        known = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int))
        if known or (depth == len(error["loc"]) and error["type"] == "missing"):
            raw = raw[part] if known else None
            if part != "[key]":
                bare = isinstance(part, int) or re.fullmatch(r"[\w-]+", part)
                parts.append(one_line(part if bare else json.dumps(part, ensure_ascii=False), 80))
    return ".".join(parts)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at this place may have."""
    like = ["like"] if loc[:2] == ("data", "piggyback") and len(loc) == 3 else []
    return sorted([*like, *fields(reduce(within, loc, Recipe))])
