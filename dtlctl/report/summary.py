"""The numbers of a report, over the seeds, and what must be told beside them: from sidecars and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import fmean, mean
from typing import Any

from dtlctl.errors import RecipeError
from dtlctl.recipe.plan import jobs
from dtlctl.report import audit
from dtlctl.report.evidence import Models, evidence
from dtlctl.report.intervals import half_width
from dtlctl.report.results import ATTACKS, Row, recipe_of, refuse_other_images, renamed, results_of, rows_of
from dtlctl.report.verdict import verdict
from dtlctl.storage import checkpoint

Numbers = dict[tuple[str, ...], list[float]]
"""Of one model, by seed, what every seed has: by name, those of an attack by kind (see ATTACKS) and dataset."""

LEFT = 0.1
"""The share of what TL gives away that must be left for an attack to have failed: less could be chance."""
CHANCE = 3.0
"""So many points at least must be left, too."""
MISLED = 10.0
"""Points by which held-out images must flatter an attacker before that is told: some hundred images differ by less."""


def summarise(runs: Sequence[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe", "seeds", "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc", ...}], ...}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t interval.
    What was not measured is left out. vs_TL and vs_TGT are rows of differences, taken seed by seed. older names results
    in the folders that are not of this recipe's present models. audits_sha256 stands for all that audit.md shows.
    Raises CheckpointError for what is no run or no sidecar, RecipeError for recipes that differ in more.
    """
    recipes = [recipe_of(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0, "track": None} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    found = [*map(results_of, runs, recipes)]
    for one_run in found:
        refuse_other_images(one_run, one_seed=True)
    refuse_other_images(chain(*found), one_seed=False)
    seeds, tables = [recipe.seed for recipe in recipes], [*map(rows_of, found, recipes)]
    by_seed = {model: [table[model] for table in tables] for model in tables[0] if all(model in t for t in tables)}
    first, shared, known = recipes[0], list[str](), {one.path for one in chain(*found)}
    there = [(job.title, run / job.path) for run, recipe in zip(runs, recipes, strict=True) for job in jobs(recipe)]
    older = dict.fromkeys(title for title, path in there if path not in known and path.exists())
    if len(seeds) > 1 and (first.finetune.weights or first.pretrain.weights or first.pretrain.seed is not None):
        shared.append(f"All seeds share one {'TL' if first.finetune.weights else 'pre'}: no interval tells of another.")
    document = {
        "recipe": first.resolved(),
        "seeds": seeds,
        "rows": _rows(by_seed),
        "evidence": evidence(by_seed, first.reference),
        "older": [*older],
        "caveats": [*shared, *caveats(by_seed, tables, seeds), *dict.fromkeys(chain(*map(renamed, found, recipes)))],
        "audits_sha256": checkpoint.key({"audits": audit.read(runs)}),
    }
    return document | {"verdict": asdict(verdict(document, first.publish))}


def _rows(by_seed: Models) -> list[Row]:
    """A row a model, over its seeds."""
    numbers, rows = {model: _numbers(own) for model, own in by_seed.items()}, []
    for model, own in by_seed.items():
        one = numbers[model]
        row = _average(model, one)
        for kind, together in OVER_SEEDS.items():
            found = {name: [one[kind][name] for one in own if name in one.get(kind, {})] for name in row["piggyback"]}
            if any(found.values()):
                row[kind] = {name: together(of) for name, of in found.items() if of}
        for other in [name for name in ("TGT", "TL") if name in by_seed]:
            both = [(at, numbers[other][at]) for at in one if at in numbers[other] and at[0] in ("acc_t", *ATTACKS)]
            seed_by_seed = {at: [a - b for a, b in zip(one[at], two, strict=True)] for at, two in both}
            row[f"vs_{other}"] = _average(model, seed_by_seed)
        rows.append(row)
    return rows


def _numbers(seeds: Sequence[Row]) -> Numbers:
    found = []
    for row in seeds:
        plain = {(name,): value for name, value in row.items() if isinstance(value, float)}
        found.append(plain | {(kind, name): value for kind in ATTACKS for name, value in row.get(kind, {}).items()})
    return {at: [one[at] for one in found] for at in found[0] if all(at in one for one in found)}


def _average(model: str, numbers: Numbers) -> Row:
    """Means, and with several seeds half widths of 95 % intervals beside them."""
    row: Row = {"model": model, "piggyback": {}}
    for (name, *dataset), values in numbers.items():
        said = {name: mean(values)} | ({f"{name}_ci": half_width(values)} if len(values) > 1 else {})
        for key, value in said.items():
            (row.setdefault(key, {}) if dataset else row)[dataset[0] if dataset else key] = value
    return row


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of curves at the steps that all of them have."""
    found = [{int(step): value for step, value in curve} for curve in curves]
    return [[step, mean(curve[step] for curve in found)] for step in found[0] if all(step in curve for curve in found)]


OVER_SEEDS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "curves": _mean_curve,
    "strength": _mean_curve,
    "winner": list,
    "tuned_by": lambda seeds: [*chain(*seeds)],
}
"""What else a row has by dataset, made of that of all seeds: [[steps of the attack, %], ...], [[trials, %], ...]
(`results.strength`), settings that searches chose, and kinds of attackers, with their stages."""


def caveats(models: Models, tables: Sequence[Mapping[str, Row]], seeds: Sequence[int]) -> list[str]:
    """Sentences: what makes a number mean less than it seems to. models: those of every seed; tables: all, by seed."""
    found = []
    for model, rows in models.items() if {"scratch", "TL"} <= models.keys() else ():
        for seed, *three in zip(seeds, rows, models["scratch"], models["TL"], strict=True):
            found += [f"{model} on {text}" for text in _failures(seed, *three)]
    found += [*_diverged(models), *_misled(models.get("TL", []))]
    there = {model: [model in table for table in tables] for model in dict.fromkeys(chain(*tables))}
    for model, rows in models.items():
        names = dict.fromkeys(chain(*(row["piggyback"] for row in rows)))
        there |= {f"{model} on {name}": [name in row["piggyback"] for row in rows] for name in names}
    lacking = []
    for what, by_seed in there.items():
        if at := [str(seed) for seed, known in zip(seeds, by_seed, strict=True) if not known]:
            lacking.append(f"{what} (seed{'s' * (len(at) > 1)} {', '.join(at)})")
    return [*found, f"Left out, because a seed lacks it: {', '.join(lacking)}."] if lacking else found


def _failures(seed: int, row: Row, scratch: Row, tl: Row) -> list[str]:
    """Where the one setting gets less than from scratch, and a tuned attacker much more: such weights make it fail, by
    their scale for instance, and do not hold less than random ones, as its number alone would say."""
    found = []
    for name, tuned in row.get("piggyback_worst", {}).items():
        zero, full = (one.get("piggyback_worst", {}).get(name) for one in (scratch, tl))
        if zero is None or full is None:
            continue
        single, least = row["piggyback"][name], scratch["piggyback"][name]
        if single < least and tuned - zero > max(LEFT * (full - zero), CHANCE):
            found.append(
                f"{name}, seed {seed}: the one setting fails on these weights. It gets {single:.1f}, less than from "
                f"scratch ({least:.1f}), and a tuned attacker gets {tuned:.1f}."
            )
    return found


def _diverged(models: Models) -> list[str]:
    """Where nobody was chosen in a seed, for all diverged: weights that only make training fail look as if empty."""
    attacked = [(model, row.get("diverged", {})) for model, rows in models.items() for row in rows]
    found = dict.fromkeys((model, name) for model, sets in attacked for name, nobody in sets.items() if nobody)
    return [
        f"{model} on {name}: all tuned attackers diverged, and the one setting stands for them. Smaller learning rates "
        "may get more."
        for model, name in found
    ]


def _misled(rows: Sequence[Row]) -> list[str]:
    """Wherever held-out images flatter the attacker on TL: it was trained on them, and what it knows chooses badly."""
    found = []
    for name in rows[0].get("held_out", {}) if rows else []:
        if all(name in row.get("held_out", {}) for row in rows):
            held, tested = (fmean(row[kind][name] for row in rows) for kind in ("held_out", "piggyback_worst"))
            if held - tested > MISLED:
                found.append(
                    f"{name}: held-out images mislead the tuned attackers. On TL they are right on {held:.1f} % of "
                    f"them and on {tested:.1f} % of the test images. Let fresh images choose: "
                    'piggyback.choose_on = "test".'
                )
    return found
