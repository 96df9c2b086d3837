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

from dtlctl import checkpoint, demands, report
from dtlctl.errors import RecipeError
from dtlctl.experiment import Experiment
from dtlctl.loading import load
from dtlctl.plan import Stage
from dtlctl.progress import say
from dtlctl.recipe import Compare, Dispose, Recipe
from dtlctl.sweep import perform, relatives

LOW, HIGH = 0.0005, 0.9995
"""λ is looked for between these."""


def compare(
    path: Path, overrides: Sequence[str], out: Path, *, command: str, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """The document of the comparison, and the folder of its report. Runs are kept below OUT/<name>-compare.

    {"compare": settings, "variants": {name: {"lambda", "drop", "reached", "tried": [{"lambda", "drop", "drops"}]}},
    "table": ...}: drops in points of validation accuracy below TL, means over seeds, with each seed's in "drops".
    Raises RecipeError for a recipe with nothing to compare, or without target images to validate on.
    """
    base = load(path, list(overrides))
    variants = _comparable(path, base)
    lab = Experiment(base, out, source=str(path), quiet=quiet)
    demands.of_data(lab, lab.jobs)
    settings = base.compare or Compare()
    seeds = settings.seeds or [base.seed]
    folder = out / f"{base.name}-compare"

    def made(name: str, dispose: dict[str, Dispose], *stages: Stage) -> list[Experiment]:
        changes = [{"seed": seed, "name": f"{name}-{seed}", "dispose": dispose} for seed in seeds]
        labs = [Experiment(_changed(base, change), folder, source=str(path), quiet=quiet) for change in changes]
        perform(labs, ("pretrain", "finetune", *stages), relatives(out, base.name))
        return labs

    tl = [validation(lab, "TL") for lab in made("search", {})]
    document: dict[str, Any] = {"compare": settings.model_dump(mode="json"), "seeds": seeds, "variants": {}}
    matched = dict(base.dispose)
    for variant in variants:

        def drops(lam: float, variant: str = variant) -> list[float]:
            name = f"{variant}-{lam:.4g}"
            labs = made("search", {name: base.dispose[variant].model_copy(update={"lam": lam})}, "dispose")
            return [before - validation(lab, name) for before, lab in zip(tl, labs, strict=True)]

        found = search(drops, base.dispose[variant].lam, settings)
        document["variants"][variant] = found
        matched[variant] = base.dispose[variant].model_copy(update={"lam": found["lambda"]})
        if not quiet:
            say(f"{variant}: λ = {found['lambda']:g}, {found['drop']:.1f} points below TL")
    final = made("matched", matched, "dispose", "piggyback")
    document["table"] = report.summarise([lab.folder for lab in final])
    write(document, folder / "report", command)
    return document, folder / "report"


def _comparable(path: Path, base: Recipe) -> list[str]:
    """The variants whose λ is to be found. Raises RecipeError where there are none, or nothing to validate on."""
    variants = [name for name, one in base.dispose.items() if one.unlearn.kind != "none"]
    if not variants:
        raise RecipeError(f"{path}: compare needs a [dispose.NAME] table with an unlearning loss")
    if base.data.target.fraction == 1:
        raise RecipeError(
            f"{path}: data.target.fraction = 1 leaves no target images to validate λ on; compare needs it below 1"
        )
    return variants


def search(drops: Callable[[float], list[float]], first: float, settings: Compare) -> dict[str, Any]:
    """The λ whose mean drop is `settings.target_drop`: steps away from the first until that is passed, then halves.

    It takes for granted that more unlearning costs more; where it does not, or where no λ is near enough, the best of
    those tried is returned with `reached` false. Every one tried is kept.
    """
    cheap: list[float] = []
    dear: list[float] = []
    tried: list[dict[str, Any]] = []
    lam = rounded(first)
    while len(tried) < settings.rounds and lam not in [one["lambda"] for one in tried]:  # again: the range has ended
        found = drops(lam)
        tried.append({"lambda": lam, "drop": mean(found), "drops": found})
        if abs(tried[-1]["drop"] - settings.target_drop) <= settings.tolerance:
            break
        (cheap if tried[-1]["drop"] < settings.target_drop else dear).append(logit(lam))
        lam = rounded(following(cheap, dear))
    best = min(tried, key=lambda one: abs(one["drop"] - settings.target_drop))
    reached = abs(best["drop"] - settings.target_drop) <= settings.tolerance
    return {"lambda": best["lambda"], "drop": best["drop"], "reached": reached, "tried": tried}


def following(cheap: Sequence[float], dear: Sequence[float]) -> float:
    """The λ to try after these log-odds, which cost too little or too much.

    Half-way between the dearest that is too cheap and the cheapest that is too dear. While all are on one side of the
    price: 1 away from the outermost, then 2, 4, ...: the recipe's own λ is a guess, so what is near it comes first.
    """
    if cheap and dear:
        middle = (max(cheap) + min(dear)) / 2
    else:
        step = 2.0 ** (len(cheap or dear) - 1)
        middle = max(cheap) + step if cheap else min(dear) - step
    return 1 / (1 + math.exp(-middle))


def rounded(lam: float) -> float:
    """λ with the digits that its run is named by, within the range of the search."""
    return float(f"{min(max(lam, LOW), HIGH):.4g}")


def logit(lam: float) -> float:
    """The log-odds of λ, in which steps are even: what matters is the ratio of the two terms."""
    return math.log(lam / (1 - lam))


def validation(lab: Experiment, model: str) -> float:
    """Target accuracy in % on the images of the train split that nothing was trained on."""
    rows = np.setdiff1d(np.arange(len(lab.images("target", "train").labels)), lab.index("target"))
    return lab.engine.accuracy(lab.load_model(model), "target", lab.split("target", "train", rows))


def markdown(document: dict[str, Any]) -> str:
    """Who needed which λ, then the report of the matched runs."""
    return "\n\n".join([*_needed(document), report.markdown(document["table"])])


def _needed(document: dict[str, Any]) -> list[str]:
    """A sentence and a table."""
    settings = document["compare"]
    lines = [
        [name, f"{one['lambda']:g}", f"{one['drop']:.1f}", "yes" if one["reached"] else "no", str(len(one["tried"]))]
        for name, one in document["variants"].items()
    ]
    wanted = f"{settings['target_drop']:g} ± {settings['tolerance']:g}"
    return [
        f"Who needed which λ to be {wanted} points of Acc_t below TL, on target images held back for validation.",
        report.grid(["Variant", "λ", "points below TL", "reached", "values tried"], lines),
    ]


def write(document: dict[str, Any], folder: Path, command: str) -> None:
    """Write compare.json, table.json, table.md, figures and report.html. Raises CheckpointError where it cannot."""
    report.write(document["table"], folder, command, before=_needed(document))
    checkpoint.write(folder / "compare.json", report.dump(document).encode())


def _changed(base: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other tables, validated like a file; whom to attack then follows from the variants."""
    piggyback = base.piggyback
    if piggyback.models:
        known = {"scratch", "TGT", "pre", "TL", *changes["dispose"]}
        piggyback = piggyback.model_copy(update={"models": [m for m in piggyback.models if m in known] or None})
    return base.model_copy(
        update={**changes, "piggyback": piggyback, "audit": base.audit.model_copy(update={"models": None})}
    )
