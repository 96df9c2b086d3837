"""The numbers of a report: means, intervals and differences over the seeds, from sidecars and nothing else."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dtlctl.errors import RecipeError
from dtlctl.report import audit
from dtlctl.report.caveats import caveats, left_out
from dtlctl.report.recovery import recovered
from dtlctl.report.results import ATTACKS, Row, measured, recipe_of, refuse_other_images
from dtlctl.storage import checkpoint


def summarise(runs: list[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe": ..., "seeds": [...], "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc"}, ...]}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t
    interval. A number that was not measured is left out. vs_TL and vs_TGT are rows of differences, taken seed by seed,
    so that their intervals are those of the difference. Under tuned attackers a row also has piggyback_worst and
    piggyback_max; recovered and recovered_worst are shares of what TL gives away (see `recovered`); curves holds
    [[steps of the attack, %], ...] by dataset. audits_sha256 stands for all that audit.md shows besides; caveats
    are sentences.
    """
    recipes = [recipe_of(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    found = [measured(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    refuse_other_images(found)
    seeds, tables = [recipe.seed for recipe in recipes], [one.rows for one in found]
    models = [model for model in tables[0] if all(model in t for t in tables)]
    by_seed: dict[str, list[Row]] = {model: [table[model] for table in tables] for model in models}
    rows = [_average(own) for own in by_seed.values()]
    for row, own in zip(rows, by_seed.values(), strict=True):
        for reference in [name for name in ("TGT", "TL") if name in by_seed]:
            row[f"vs_{reference}"] = _average([_less(*pair) for pair in zip(own, by_seed[reference], strict=True)])
        if {"scratch", "TL"} <= by_seed.keys():
            _add_shares(row, own, by_seed["scratch"], by_seed["TL"])
    return {
        "recipe": recipes[0].resolved(),
        "seeds": seeds,
        "rows": rows,
        "caveats": [
            *caveats(by_seed, seeds),
            *left_out(tables, seeds),
            *dict.fromkeys(sentence for one in found for sentence in one.renamed),
        ],
        "audits_sha256": checkpoint.key({"audits": audit.read_all(runs)}),
    }


def _average(rows: list[Row]) -> Row:
    """Means, and with several seeds half widths of 95 % intervals beside them."""
    result: Row = {"model": rows[0]["model"]}
    plain = [k for k, v in rows[0].items() if isinstance(v, float) and all(k in row for row in rows)]
    for name in plain:
        _add(result, name, [row[name] for row in rows])
    for kind in [k for k in ATTACKS if k in rows[0]]:
        averages: Row = {}
        sets = [s for s in rows[0][kind] if all(s in row.get(kind, {}) for row in rows)]
        for name in sets:
            _add(averages, name, [row[kind][name] for row in rows])
        result[kind] = {s: averages[s] for s in sets}
        if len(rows) > 1:
            result[f"{kind}_ci"] = {s: averages[f"{s}_ci"] for s in sets}
    if "curves" in rows[0]:
        result["curves"] = {s: _mean_curve([row["curves"].get(s, []) for row in rows]) for s in result["piggyback"]}
    return result


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
    found = [{step: value for step, value in curve} for curve in curves]  # noqa: C416
    return [[step, mean(curve[step] for curve in found)] for step in found[0] if all(step in curve for curve in found)]


def _add_shares(row: Row, own: list[Row], scratch: list[Row], tl: list[Row]) -> None:
    """The recovered share of every dataset, for the one setting and for the tuned attacker."""
    for kind, name in (("piggyback", "recovered"), ("piggyback_worst", "recovered_worst")):
        shares = {
            s: recovered(*([one[kind][s] for one in group] for group in (own, scratch, tl)))
            for s in row.get(kind, {})
            if all(s in one.get(kind, {}) for group in (scratch, tl) for one in group)
        }
        if shares:
            row[name] = shares


def _add(row: Row, name: str, values: list[float]) -> None:
    row[name] = mean(values)
    if len(values) > 1:
        from scipy.stats import t

        row[f"{name}_ci"] = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
