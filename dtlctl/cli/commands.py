"""Commands that take a recipe, or what its runs have made; the options that they share."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtlctl.console.progress import say
from dtlctl.errors import RecipeError, suggest

if TYPE_CHECKING:
    from dtlctl.recipe.plan import Stage
    from dtlctl.run.experiment import Experiment

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
STAGES: dict[Stage, str] = {
    "pretrain": "Train a new network on the source data. Prints the sidecar's path.",
    "finetune": "Adapt the pre-trained network to the target (TL), and train TGT from scratch.",
    "dispose": "Dispose of the source knowledge in TL, once for every dispose.NAME table of the recipe.",
    "piggyback": "Attack: fine-tune every model on every piggyback dataset and measure accuracy.",
    "audit": "Attack: infer which source images were in the training set.",
}


def _words(overrides: list[str] | None, out: Path) -> list[str]:
    """What a command line that does the same again has behind the recipe."""
    return [*(word for text in overrides or () for word in ("--set", text)), *(["--out", str(out)] * (out != RUNS))]


def _experiment(recipe: Path, overrides: list[str] | None, out: Path, quiet: bool) -> Experiment:
    from dtlctl.recipe.loading import load
    from dtlctl.run.experiment import Experiment

    return Experiment(load(recipe, overrides), out, source=str(recipe), words=_words(overrides, out), quiet=quiet)


@contextmanager
def _performed(experiment: Experiment, stages: tuple[Stage, ...], only: list[str], force: bool) -> Iterator[None]:
    """Do what is not up to date of some stages; inside, the run's folder still belongs to this process."""
    from dtlctl.stages import runner

    experiment.chosen(stages, only)  # a name that is not there is told before the folder is touched
    with experiment.results.opened():
        if not runner.run(experiment, stages, only=only, force=force):
            done = f"everything is up to date in {experiment.folder}; nothing was done (--force redoes it)"
            say(done, experiment.quiet)
        yield


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do everything the recipe asks for, in order, and print the table and the verdict. Skips what is up to date."""
    experiment = _experiment(recipe, overrides, out, quiet)
    with _performed(experiment, tuple(STAGES), [], force):
        if not experiment.processes.is_main:
            return
        from dtlctl.report import files, summary, tables, verdict
        from dtlctl.storage import checkpoint

        folder = experiment.folder / "report"
        table = summary.summarise([experiment.folder])
        if not files.is_current(table, folder):
            files.write(table, folder, experiment.command("run"), [experiment.folder])
    print(checkpoint.dump(table) if as_json else tables.markdown(table), end="")
    say(f"report: {folder}", quiet)
    verdict.demand(table, table["verdict"]["recommended"], experiment.recipe.publish, str(recipe))


def stage(name: Stage) -> Callable[..., None]:
    """The command that does one stage and prints the paths of its sidecars."""

    def command(
        recipe: RecipeFile, overrides: Overrides = None, out: Out = RUNS, only: Only = None, force: Force = False,
        quiet: Quiet = False, as_json: Json = False,
    ) -> None:  # fmt: skip
        experiment = _experiment(recipe, overrides, out, quiet)
        with _performed(experiment, (name,), only or [], force):
            if not experiment.processes.is_main:
                return
            paths = [experiment.folder / job.path for job in experiment.chosen((name,), only or ())]
            documents = [json.loads(path.read_bytes()) for path in paths if as_json]
        print(json.dumps(documents) + "\n" if as_json else "".join(f"{path}\n" for path in paths), end="")

    return command


def check(
    recipe: RecipeFile, overrides: Overrides = None, out: Out = RUNS,
    decode: Annotated[bool, typer.Option("--decode", help="Decode what a run would, to know all of it.")] = False,
    tested: Annotated[str | None, typer.Option(
        metavar="ROLE", help="List the test images of source, target, ... instead.")] = None,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Validate the recipe and show its plan: stages, steps, data, what is cached.

    Nothing is trained, nor fetched without --decode or --tested.
    """
    from dtlctl.recipe.loading import load
    from dtlctl.stages import preview

    if tested:
        data = _experiment(recipe, overrides, out, quiet).data
        if tested not in (known := data.recipe.data.roles):
            raise RecipeError(f"--tested {tested}: {recipe} has no such data{suggest(tested, known)}")
        print(json.dumps(data.tested(tested), ensure_ascii=False) if as_json else "\n".join(data.tested(tested)))
        return
    document = preview.plan(load(recipe, overrides), out, str(recipe), decode=decode, quiet=quiet or not decode)
    print(json.dumps(document, indent=1, ensure_ascii=False) if as_json else preview.text(document))


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs that differ in the seed only.")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the report; default: RUN/report.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tables and plots from the sidecars of one run, or means and intervals over several seeds."""
    from dtlctl.many.sweep import one_process
    from dtlctl.report import files, summary, tables
    from dtlctl.storage import checkpoint

    one_process("report: start it as one process, without a launcher")
    say("report: reading the sidecars, and drawing", quiet)
    if to is None and len(runs) > 1:
        raise RecipeError("report: with several runs say where the report goes: --to DIR")
    table = summary.summarise(runs)
    for run, seed in zip(runs, seeds := table["seeds"], strict=True):
        if seeds.count(seed) > 1:
            raise RecipeError(f"report: {run} is not the only run of seed {seed}; intervals are over different seeds")
    command = shlex.join(["dtlctl", "report", *map(str, runs), *(["--to", str(to)] if to else [])])
    files.write(table, to or runs[0] / "report", command, runs)
    print(checkpoint.dump(table) if as_json else tables.markdown(table), end="")


def export(
    recipe: RecipeFile,
    to: Annotated[str, typer.Option(
        "--to", metavar="PLACE",
        help="A folder, new or of an earlier export, a .safetensors file, or hf:owner/name, on the hub.")],
    model: Annotated[str | None, typer.Option(
        "--model", help="TL, TGT or a variant; of a folder the default is the verdict's.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="The network as model.onnx too, in a folder.")] = False,
    overrides: Overrides = None, out: Out = RUNS, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write a finished model for others, without anything of the source: weights, config and a card with the evidence.

    Its target head alone, under torchvision's names of tensors. A .safetensors file has the weights and no card.
    """
    from dtlctl.many.sweep import one_process
    from dtlctl.report import card, verdict
    from dtlctl.run import export as exports

    one_process("export: start it as one process, without a launcher")
    experiment = _experiment(recipe, overrides, out, quiet)
    say(f"export: reading what {experiment.folder} has as evidence, and packing the model", quiet)
    place, hub, limits, chosen = to, to.startswith("hf:"), experiment.recipe.publish, model
    if not hub:
        exports.refuse(experiment, Path(to))
    replaces = not hub and os.path.exists(to)
    if not hub and to.endswith(exports.SUFFIX):
        if onnx:
            raise RecipeError(f"--onnx: the network stands beside its weights in a folder; --to {to} is a file")
        model = card.known(experiment, model)
        if limits:
            verdict.demand(card.evidence(experiment), model, limits, str(recipe))
        exports.export(experiment, model, Path(to))
    else:
        document = card.evidence(experiment)
        model = card.known(experiment, model, document)
        verdict.demand(document, model, limits, str(recipe))
        files = card.folder(experiment, model, document, onnx)
        place = exports.push(files, to.removeprefix("hf:")) if hub else exports.publish(files, Path(to))
        if model != "TGT" and not document["evidence"][model]["attacks"]:
            say(f"{model} was never attacked: nothing is known of what it gives away", quiet)
    if replaces:
        say(f"export: it replaces an earlier one in {to}", quiet)
    if model == "TL":
        say("TL has not been disposed of: it holds all that it learned from the source", quiet)
    elif not chosen:
        say(f"export: {model}, which the verdict recommends", quiet)
    print(json.dumps({"model": model, "to": place}, ensure_ascii=False) if as_json else place)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What dtlctl export wrote.")],
    recipe: Annotated[Path | None, typer.Argument(
        metavar="RECIPE", help="On its test split Acc_t is measured again.")] = None,
    overrides: Overrides = None, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Compare an exported folder with its card: the hashes of its files and, with a recipe, Acc_t."""
    from dtlctl.many.sweep import one_process
    from dtlctl.report import card

    one_process("verify: start it as one process, without a launcher")
    say(f"verify: reading {folder}" + ", and measuring Acc_t" * bool(recipe), quiet)
    found = card.verify(folder, _experiment(recipe, overrides, RUNS, quiet) if recipe else None)
    shown = {name: f"{value:.9g}" if isinstance(value, float) else value for name, value in found.items()}
    print(json.dumps(found) if as_json else "\n".join(f"{name} {value}" for name, value in shown.items()))
    measured = ", and Acc_t, but for rounding, is what was measured here" if recipe else ""
    say(f"{folder}: weights and config are those of the card's header{measured}; its text is not checked", quiet)


def sweep(
    recipe: RecipeFile,
    over: Annotated[list[str], typer.Option(
        "--over", metavar="KEY.PATH=A,B,C", help="Values to try; several make a grid.")],
    overrides: Overrides = None, out: Out = RUNS,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Runs at a time, each a process.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print a shell line for every run instead.")] = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Run the recipe at every point of a grid, share what points have in common, and print one table."""
    from dtlctl.many import sweep as sweeps
    from dtlctl.report import grids

    if plan:
        first, lines = sweeps.plan(recipe, over, overrides or [], out)
        order = f"{len(first)} lines first, one after the other; then {len(lines)} in any order; then this sweep again"
        say(order, quiet)
        print("\n".join([*first, *lines]))
        return
    done = sweeps.run(recipe, over, overrides or [], out, jobs=jobs, quiet=quiet)
    document = grids.summarise([(point.values, experiment.folder) for point, experiment in done])
    axes = [word for text in over for word in ("--over", text)]
    folder = done[0][1].folder.parent / "report"
    command = shlex.join(["dtlctl", "sweep", str(recipe), *axes, *_words(overrides, out)])
    grids.write(document, folder, command, recipe.stem, [experiment.folder for _, experiment in done])
    print(json.dumps(document, ensure_ascii=False) + "\n" if as_json else grids.markdown(document), end="")
    say(f"report: {folder}", quiet)


def compare(
    recipe: RecipeFile, overrides: Overrides = None, out: Out = RUNS,
    write: Annotated[bool, typer.Option(
        "--write", help="Write every λ that was reached into the recipe's file.")] = False,
    quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Find for every unlearning loss the λ that costs the same target accuracy, and attack them all at it."""
    from dtlctl.many import compare as comparison
    from dtlctl.recipe.loading import load
    from dtlctl.recipe.overrides import write_lambdas

    base = load(recipe, overrides)
    if write:  # hours before it is needed
        unlearning = [name for name, one in base.dispose.items() if one.unlearn.kind != "none"]
        write_lambdas(recipe, dict.fromkeys(unlearning, 0.12345), dry=True)
    command = shlex.join(["dtlctl", "compare", str(recipe), *_words(overrides, out)])
    document, folder = comparison.compare(recipe, overrides or [], out, command=command, quiet=quiet)
    print(json.dumps(document, ensure_ascii=False) + "\n" if as_json else comparison.markdown(document), end="")
    if write:
        reached = {name: one["lambda"] for name, one in document["variants"].items() if one["reached"] == "yes"}
        write_lambdas(recipe, reached)
        values = ", ".join(f"dispose.{name}.lambda = {lam:g}" for name, lam in reached.items())
        say(f"written into {recipe}: {values or 'nothing, as no λ was reached'}", quiet)
    for text in comparison.advice(document, recipe, overrides or [], folder.parent, written=write):
        say(text, quiet)
    say(f"report: {folder}", quiet)
