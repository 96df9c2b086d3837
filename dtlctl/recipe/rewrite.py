"""Changing one number in a recipe's file, and nothing else of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from dtlctl.errors import RecipeError
from dtlctl.recipe.overrides import tomllib
from dtlctl.storage import checkpoint


def write_lambdas(path: Path, lambdas: Mapping[str, float], *, dry: bool = False) -> None:
    """Set λ of these variants in the file; a comment on the line keeps what it was. dry: only see whether that goes.

    Raises RecipeError, the file untouched, where a λ is not one number in the file, and CheckpointError where the file
    cannot be written.
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

    It is the one whose change makes the file say just what it should: so it may stand in a table, in an inline one or
    behind a dotted key, and what only looks like it, in a comment or in a text, is left alone.
    """
    wanted = tomllib.loads(text.removeprefix("\ufeff"))
    table = wanted.get("dispose", {}).get(variant, {})
    if "lambda" not in table:
        raise ValueError(
            f"[dispose.{variant}] has no lambda to change; write lambda = {lam:g} into it, instead of a price"
        )
    if table["lambda"] == lam:
        return text
    table["lambda"] = lam
    found = []
    for at in re.finditer(r"""lambda["']?[ \t]*=[ \t]*([+-]?\d[\w.+-]*)""", text):
        line = re.match(r"([^\r\n]*?)(?:[ \t]*# was [^\s#]+)?(\r?\n|$)", text[at.end(1) :])
        assert line is not None
        comment = f"{line[1]}  # was {at[1]}{line[2]}"
        changed = f"{text[: at.start(1)]}{lam:g}{comment}{text[at.end(1) + line.end() :]}"
        try:
            found += [changed] if tomllib.loads(changed.removeprefix("\ufeff")) == wanted else []
        except ValueError:
            continue
    if len(found) != 1:
        raise ValueError(f"dispose.{variant}.lambda is not on a line of its own there; write {lam:g} by hand")
    return found[0]
