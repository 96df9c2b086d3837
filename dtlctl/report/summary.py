"""The numbers of a report: means, intervals and differences over the seeds, from sidecars and nothing else."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from dtlctl.errors import RecipeError
from dtlctl.report import audit, results
from dtlctl.report.caveats import caveats
from dtlctl.report.evidence import evidence
from dtlctl.report.intervals import half_width
from dtlctl.report.results import ATTACKS, Row, recipe_of, refuse_other_images, renamed, results_of, rows_of
from dtlctl.report.verdict import verdict
from dtlctl.storage import checkpoint

Numbers = dict[tuple[str, ...], float]
"""Of one model and seed: by name, those of an attack by kind (see ATTACKS) and dataset."""


def summarise(runs: Sequence[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe": ..., "seeds": [...], "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc"}, ...]}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t
    interval. A number that was not measured is left out. vs_TL and vs_TGT are rows of differences, taken seed by seed,
    so that their intervals are those of the difference. Under tuned attackers a row also has piggyback_worst and
    piggyback_max, tuned_by (the chosen kinds and their stages), strength ([[trials, %], ...], `results.strength`) and,
    of a search, winner; curves holds [[steps of the attack, %], ...] by dataset. evidence is that of
    `evidence.evidence`, older names results in the folders that are not of this recipe's present models, and from both
    follows the verdict. audits_sha256 stands for all that audit.md shows besides; caveats
    are sentences. Raises CheckpointError for what is no run or no sidecar, RecipeError for recipes that differ in more.
    """
    recipes = [recipe_of(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    found = [results_of(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    for one_run in found:
        refuse_other_images(one_run, one_seed=True)
    refuse_other_images([result for one_run in found for result in one_run], one_seed=False)
    older = [title for each in zip(runs, recipes, found, strict=True) for title in results.left_behind(*each)]
    seeds, tables = [recipe.seed for recipe in recipes], [*map(rows_of, found, recipes)]
    by_seed = {model: [table[model] for table in tables] for model in tables[0] if all(model in t for t in tables)}
    numbers = {model: [*map(_numbers, own)] for model, own in by_seed.items()}
    rows = []
    for model, own in by_seed.items():
        row = _average(model, numbers[model])
        for kind in [kind for kind in ("curves", "strength") if kind in own[0]]:
            curves = {s: [one.get(kind, {}).get(s, []) for one in own] for s in row["piggyback"]}
            row[kind] = {s: _mean_curve(each) for s, each in curves.items()}
        if "winner" in own[0]:
            sets = own[0]["winner"]
            row["winner"] = {s: [one["winner"][s] for one in own if s in one.get("winner", {})] for s in sets}
        if "tuned_by" in own[0]:
            sets = own[0]["tuned_by"]
            row["tuned_by"] = {s: [who for one in own for who in one.get("tuned_by", {}).get(s, [])] for s in sets}
        for reference in [name for name in ("TGT", "TL") if name in by_seed]:
            pairs = zip(numbers[model], numbers[reference], strict=True)
            row[f"vs_{reference}"] = _average(model, [_less(*pair) for pair in pairs])
        rows.append(row)
    document = {
        "recipe": recipes[0].resolved(),
        "seeds": seeds,
        "rows": rows,
        "evidence": evidence(by_seed, recipes[0].reference),
        "older": list(dict.fromkeys(older)),
        "caveats": [
            *caveats(by_seed, tables, seeds),
            *dict.fromkeys(text for pair in zip(found, recipes, strict=True) for text in renamed(*pair)),
        ],
        "audits_sha256": checkpoint.key({"audits": audit.read(runs)}),
    }
    return document | {"verdict": asdict(verdict(document, recipes[0].publish))}


def _numbers(row: Row) -> Numbers:
    plain: Numbers = {(name,): value for name, value in row.items() if isinstance(value, float)}
    return plain | {(kind, name): value for kind in ATTACKS for name, value in row.get(kind, {}).items()}


def _less(model: Numbers, other: Numbers) -> Numbers:
    """Differences of the accuracies that both models have."""
    return {at: model[at] - other[at] for at in model if at in other and at[0] in ("acc_t", *ATTACKS)}


def _average(model: str, seeds: Sequence[Numbers]) -> Row:
    """Means of what all seeds have, and with several seeds half widths of 95 % intervals beside them."""
    row: Row = {"model": model, "piggyback": {}}
    for at in [at for at in seeds[0] if all(at in one for one in seeds)]:
        (name, *dataset), values = at, [one[at] for one in seeds]
        said = {name: mean(values)} | ({f"{name}_ci": half_width(values)} if len(values) > 1 else {})
        for key, value in said.items():
            (row.setdefault(key, {}) if dataset else row)[dataset[0] if dataset else key] = value
    return row


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of curves at the steps that all of them have."""
    found = [{int(step): value for step, value in curve} for curve in curves]
    return [[step, mean(curve[step] for curve in found)] for step in found[0] if all(step in curve for curve in found)]
