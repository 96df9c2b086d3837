"""`dtlctl compare`: every unlearning loss at the λ that costs the same target accuracy.

As in the paper's section 4.2. λ is searched with real disposals, by the price on target images that nothing is trained
or tested on; a TL from outside, which may have learned them, answers the test images. A tolerance that so many images
cannot resolve is refused before anything trains; where the 95 % interval is wider after all, no λ counts as reached.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit

from dtlctl.console.progress import say
from dtlctl.errors import DivergedError, RecipeError, counted, named
from dtlctl.many.sweep import folder_name, one_process, perform
from dtlctl.recipe.loading import load, validated
from dtlctl.recipe.plan import Stage, jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Compare, Dispose
from dtlctl.report import files, summary, tables, templates
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.storage import checkpoint
from dtlctl.training.price import Price, images_for, mean_price, price, price_apart, resolution

LOW, FIRST, HIGH = 0.0005, 0.1, 0.9995
"""λ is looked for between the outer two, from the recipe's own on; from the middle one where that has a price."""


def compare(
    path: Path, overrides: Sequence[str], out: Path, *, command: str, quiet: bool = False
) -> tuple[dict[str, Any], Path]:
    """{"compare", "images": n, "seeds", "variants": {name: what `search` returns}, "table"}, and the report's folder.

    Runs are kept below OUT/<name>-compare. Raises what `_comparable` and `search` do.
    """
    one_process("compare: start it as one process, without a launcher")
    base = load(path, list(overrides))
    settings = base.compare or Compare()
    variants, images = _comparable(Experiment(base, out, source=str(path), quiet=quiet), settings)
    seeds = settings.seeds or [base.seed]
    folder = out / f"{base.name}-compare"

    def made(name: str, dispose: dict[str, Dispose], *stages: Stage) -> list[Experiment]:
        recipes = [_changed(base, str(path), f"{name}-{seed}", seed, dispose) for seed in seeds]
        experiments = [Experiment(recipe, folder, source=str(path), quiet=quiet) for recipe in recipes]
        perform(experiments, ("pretrain", "finetune", *stages))
        return experiments

    outside = base.finetune.weights is not None
    tl = [answers(experiment, "TL", tested=outside) for experiment in made("search", {})]
    cost = price_apart if outside else price
    document: dict[str, Any] = {"compare": settings.model_dump(mode="json"), "images": images, "seeds": seeds}
    document["variants"], matched = {}, dict(base.dispose)
    for variant in variants:

        def prices(lam: float, variant: str = variant) -> list[Price]:
            name = folder_name(f"{variant}-{lam:.4g}", {variant: lam})
            with named(f"dispose.{name}"):
                disposed = made("search", {name: at_lambda(base.dispose[variant], lam)}, "dispose")
            found = [cost(before, answers(one, name)) for before, one in zip(tl, disposed, strict=True)]
            by_seed = ", ".join(f"{one.points:.1f} ± {one.half_width:.1f}" for one in found)
            say(f"{name}: {by_seed} points below TL, by seed", quiet)
            return found

        found = search(prices, base.dispose[variant].lam or FIRST, settings)
        document["variants"][variant] = found
        matched[variant] = at_lambda(base.dispose[variant], found["lambda"])
        told = f"λ = {found['lambda']:g}, {_points(found)} points below TL; reached: {found['reached']}"
        say(f"{variant}: {told}", quiet)
    final = made("matched", matched, "dispose", "piggyback")
    document["table"] = summary.summarise([experiment.folder for experiment in final])
    write(document, folder / "report", command)
    return document, folder / "report"


def at_lambda(variant: Dispose, lam: float) -> Dispose:
    return variant.model_copy(update={"lam": lam, "price": None})


def _comparable(experiment: Experiment, settings: Compare) -> tuple[list[str], int]:
    """The variants whose λ is to be found, and how many target images are held back for it; or RecipeError."""
    variants = [name for name, one in experiment.recipe.dispose.items() if one.unlearn.kind != "none"]
    if not variants:
        raise RecipeError(f"{experiment.source}: compare needs a [dispose.NAME] table with an unlearning loss")
    fraction, tolerance, share = experiment.recipe.data.target.fraction, settings.tolerance, settings.disagreement
    if fraction == 1 or not (images := len(experiment.data.held_back("target"))):
        where = f"{experiment.source}: data.target.fraction = {fraction:g}"
        raise RecipeError(f"{where} leaves no target images to validate λ on; lower it")
    if (finest := resolution(images, share)) > tolerance:
        raise RecipeError(
            f"{experiment.source}: compare.tolerance = {tolerance:g}: on {counted(images, 'target image')} held "
            f"back a price is resolved to {finest:.1f} points, where TL and a variant disagree on {share:.0%} of them; "
            f"{images_for(tolerance, share):,} images would do\n"
            f"lower data.target.fraction, set compare.tolerance = {math.ceil(10 * finest) / 10} or more, or a smaller "
            "compare.disagreement if compare.json has measured one"
        )
    dispose = experiment.recipe.dispose
    given = dispose | {name: at_lambda(dispose[name], FIRST) for name in variants}
    data_demands.check(experiment, jobs(experiment.recipe.model_copy(update={"dispose": given})))
    return variants, images


def search(prices: Callable[[float], list[Price]], first: float, settings: Compare) -> dict[str, Any]:
    """The λ whose mean price is `settings.target_drop`, looked for as `following` says. prices(λ): one of each seed.

    {"lambda", "drop", "low", "high", "reached", "tried": [...]}, with points of accuracy below TL and their 95 %
    interval, over the seeds (`mean_price`) and, of each that was tried, by seed. `reached` is "yes"; "no" where no λ
    was near enough, of which the best is returned; or "not resolved" where the interval is wider than the tolerance.
    A λ that diverges is too dear, and kept with a drop of None. Raises DivergedError where all of them did.
    """

    def over(one: dict[str, Any]) -> float:
        return math.inf if one["drop"] is None else one["drop"] - settings.target_drop

    tried: list[dict[str, Any]] = []
    lam = rounded(first)
    while len(tried) < settings.rounds and lam not in [one["lambda"] for one in tried]:  # again: the range has ended
        try:
            found = prices(lam)
        except DivergedError as error:
            failure = error
            tried.append({"lambda": lam, "drop": None, "drops": None})
        else:
            whole, by_seed = asdict(mean_price(found)), [asdict(one) for one in found]
            drops = [one.points for one in found]
            tried.append({"lambda": lam, "drop": whole.pop("points"), **whole, "drops": drops, "by_seed": by_seed})
        if abs(over(tried[-1])) <= settings.tolerance:
            break
        lam = rounded(following([(one["lambda"], one["drop"]) for one in tried], settings.target_drop))
    best = min(tried, key=lambda one: abs(over(one)))
    if best["drop"] is None:
        values = ", ".join(f"{one['lambda']:g}" for one in tried)
        raise DivergedError(f"compare: every λ that was tried diverged ({values}); the last: {failure}")
    reached = "no"
    if abs(over(best)) <= settings.tolerance:
        reached = "yes" if (best["high"] - best["low"]) / 2 <= settings.tolerance else "not resolved"
    return {**{name: best[name] for name in ("lambda", "drop", "low", "high")}, "reached": reached, "tried": tried}


def following(tried: Sequence[tuple[float, float | None]], wanted: float) -> float:
    """The λ to try after these pairs of λ and drop (None: diverged, so too dear), of which none costs what is wanted.

    In log-odds, half-way between the dearest that is too cheap and the cheapest that is too dear. While all are on one
    side, a step away from the outermost: of at most 1, then 2, 4, ..., and as long as if the drop went with the odds
    (those of RAND and null-space go with the odds or steeper: docs/results/disposal.md, "along λ").
    """
    cheap = [(logit(lam), drop) for lam, drop in tried if drop is not None and drop < wanted]
    dear = [(logit(lam), drop) for lam, drop in tried if drop is None or drop > wanted]
    if cheap and dear:
        middle = (max(cheap)[0] + min(dear)[0]) / 2
    else:
        outermost, drop = max(cheap) if cheap else min(dear)
        step = 2.0 ** (len(tried) - 1) * (min(1, abs(math.log(drop / wanted))) if drop and drop > 0 else 1)
        middle = outermost + step if cheap else outermost - step
    return float(expit(middle))


def rounded(lam: float) -> float:
    """λ with the digits that its run is named by, within the range of the search."""
    return float(f"{min(max(lam, LOW), HIGH):.4g}")


def answers(experiment: Experiment, model: str, *, tested: bool = False) -> np.ndarray:
    """bool [n]: which target images that nothing was trained on, or of the test split, the model answers rightly."""
    seen: Any = ("test", None) if tested else ("train", experiment.data.held_back("target"))
    return experiment.trainer.right(experiment.trainer.load_model(model), "target", *seen)


def advice(
    document: dict[str, Any], recipe: Path, overrides: Sequence[str], folder: Path, *, written: bool
) -> list[str]:
    """What to do next, in sentences. folder: of the comparison's runs; written: whether the λ stand in the recipe."""
    said, reached = list[str](), dict[str, float]()
    for variant, one in document["variants"].items():
        if one["reached"] == "yes":
            reached[variant] = one["lambda"]
        else:
            said.append(templates.said("advice", document["compare"], variant, one))
    if reached:
        changes = [text for text in overrides if not re.match(r"\s*dispose\b.*\.(lambda|odds|price) *=", text)]
        if not written or len(changes) < len(overrides):
            keys = {json.dumps(variant) if "." in variant else variant: lam for variant, lam in reached.items()}
            changes += [f"dispose.{key}.lambda={lam:g}" for key, lam in keys.items()]
        changes += ["data.target.fraction=1", "name=final"]
        words = [word for text in changes for word in ("--set", text)]
        again = shlex.join(["dtlctl", "run", str(recipe), *words, "--out", str(folder)])
        said.append(f"the final model, on all target images at this λ: {again}")
    return said


def markdown(document: dict[str, Any]) -> str:
    return tables.markdown(document["table"], before=[_needed(document)])


def _needed(document: dict[str, Any]) -> tables.Table:
    """Who needed which λ: one row a variant."""
    settings = document["compare"]
    lines = []
    for name, one in document["variants"].items():
        diverged = sum(each["drop"] is None for each in one["tried"])
        tried = f"{len(one['tried'])}, {diverged} diverged" if diverged else str(len(one["tried"]))
        lines.append([name, f"{one['lambda']:g}", _points(one), one["reached"], tried])
    seeds = ", over seeds the mean of their half widths" if len(document["seeds"]) > 1 else ""
    note = (
        f"Who needed which λ to be {settings['target_drop']:g} points of Acc_t below TL, give or take "
        f"{settings['tolerance']:g}, on {counted(document['images'], 'target image')} held back for validation. "
        f"±: half width of the 95 % interval that these images give the difference of these models{seeds}; not "
        "resolved: wider than what may be given or taken."
    )
    return tables.Table(note, ["Variant", "λ", "points below TL", "reached", "values tried"], lines, "Which λ")


def _points(one: dict[str, Any]) -> str:
    return f"{one['drop']:.1f} ± {(one['high'] - one['low']) / 2:.1f}"


def write(document: dict[str, Any], folder: Path, command: str) -> None:
    """Write compare.json, table.json, table.md, figures and report.html. Raises CheckpointError where it cannot."""
    checkpoint.write(folder / "compare.json", checkpoint.dump(document).encode())  # no run holds what it says
    files.write(document["table"], folder, command, before=[_needed(document)])


def _changed(base: Recipe, source: str, name: str, seed: int, dispose: dict[str, Dispose]) -> Recipe:
    """The recipe of a run with these variants alone, validated like a file. Whom to attack follows from them."""
    raw = base.resolved()
    if raw["piggyback"]["models"]:
        known = {*base.references, *dispose}
        raw["piggyback"]["models"] = [model for model in raw["piggyback"]["models"] if model in known] or None
    raw["audit"]["models"] = None
    variants = {variant: settings.model_dump(mode="json", by_alias=True) for variant, settings in dispose.items()}
    return validated({**raw, "name": name, "seed": seed, "dispose": variants}, source)
