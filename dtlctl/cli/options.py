"""Arguments and options that several commands share."""

from __future__ import annotations

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
