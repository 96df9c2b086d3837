"""The command line: parse, dispatch, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtlctl import __version__
from dtlctl.cli.bench import bench
from dtlctl.cli.options import RUNS, Force, Json, Only, Out, Overrides, Quiet, RecipeFile
from dtlctl.console import stop
from dtlctl.errors import DtlError, Lost, Stopped

if TYPE_CHECKING:
    from dtlctl.recipe.plan import Stage
    from dtlctl.run.experiment import Experiment

HELP = """Disposable transfer learning: pre-train on private data, fine-tune on a small task, dispose of the rest.

One TOML recipe describes an experiment. `dtlctl run RECIPE` does all of it: pretrain, finetune, dispose, piggyback,
audit, report. Every stage is a command of its own, skips what is up to date, and runs unchanged on many processes:
torchrun --nproc_per_node N -m dtlctl run RECIPE.

Exit codes: 0 done; 1 memory ran out or a process is gone; 2 the recipe or the call is wrong; 3 training diverged; 4
data or checkpoint unusable; 130 or 143 stopped by a signal.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    os.environ["DTLCTL_DEBUG"] = "1" if debug else os.environ.get("DTLCTL_DEBUG", "")


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do everything the recipe asks for, in order, and print the table. What is up to date is skipped."""
    from dtlctl.recipe.plan import STAGES

    with _performed(STAGES, recipe, overrides, out, None, force, quiet) as lab:
        if not _is_main():
            return
        from dtlctl.report import files, summary, tables

        folder = lab.folder / "report"
        table = summary.summarise([lab.folder])
        if not files.is_current(table, folder):
            files.write(table, folder, shlex.join(["dtlctl", "run", str(recipe), *lab.words]), [lab.folder])
    print(files.dump(table) if as_json else tables.markdown(table), end="")
    _say(f"report: {folder}", quiet)


def _stage_command(stage: Stage, summary: str) -> None:
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        out: Out = RUNS,
        only: Only = None,
        force: Force = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        with _performed((stage,), recipe, overrides, out, only, force, quiet) as lab:
            if not _is_main():
                return
            paths = [str(lab.folder / job.path) for job in lab.chosen((stage,), only or ())]
            print(json.dumps([json.loads(Path(p).read_text()) for p in paths]) if as_json else "\n".join(paths))

    app.command(stage, help=summary)(command)


_stage_command("pretrain", "Train a new network on the source data. Prints the sidecar's path.")
_stage_command("finetune", "Adapt the pre-trained network to the target (TL), and train TGT from scratch.")
_stage_command("dispose", "Dispose of the source knowledge in TL, once for every dispose.NAME table of the recipe.")
_stage_command("piggyback", "Attack: fine-tune every model on every piggyback dataset and measure accuracy.")
_stage_command("audit", "Attack: infer which source images were in the training set.")


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, out: Out = RUNS, as_json: Json = False) -> None:
    """Validate the recipe and show its plan: stages, steps, data, what is cached. Nothing is trained or fetched."""
    from dtlctl.recipe.loading import load
    from dtlctl.stages import preview

    document = preview.plan(load(recipe, overrides), out, str(recipe))
    print(json.dumps(document, indent=1, ensure_ascii=False) if as_json else preview.text(document))


@app.command()
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


@app.command()
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
    from dtlctl.run import export as exports
    from dtlctl.run.experiment import Experiment

    one_process("export: start it as one process, without a launcher")
    lab = Experiment(load(recipe, overrides), out, source=str(recipe), words=_words(overrides, out), quiet=quiet)
    exports.export(lab, model, to)
    if model == "TL":
        _say("TL has not been disposed of: it holds all that it learned from the source", quiet)
    print(to)


app.command()(bench)


@app.command()
def sweep(
    recipe: RecipeFile,
    over: Annotated[
        list[str], typer.Option("--over", metavar="KEY.PATH=A,B,C", help="Values to try; several make a grid.")
    ],
    overrides: Overrides = None,
    out: Out = RUNS,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Runs at a time, each a process.")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the recipe at every point of a grid, share what points have in common, and print one table."""
    from dtlctl.many import sweep as sweeps
    from dtlctl.report import grids

    done = sweeps.run(recipe, over, overrides or [], out, jobs=jobs, quiet=quiet)
    document = grids.summarise([(point.values, lab.folder) for point, lab in done])
    words = [*(word for text in over for word in ("--over", text)), *_words(overrides, out)]
    folder = done[0][1].folder.parent / "report"
    command = shlex.join(["dtlctl", "sweep", str(recipe), *words])
    grids.write(document, folder, command, recipe.stem, [lab.folder for _, lab in done])
    print(
        json.dumps(document, ensure_ascii=False) if as_json else grids.markdown(document), end="\n" if as_json else ""
    )
    _say(f"report: {folder}", quiet)


@app.command()
def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find for every unlearning loss the λ that costs the same target accuracy, and attack them all at it."""
    from dtlctl.many import compare as comparison

    command = shlex.join(["dtlctl", "compare", str(recipe), *_words(overrides, out)])
    document, folder = comparison.compare(recipe, overrides or [], out, command=command, quiet=quiet)
    print(json.dumps(document, ensure_ascii=False) + "\n" if as_json else comparison.markdown(document), end="")
    _say(f"report: {folder}", quiet)


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

    lab = Experiment(load(recipe, overrides), out, source=str(recipe), words=_words(overrides, out), quiet=quiet)
    try:
        with lab.opened(stages, only or ()):
            done = runner.run(lab, stages, only=only or (), force=force)
            if not done:
                _say(f"everything is up to date in {lab.folder}; nothing was done (--force redoes it)", quiet)
            yield lab
    except RuntimeError as error:
        from dtlctl.training.failures import is_loss

        if not is_loss(error):
            raise
        raise Stopped(stop.pending()) if stop.pending() else Lost() from error


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        from dtlctl.console.progress import say

        say(text)


def _words(overrides: list[str] | None, out: Path) -> list[str]:
    """What a command line that does the same again has after the recipe."""
    return [*(word for text in overrides or () for word in ("--set", text)), *(["--out", str(out)] * (out != RUNS))]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Run the command line; every foreseen failure becomes one or two lines on stderr and an exit code."""
    stop.listen()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a table with "?" for what the terminal lacks, such as "λ"
    try:
        app(prog_name="dtlctl")
    except DtlError as error:
        if os.environ.get("DTLCTL_DEBUG"):
            raise
        where = "" if _is_main() else f"[process {os.environ['RANK']}] "
        print(f"{where}error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        stop.finish()
