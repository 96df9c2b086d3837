"""The numbers of a report: means, intervals and differences over the seeds, from sidecars and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dtlctl.errors import RecipeError
from dtlctl.report import audit
from dtlctl.report.caveats import caveats, left_out
from dtlctl.report.intervals import half_width, recovered
from dtlctl.report.results import ATTACKS, Row, measured, recipe_of, refuse_other_images
from dtlctl.storage import checkpoint

NEVER_SAW_THE_SOURCE = ("scratch", "TGT")
"""Nothing of the source can be recovered from these: what an attacker gets is what he learned himself."""


def summarise(runs: Sequence[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe": ..., "seeds": [...], "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc"}, ...]}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t
    interval. A number that was not measured is left out. vs_TL and vs_TGT are rows of differences, taken seed by seed,
    so that their intervals are those of the difference. Under tuned attackers a row also has piggyback_worst and
    piggyback_max; recovered and recovered_worst are shares of what TL gives away (see `recovered`), for models that
    saw the source; curves holds [[steps of the attack, %], ...] by dataset. audits_sha256 stands for all that audit.md
    shows besides; caveats are sentences. Raises CheckpointError for what is no run or no sidecar, RecipeError for
    recipes that differ in more.
    """
    recipes = [recipe_of(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    found = [measured(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    refuse_other_images(found)
    seeds, tables = [recipe.seed for recipe in recipes], [one.rows for one in found]
    by_seed = {model: [table[model] for table in tables] for model in tables[0] if all(model in t for t in tables)}
    rows = []
    for model, own in by_seed.items():
        row = _average(own)
        for reference in [name for name in ("TGT", "TL") if name in by_seed]:
            row[f"vs_{reference}"] = _average([_less(*pair) for pair in zip(own, by_seed[reference], strict=True)])
        if {"scratch", "TL"} <= by_seed.keys() and model not in NEVER_SAW_THE_SOURCE:
            row |= _shares(own, by_seed["scratch"], by_seed["TL"])
        rows.append(row)
    return {
        "recipe": recipes[0].resolved(),
        "seeds": seeds,
        "rows": rows,
        "caveats": [
            *caveats(by_seed, seeds),
            *left_out(tables, seeds),
            *dict.fromkeys(sentence for one in found for sentence in one.renamed),
        ],
        "audits_sha256": checkpoint.key({"audits": audit.read(runs)}),
    }


def _average(rows: list[Row]) -> Row:
    """Means of what all seeds have, and with several seeds half widths of 95 % intervals beside them."""
    means, halves = _means([{k: v for k, v in row.items() if isinstance(v, float)} for row in rows])
    result: Row = {"model": rows[0]["model"]}
    for name, value in means.items():
        result |= {name: value, **({f"{name}_ci": halves[name]} if halves else {})}
    for kind in [kind for kind in ATTACKS if kind in rows[0]]:
        result[kind], halves = _means([row.get(kind, {}) for row in rows])
        if len(rows) > 1:
            result[f"{kind}_ci"] = halves
    if "curves" in rows[0]:
        result["curves"] = {s: _mean_curve([row["curves"].get(s, []) for row in rows]) for s in result["piggyback"]}
    return result


def _means(rows: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means, and half widths with several seeds, of the numbers that all rows have."""
    values = {name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)}
    halves = {name: half_width(own) for name, own in values.items()} if len(rows) > 1 else {}
    return {name: mean(own) for name, own in values.items()}, halves


def _less(row: Row, other: Row) -> Row:
    """The row of differences between two models of one seed, of accuracies that both have."""
    less: Row = {"model": row["model"]}
    if "acc_t" in row and "acc_t" in other:
        less["acc_t"] = row["acc_t"] - other["acc_t"]
    for kind in [kind for kind in ATTACKS if kind in row and kind in other]:
        less[kind] = {s: value - other[kind][s] for s, value in row[kind].items() if s in other[kind]}
    return less


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of curves at the steps that all of them have."""
    found = [{int(step): value for step, value in curve} for curve in curves]
    return [[step, mean(curve[step] for curve in found)] for step in found[0] if all(step in curve for curve in found)]


def _shares(own: list[Row], scratch: list[Row], tl: list[Row]) -> Row:
    """The recovered share of every dataset, for the one setting and for the tuned attacker."""
    result: Row = {}
    groups = (own, scratch, tl)
    for kind, name in (("piggyback", "recovered"), ("piggyback_worst", "recovered_worst")):
        sets = [s for s in own[0].get(kind, {}) if all(s in row.get(kind, {}) for rows in groups for row in rows)]
        if sets:
            result[name] = {s: recovered(*([row[kind][s] for row in rows] for rows in groups)) for s in sets}
    return result
