"""Changes to a recipe: `--set KEY.PATH=VALUE`, the values of `--over`, and a λ that is written into its file."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin

from dtlctl.errors import RecipeError, one_line, suggest
from dtlctl.recipe.schema import Recipe, within
from dtlctl.storage import checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def apply(raw: dict[str, Any], override: str) -> None:
    """Change what a file says by one `key.path=value`.

    It is TOML but for two things. `dispose.*.KEY` is KEY of every variant with an unlearning loss. `dispose.NAME.odds`
    is a factor of λ / (1 − λ). Raises RecipeError or ValueError, naming key and reason.
    """
    for one in _for_each_variant(raw, override):
        changes = _parse_override(one)
        _check_names(raw, one)
        _resolve_odds(raw, changes)
        _merge(raw, changes)


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=1` as TOML; what is not TOML, in a list or table too, is text: quotes may be left out in the shell."""
    key, equals, value = text.partition("=")
    if "\n" in text or "\r" in text:
        raise RecipeError(f"--set {one_line(text)}: one key and one line each; repeat --set for another key")
    if not equals or not key.strip() or key.lstrip().startswith("#"):  # to TOML that would be a comment
        raise RecipeError(f"--set {one_line(text)}: write key.path=value, for example --set finetune.lr=0.02")
    if value.strip().startswith(("{", "[", '"', "'")):
        words = re.sub(r"""\"[^"]*"|'[^']*'|[^][{}=,"']+(?!\s*=)(?=[],}])""", _quoted, value)
    else:
        words = json.dumps(value.strip(), ensure_ascii=False)
    for candidate in (value, words):
        try:
            return tomllib.loads(f"{key.strip()} = {candidate}")
        except (ValueError, RecursionError) as failure:
            reason = one_line(failure)
    raise RecipeError(f"--set {one_line(text)}: not valid TOML: {reason}")


def _quoted(found: re.Match[str]) -> str:
    """A value within a list or table as it is, if it is TOML, or else as text."""
    value: Any = found[0].strip()
    with suppress(ValueError, RecursionError):
        value = tomllib.loads(f"x = {value}")["x"]
    return json.dumps(value, ensure_ascii=False) if value and isinstance(value, str) else found[0]


def _check_names(raw: Any, override: str) -> None:
    """Raise ValueError for a key in a table that has the user's name and is not there: it would make a new one."""
    kind: Any = Recipe
    table, place = tomllib.loads(f"{override.partition('=')[0]} = 0"), list[str]()
    while table:
        ((name, table),) = table.items()
        known = raw if isinstance(raw, dict) else {}
        place.append(name if re.fullmatch(r"[\w-]+", name) else json.dumps(name, ensure_ascii=False))
        if table and get_origin(kind) is dict and name not in known:
            path = ".".join(place)
            raise ValueError(
                f"{path}: no such table{suggest(name, known)}; a new one is written into the file, or given whole: "
                f"--set {shlex.quote(path + '={...}')}"
            )
        kind, raw = within(kind, name), known.get(name)


def names_in(key: str) -> list[str]:
    """The names in a dotted key, without the quotes that one with a dot has."""
    return [name.strip("\"'") for name in re.findall(r"\"[^\"]*\"|'[^']*'|[^.\s]+", key)]


def _variants(raw: dict[str, Any]) -> dict[str, Any]:
    """The tables of the variants with an unlearning loss, by name; they may hold anything else that is not valid."""
    tables = {name: table for name, table in _table(raw, "dispose").items() if isinstance(table, dict)}
    return {name: table for name, table in tables.items() if _table(table, "unlearn").get("kind") != "none"}


def _table(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return found if isinstance(found := raw.get(name), dict) else {}


def _for_each_variant(raw: dict[str, Any], override: str) -> list[str]:
    """`dispose.*.KEY=VALUE` once for every variant with an unlearning loss; any other override as it is."""
    if not (star := re.match(r"\s*dispose\s*\.\s*\*\s*\.", override)):
        return [override]
    if not (names := _variants(raw)):
        raise ValueError(f"{override.partition('=')[0].strip()}: no [dispose.NAME] table has an unlearning loss")
    return [f"dispose.{json.dumps(name, ensure_ascii=False)}.{override[star.end() :]}" for name in names]


def _resolve_odds(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """Replace `dispose.NAME.odds` by the λ that it comes to."""
    for name, change in _table(changes, "dispose").items():
        if not isinstance(change, dict) or "odds" not in change:
            continue
        if "lambda" in change:
            raise ValueError(f"dispose.{name}: odds and lambda say the same; give one of them")
        factor, variants = change.pop("odds"), _variants(raw)
        # An integer may be larger than any float, and still below infinity.
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= sys.float_info.max:
            reason = f"{factor!r:.40} is no factor of the odds of lambda; give a number above 0"
            raise ValueError(f"dispose.{name}.odds: {reason}")
        if name not in variants:
            raise ValueError(f"dispose.{name}.odds: {name} has no unlearning loss" + suggest(name, variants))
        if (lam := variants[name].get("lambda")) is None:
            raise ValueError(f"dispose.{name}.odds: {name} has a price and no lambda; give it one")
        if type(lam) in (int, float) and 0 <= lam <= 1:  # any other is told when the recipe is validated
            change["lambda"] = float(f"{factor * lam / (1 - lam + factor * lam):g}")
            if not 0 < change["lambda"] < 1:
                found = f"{factor:g} times the odds of lambda = {lam:g} comes to lambda = {change['lambda']:g}"
                raise ValueError(f"dispose.{name}.odds: {found}; give lambda itself")


def parsed(text: str) -> list[Any]:
    """The values of `a,b,c`: TOML where it is TOML, else plain words."""
    try:
        return tomllib.loads(f"x = [{text}]")["x"]
    except (ValueError, RecursionError):  # not only TOMLDecodeError: a number of 5,000 digits ends otherwise
        return [word.strip() for word in text.split(",")]


def parse_value(text: str) -> list[Any]:
    """The values of `a,b,c`. Raises RecipeError for tables and dates."""
    values = parsed(text)
    plain = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if "" in values or not all(isinstance(one, bool | int | float | str) for one in plain):
        allowed = "numbers, words, lists of them can be swept; dates, tables and nothing cannot"
        raise RecipeError(f"--over ...={one_line(text)}: {allowed}")
    return values


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> None:
    # One length in two units, one weight by two measures: whoever sets the one means to replace the other.
    for one, other in (("epochs", "steps"), ("lambda", "price")):
        if (one in changes) != (other in changes):
            base.pop(other if one in changes else one, None)
    # Another kind has other keys: those of the old one go with it.
    if changes.get("kind", base.get("kind")) != base.get("kind"):
        base.clear()
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def write_lambdas(path: Path, lambdas: Mapping[str, float], *, dry: bool = False) -> None:
    """Set λ of these variants in the file; a comment on the line keeps what it was. dry: only see whether that goes.

    Raises RecipeError where a λ is not one number in the file, and CheckpointError where that cannot be written.
    """
    where = Path(os.path.realpath(path))  # a link stays one
    try:
        text, mode = where.read_bytes().decode(), where.stat().st_mode
        for variant, lam in lambdas.items():
            text = with_lambda(text, variant, lam)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: λ cannot be written into it: {getattr(error, 'strerror', None) or error}") from None
    if not dry:
        checkpoint.write(where, text.encode())
        where.chmod(mode)


def with_lambda(text: str, variant: str, lam: float) -> str:
    """The recipe with another λ of one variant. Raises ValueError where there is not exactly one number to change.

    It is the one whose change makes the file say just what it should: whatever only looks like it is left alone.
    """
    wanted = tomllib.loads(text.removeprefix("\ufeff"))
    table = wanted.get("dispose", {}).get(variant, {})
    if "lambda" not in table:
        raise ValueError(f"[dispose.{variant}] has no lambda to change; write one into it, instead of a price")
    if table["lambda"] == lam:
        return text
    table["lambda"] = lam
    found = []
    number, rest = r"""lambda["']?[ \t]*=[ \t]*([+-]?\d[\w.+-]*)""", r"([^\r\n]*?)(?:[ \t]*# was [^\s#]+)?(\r?\n|$)"
    for at in re.finditer(f"{number}(?={rest})", text):
        changed = f"{text[: at.start(1)]}{lam:g}{at[2]}  # was {at[1]}{text[at.start(3) :]}"
        with suppress(ValueError):
            found += [changed] if tomllib.loads(changed.removeprefix("\ufeff")) == wanted else []
    if len(found) != 1:
        raise ValueError(f"dispose.{variant}.lambda is not on a line of its own there; write {lam:g} by hand")
    return found[0]
