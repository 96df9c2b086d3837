"""Commands that do what a recipe asks for: run, the five stages, check."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtlctl.cli.options import RUNS, Force, Json, Only, Out, Overrides, Quiet, RecipeFile, is_main, say, words
from dtlctl.console import stop
from dtlctl.errors import PeerLost, Stopped

if TYPE_CHECKING:
    from dtlctl.recipe.plan import Stage
    from dtlctl.run.experiment import Experiment


STAGES: dict[Stage, str] = {
    "pretrain": "Train a new network on the source data. Prints the sidecar's path.",
    "finetune": "Adapt the pre-trained network to the target (TL), and train TGT from scratch.",
    "dispose": "Dispose of the source knowledge in TL, once for every dispose.NAME table of the recipe.",
    "piggyback": "Attack: fine-tune every model on every piggyback dataset and measure accuracy.",
    "audit": "Attack: infer which source images were in the training set.",
}


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do everything the recipe asks for, in order, and print the table and the verdict. Skips what is up to date."""
    from dtlctl.recipe.plan import STAGES

    with _performed(STAGES, recipe, overrides, out, None, force, quiet) as experiment:
        if not is_main():
            return
        from dtlctl.report import files, summary, tables, verdict

        folder = experiment.folder / "report"
        table = summary.summarise([experiment.folder])
        if not files.is_current(table, folder):
            files.write(
                table, folder, shlex.join(["dtlctl", "run", str(recipe), *experiment.words]), [experiment.folder]
            )
    print(files.dump(table) if as_json else tables.markdown(table), end="")
    say(f"report: {folder}", quiet)
    verdict.demand(table, table["verdict"]["recommended"], experiment.recipe.publish, str(recipe))


def stage(name: Stage) -> Callable[..., None]:
    """The command that does one stage and prints the paths of its sidecars."""

    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        out: Out = RUNS,
        only: Only = None,
        force: Force = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        with _performed((name,), recipe, overrides, out, only, force, quiet) as experiment:
            if not is_main():
                return
            paths = [str(experiment.folder / job.path) for job in experiment.chosen((name,), only or ())]
            print(json.dumps([json.loads(Path(p).read_text()) for p in paths]) if as_json else "\n".join(paths))

    return command


def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    decode: Annotated[bool, typer.Option("--decode", help="Decode what a run would, to know all of it.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Validate the recipe and show its plan: stages, steps, data, what is cached. Nothing is trained or fetched."""
    from dtlctl.recipe.loading import load
    from dtlctl.stages import preview

    document = preview.plan(load(recipe, overrides), out, str(recipe), decode=decode, quiet=quiet or not decode)
    print(json.dumps(document, indent=1, ensure_ascii=False) if as_json else preview.text(document))


@contextmanager
def _performed(
    stages: tuple[Stage, ...],
    recipe: Path,
    overrides: list[str] | None,
    out: Path,
    only: list[str] | None,
    force: bool,
    quiet: bool,
) -> Iterator[Experiment]:
    """Do what is not up to date of some stages; inside, the run's folder still belongs to this process."""
    from dtlctl.recipe.loading import load
    from dtlctl.run.experiment import Experiment
    from dtlctl.stages import runner

    experiment = Experiment(load(recipe, overrides), out, source=str(recipe), words=words(overrides, out), quiet=quiet)
    try:
        experiment.chosen(stages, only or ())  # a name that is not there is told before the folder is touched
        with experiment.results.opened():
            done = runner.run(experiment, stages, only=only or (), force=force)
            if not done:
                say(f"everything is up to date in {experiment.folder}; nothing was done (--force redoes it)", quiet)
            yield experiment
    except RuntimeError as error:
        from dtlctl.training.failures import is_loss

        if not is_loss(error):
            raise
        raise Stopped(stop.pending()) if stop.pending() else PeerLost() from error
