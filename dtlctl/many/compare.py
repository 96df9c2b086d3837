"""`dtlctl compare`: every unlearning loss at the λ that costs the same target accuracy.

The paper adjusts λ so that "the differently unlearned models are compared with similar target accuracy" (section 4.2).
Here λ is searched with real disposals, from the recipe's own outwards. The target accuracy that steers it is that of
images that nothing is trained or tested on: the part of the target's train split that the recipe's `fraction` leaves
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from dtlctl.console.progress import say
from dtlctl.errors import DivergedError, RecipeError
from dtlctl.many.sweep import one_process, perform
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import Stage
from dtlctl.recipe.schema import Compare, Dispose, Recipe
from dtlctl.report import files, summary, tables
from dtlctl.run.earlier import relatives
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.storage import checkpoint

LOW, HIGH = 0.0005, 0.9995
"""λ is looked for between these."""


def compare(
    path: Path, overrides: Sequence[str], out: Path, *, command: str, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """The document of the comparison, and the folder of its report. Runs are kept below OUT/<name>-compare.

    {"compare": settings, "variants": {name: {"lambda", "drop", "reached", "tried": [{"lambda", "drop", "drops"}]}},
    "table": ...}: drops in points of validation accuracy below TL, means over seeds, with each seed's in "drops"; null
    where a disposal diverged. Raises RecipeError for a recipe with nothing to compare, or without target images to
    validate on, and DivergedError where every λ of a variant diverged.
    """
    one_process("compare: start it as one process, without a launcher")
    base = load(path, list(overrides))
    variants = _comparable(Experiment(base, out, source=str(path), quiet=quiet))
    settings = base.compare or Compare()
    seeds = settings.seeds or [base.seed]
    folder = out / f"{base.name}-compare"

    def made(name: str, dispose: dict[str, Dispose], *stages: Stage) -> list[Experiment]:
        changes = [{"seed": seed, "name": f"{name}-{seed}", "dispose": dispose} for seed in seeds]
        experiments = [Experiment(_changed(base, change), folder, source=str(path), quiet=quiet) for change in changes]
        perform(experiments, ("pretrain", "finetune", *stages), relatives(out, base.name))
        return experiments

    tl = [validation(experiment, "TL") for experiment in made("search", {})]
    document: dict[str, Any] = {"compare": settings.model_dump(mode="json"), "seeds": seeds, "variants": {}}
    matched = dict(base.dispose)
    for variant in variants:

        def drops(lam: float, variant: str = variant) -> list[float]:
            name = f"{variant}-{lam:.4g}"
            try:
                experiments = made("search", {name: base.dispose[variant].model_copy(update={"lam": lam})}, "dispose")
            except DivergedError as error:
                raise DivergedError(f"dispose.{name}: {error}") from None
            lost = [before - validation(experiment, name) for before, experiment in zip(tl, experiments, strict=True)]
            if not quiet:
                say(f"{name}: {', '.join(f'{points:.1f}' for points in lost)} points below TL, by seed")
            return lost

        found = search(drops, base.dispose[variant].lam, settings)
        document["variants"][variant] = found
        matched[variant] = base.dispose[variant].model_copy(update={"lam": found["lambda"]})
        if not quiet:
            say(f"{variant}: λ = {found['lambda']:g}, {found['drop']:.1f} points below TL")
    final = made("matched", matched, "dispose", "piggyback")
    document["table"] = summary.summarise([experiment.folder for experiment in final])
    write(document, folder / "report", command)
    return document, folder / "report"


def _comparable(experiment: Experiment) -> list[str]:
    """The variants whose λ is to be found. Raises RecipeError where there are none, or nothing to validate on.

    And what `data_demands.check` raises: all of it before anything trains.
    """
    variants = [name for name, one in experiment.recipe.dispose.items() if one.unlearn.kind != "none"]
    if not variants:
        raise RecipeError(f"{experiment.source}: compare needs a [dispose.NAME] table with an unlearning loss")
    fraction = experiment.recipe.data.target.fraction
    if fraction == 1 or not len(held_back(experiment)):
        raise RecipeError(
            f"{experiment.source}: data.target.fraction = {fraction:g} leaves no target images to validate λ on; "
            "lower it"
        )
    data_demands.check(experiment, experiment.jobs)
    return variants


def search(drops: Callable[[float], list[float]], first: float, settings: Compare) -> dict[str, Any]:
    """The λ whose mean drop is `settings.target_drop`, looked for as `following` says.

    It takes for granted that more unlearning costs more; where it does not, or where no λ is near enough, the best of
    those tried is returned with `reached` false. A λ at which `drops` raises DivergedError is too dear. Every one tried
    is kept, a diverged one without a drop. Raises DivergedError where all of them diverged.
    """

    def over(one: dict[str, Any]) -> float:
        return math.inf if one["drop"] is None else one["drop"] - settings.target_drop

    tried: list[dict[str, Any]] = []
    lam = rounded(first)
    while len(tried) < settings.rounds and lam not in [one["lambda"] for one in tried]:  # again: the range has ended
        try:
            found = drops(lam)
            tried.append({"lambda": lam, "drop": mean(found), "drops": found})
        except DivergedError as error:
            failure = error
            tried.append({"lambda": lam, "drop": None, "drops": None})
        if abs(over(tried[-1])) <= settings.tolerance:
            break
        lam = rounded(following([(one["lambda"], one["drop"]) for one in tried], settings.target_drop))
    best = min(tried, key=lambda one: abs(over(one)))
    if best["drop"] is None:
        values = ", ".join(f"{one['lambda']:g}" for one in tried)
        raise DivergedError(f"compare: every λ that was tried diverged ({values}); the last: {failure}")
    reached = abs(over(best)) <= settings.tolerance
    return {"lambda": best["lambda"], "drop": best["drop"], "reached": reached, "tried": tried}


def following(tried: Sequence[tuple[float, float | None]], price: float) -> float:
    """The λ to try after these pairs of λ and drop (None: diverged, so too dear), of which none costs the price.

    In log-odds, half-way between the dearest that is too cheap and the cheapest that is too dear. While all are on one
    side, a step away from the outermost: of at most 1, then 2, 4, ...: the recipe's own λ is a guess, so what is near
    it comes first. A step is shorter where the drop is near the price: as long as if the drop went with the odds.
    (Those of RAND and null-space go with the odds or steeper: docs/results/disposal.md, "along λ".)
    """
    cheap = [(logit(lam), drop) for lam, drop in tried if drop is not None and drop < price]
    dear = [(logit(lam), drop) for lam, drop in tried if drop is None or drop > price]
    if cheap and dear:
        middle = (max(cheap)[0] + min(dear)[0]) / 2
    else:
        outermost, drop = max(cheap) if cheap else min(dear)
        step = 2.0 ** (len(tried) - 1) * (min(1, abs(math.log(drop / price))) if drop and drop > 0 else 1)
        middle = outermost + step if cheap else outermost - step
    return 1 / (1 + math.exp(-middle))


def rounded(lam: float) -> float:
    """λ with the digits that its run is named by, within the range of the search."""
    return float(f"{min(max(lam, LOW), HIGH):.4g}")


def logit(lam: float) -> float:
    """The log-odds of λ, in which steps are even: what matters is the ratio of the two terms."""
    return math.log(lam / (1 - lam))


def validation(experiment: Experiment, model: str) -> float:
    """Target accuracy in % on the images of the train split that nothing was trained on."""
    return experiment.engine.accuracy(
        experiment.trainer.load_model(model),
        "target",
        experiment.trainer.split("target", "train", held_back(experiment)),
    )


def held_back(experiment: Experiment) -> np.ndarray:
    """Sorted int64 rows of the target's train split that are not in the run's subset of it; possibly none."""
    return np.setdiff1d(
        np.arange(len(experiment.data.images("target", "train").labels)), experiment.data.index("target")
    )


def markdown(document: dict[str, Any]) -> str:
    """Who needed which λ, then the report of the matched runs."""
    return tables.markdown(document["table"], before=[_needed(document)])


def _needed(document: dict[str, Any]) -> tables.Table:
    """One row a variant."""
    settings = document["compare"]
    lines = [
        [name, f"{one['lambda']:g}", f"{one['drop']:.1f}", "yes" if one["reached"] else "no", _tried(one["tried"])]
        for name, one in document["variants"].items()
    ]
    wanted = f"{settings['target_drop']:g} ± {settings['tolerance']:g}"
    note = f"Who needed which λ to be {wanted} points of Acc_t below TL, on target images held back for validation."
    return tables.Table(note, ["Variant", "λ", "points below TL", "reached", "values tried"], lines, "Which λ")


def _tried(tried: list[dict[str, Any]]) -> str:
    """How many values of λ were tried, and how many of them diverged, if any."""
    diverged = sum(one["drop"] is None for one in tried)
    return f"{len(tried)}, {diverged} diverged" if diverged else str(len(tried))


def write(document: dict[str, Any], folder: Path, command: str) -> None:
    """Write compare.json, table.json, table.md, figures and report.html. Raises CheckpointError where it cannot."""
    checkpoint.write(folder / "compare.json", files.dump(document).encode())  # first: it cannot be made from the runs
    files.write(document["table"], folder, command, before=[_needed(document)])


def _changed(base: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other tables, validated like a file; whom to attack then follows from the variants."""
    piggyback = base.piggyback
    if piggyback.models:
        known = {"scratch", "TGT", "pre", "TL", *changes["dispose"]}
        piggyback = piggyback.model_copy(update={"models": [m for m in piggyback.models if m in known] or None})
    return base.model_copy(
        update={**changes, "piggyback": piggyback, "audit": base.audit.model_copy(update={"models": None})}
    )
