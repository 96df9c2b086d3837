"""Commands that help to write a recipe: init, schema."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Annotated

import typer

from dtlctl.errors import RecipeError, suggest


def shipped() -> dict[str, str]:
    """The recipes that come with the package, by name."""
    package = importlib.resources.files("dtlctl")
    folder = package / "recipes"
    if not folder.is_dir():  # a checkout: they lie beside the package, and move into it when that is built
        folder = Path(str(package)).parent / "recipes"
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    return {f.name.removesuffix(".toml"): f.read_text("utf-8") for f in files if f.name.endswith(".toml")}


def init(
    recipe: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A shipped recipe, to print.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
) -> None:
    """Print a recipe to begin with: one that comes with dtlctl."""
    if listed == (recipe is not None):
        raise RecipeError("init: give --list, or NAME of a shipped recipe")
    known = shipped()
    if recipe is not None and recipe not in known:
        raise RecipeError(f"init: no shipped recipe {recipe!r}{suggest(recipe, known)}")
    if recipe:
        print(known[recipe], end="")
        return
    for name, text in known.items():
        print(f"{name:<18}{text.partition(chr(10))[0].lstrip('# ')}")


def schema() -> None:
    """Print the JSON schema of a recipe, for an editor that completes and explains keys."""
    from dtlctl.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
