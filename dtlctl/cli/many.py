"""Commands that do many runs of one recipe: sweep, compare."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from dtlctl.cli.options import RUNS, Json, Out, Overrides, Quiet, RecipeFile, say, words


def sweep(
    recipe: RecipeFile,
    over: Annotated[
        list[str], typer.Option("--over", metavar="KEY.PATH=A,B,C", help="Values to try; several make a grid.")
    ],
    overrides: Overrides = None,
    out: Out = RUNS,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Runs at a time, each a process.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print a shell line for every run instead.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the recipe at every point of a grid, share what points have in common, and print one table."""
    from dtlctl.many import sweep as sweeps
    from dtlctl.report import grids

    if plan:
        first, lines = sweeps.plan(recipe, over, overrides or [], out)
        say(
            f"{len(first)} lines first, one after the other; then {len(lines)} in any order; then this sweep again",
            quiet,
        )
        print("\n".join([*first, *lines]))
        return
    done = sweeps.run(recipe, over, overrides or [], out, jobs=jobs, quiet=quiet)
    document = grids.summarise([(point.values, experiment.folder) for point, experiment in done])
    axes = [word for text in over for word in ("--over", text)]
    folder = done[0][1].folder.parent / "report"
    command = shlex.join(["dtlctl", "sweep", str(recipe), *axes, *words(overrides, out)])
    grids.write(document, folder, command, recipe.stem, [experiment.folder for _, experiment in done])
    print(
        json.dumps(document, ensure_ascii=False) if as_json else grids.markdown(document), end="\n" if as_json else ""
    )
    say(f"report: {folder}", quiet)


def compare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Out = RUNS,
    write: Annotated[
        bool, typer.Option("--write", help="Write every λ that was reached into the recipe's file.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find for every unlearning loss the λ that costs the same target accuracy, and attack them all at it."""
    from dtlctl.many import compare as comparison
    from dtlctl.recipe.loading import load
    from dtlctl.recipe.rewrite import write_lambdas

    base = load(recipe, overrides)
    if write:  # hours before it is needed
        unlearning = [name for name, one in base.dispose.items() if one.unlearn.kind != "none"]
        write_lambdas(recipe, dict.fromkeys(unlearning, 0.12345), dry=True)
    command = shlex.join(["dtlctl", "compare", str(recipe), *words(overrides, out)])
    document, folder = comparison.compare(recipe, overrides or [], out, command=command, quiet=quiet)
    print(json.dumps(document, ensure_ascii=False) + "\n" if as_json else comparison.markdown(document), end="")
    if write:
        reached = {name: one["lambda"] for name, one in document["variants"].items() if one["reached"] == "yes"}
        write_lambdas(recipe, reached)
        values = ", ".join(f"dispose.{name}.lambda = {lam:g}" for name, lam in reached.items())
        say(f"written into {recipe}: {values or 'nothing, as no λ was reached'}", quiet)
    again = shlex.join(["dtlctl", "run", str(recipe), *words(overrides, out)])
    for text in comparison.advice(document, base.name, again, written=write):
        say(text, quiet)
    say(f"report: {folder}", quiet)
