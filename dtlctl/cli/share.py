"""Commands that tell of finished runs: report, export."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dtlctl.cli.options import RUNS, Json, Out, Overrides, Quiet, RecipeFile, say, words


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs that differ in the seed only.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the report; default: RUN/report.")] = None,
    as_json: Json = False,
) -> None:
    """Tables and plots from the sidecars of one run, or means and intervals over several seeds."""
    from dtlctl.errors import RecipeError
    from dtlctl.report import files, summary, tables

    if to is None and len(runs) > 1:
        raise RecipeError("report: with several runs say where the report goes: --to DIR")
    table = summary.summarise(runs)
    for run, seed in zip(runs, seeds := table["seeds"], strict=True):
        if seeds.count(seed) > 1:
            raise RecipeError(f"report: {run} is not the only run of seed {seed}; intervals are over different seeds")
    command = shlex.join(["dtlctl", "report", *map(str, runs), *(["--to", str(to)] if to else [])])
    files.write(table, to or runs[0] / "report", command, runs)
    print(files.dump(table) if as_json else tables.markdown(table), end="")


def export(
    recipe: RecipeFile,
    model: Annotated[str, typer.Option("--model", help="TL, TGT or a variant.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The safetensors file to write.")],
    overrides: Overrides = None,
    out: Out = RUNS,
    quiet: Quiet = False,
) -> None:
    """Write a finished model for others: its target head alone, under torchvision's names, nothing of the source."""
    from dtlctl.many.sweep import one_process
    from dtlctl.recipe.loading import load
    from dtlctl.report import summary, verdict
    from dtlctl.run import export as exports
    from dtlctl.run.experiment import Experiment

    one_process("export: start it as one process, without a launcher")
    experiment = Experiment(load(recipe, overrides), out, source=str(recipe), words=words(overrides, out), quiet=quiet)
    if experiment.recipe.publish:
        verdict.demand(summary.summarise([experiment.folder]), model, experiment.recipe.publish, str(recipe))
    exports.export(experiment, model, to)
    if model == "TL":
        say("TL has not been disposed of: it holds all that it learned from the source", quiet)
    print(to)
