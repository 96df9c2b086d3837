"""Commands that tell of finished runs and what comes of them: report, export, verify."""

from __future__ import annotations

import json
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
    to: Annotated[
        str,
        typer.Option("--to", metavar="PLACE", help="A new folder, a .safetensors file, or hf:owner/name, on the hub."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="TL, TGT or a variant; of a folder the default is the verdict's.")
    ] = None,
    overrides: Overrides = None,
    out: Out = RUNS,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a finished model for others, without anything of the source: weights, config and a card with the evidence.

    Its target head alone, under torchvision's names of tensors. A .safetensors file has the weights and no card.
    """
    from dtlctl.many.sweep import one_process
    from dtlctl.recipe.loading import load
    from dtlctl.report import card, verdict
    from dtlctl.run import export as exports
    from dtlctl.run.experiment import Experiment

    one_process("export: start it as one process, without a launcher")
    experiment = Experiment(load(recipe, overrides), out, source=str(recipe), words=words(overrides, out), quiet=quiet)
    hub, limits = to.startswith("hf:"), experiment.recipe.publish
    place = to
    if not hub:
        exports.refuse(experiment, Path(to))
    if not hub and to.endswith(exports.SUFFIX):
        model = card.known(experiment, model)
        if limits:
            verdict.demand(card.evidence(experiment), model, limits, str(recipe))
        exports.export(experiment, model, Path(to))
    else:
        document = card.evidence(experiment)
        model = card.known(experiment, model, document)
        verdict.demand(document, model, limits, str(recipe))
        files = card.folder(experiment, model, document)
        place = exports.push(files, to.removeprefix("hf:")) if hub else exports.publish(files, Path(to))
        if not document["evidence"][model]["attacks"]:
            say(f"{model} was never attacked: nothing is known of what it gives away", quiet)
    if model == "TL":
        say("TL has not been disposed of: it holds all that it learned from the source", quiet)
    print(json.dumps({"model": model, "to": place}, ensure_ascii=False) if as_json else place)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What dtlctl export wrote.")],
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="On its test split Acc_t is measured again.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compare an exported folder with its card: the hashes of its files and, with a recipe, Acc_t."""
    from dtlctl.many.sweep import one_process
    from dtlctl.recipe.loading import load
    from dtlctl.report import card
    from dtlctl.run.experiment import Experiment

    one_process("verify: start it as one process, without a launcher")
    experiment = Experiment(load(recipe, overrides), RUNS, source=str(recipe), quiet=True) if recipe else None
    found = card.verify(folder, experiment)
    print(json.dumps(found) if as_json else "\n".join(f"{name} {value}" for name, value in found.items()))
