"""Arguments and options that several commands share, and what they all do with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The experiment, a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one key of the recipe, e.g. finetune.lr=0.02."),
]
Out = Annotated[Path, typer.Option("--out", help="Where runs are kept; the run's folder is OUT/<name>.")]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="MODEL", help="Only this model or variant; repeatable.")
]
Force = Annotated[bool, typer.Option("--force", help="Redo what is up to date.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RUNS = Path("runs")


def say(text: str, quiet: bool) -> None:
    """One line on stderr, unless the command is quiet."""
    if not quiet:
        from dtlctl.console import progress

        progress.say(text)


def words(overrides: list[str] | None, out: Path) -> list[str]:
    """What a command line that does the same again has after the recipe."""
    return [*(word for text in overrides or () for word in ("--set", text)), *(["--out", str(out)] * (out != RUNS))]


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
