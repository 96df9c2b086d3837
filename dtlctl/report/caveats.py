"""What a reader of the table must be told beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from dtlctl.report.recovery import recovered
from dtlctl.report.results import Row

LEFT = 0.1
"""The share of what TL gives away that must be left for an attack to have failed: less could be chance."""


MISLED = 10.0
"""Points by which held-out images must flatter an attacker before that is told: some hundred images differ by less."""


def caveats(models: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> list[str]:
    """A sentence for everything that makes a number of the table mean less than it seems to.

    models: the rows of `report` by model, one a seed.
    """
    return [*_failures(models, seeds), *_misled(models)]


def left_out(tables: Sequence[Mapping[str, Row]], seeds: Sequence[int]) -> list[str]:
    """A sentence for all models that are not in the table because one of the seeds has no numbers of theirs."""
    lacking = {
        model: [str(seed) for seed, table in zip(seeds, tables, strict=True) if model not in table]
        for model in dict.fromkeys(model for table in tables for model in table)
    }
    said = [f"{model} (seed{'s' * (len(at) > 1)} {', '.join(at)})" for model, at in lacking.items() if at]
    return [f"Left out, because a seed lacks it: {', '.join(said)}."] if said else []


def _failures(models: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> list[str]:
    """Wherever the one setting gets less than from scratch, and a tuned attacker much more.

    Such weights make the one setting fail, by their scale for instance; they do not hold less than random ones, as its
    number alone would say.
    """
    if not {"scratch", "TL"} <= models.keys():
        return []
    return [
        f"{model} on {name}, seed {seed}: the one setting fails on these weights. "
        f"It gets {row['piggyback'][name]:.1f}, less than from scratch ({scratch['piggyback'][name]:.1f}), "
        f"and a tuned attacker gets {tuned:.1f}."
        for model, rows in models.items()
        for seed, row, scratch, tl in zip(seeds, rows, models["scratch"], models["TL"], strict=True)
        for name, tuned in row.get("piggyback_worst", {}).items()
        if _failed(name, row, scratch, tl)
    ]


def _misled(models: Mapping[str, Sequence[Row]]) -> list[str]:
    """Wherever held-out images flatter the attacker on TL: it was trained on them, and what it knows chooses badly."""
    rows = models.get("TL", [])
    sets = rows[0].get("held_out", {}) if rows else {}
    names = [name for name in sets if all(name in row.get("held_out", {}) for row in rows)]
    means = {
        name: [fmean(row[kind][name] for row in rows) for kind in ("held_out", "piggyback_worst")] for name in names
    }
    return [
        f"{name}: held-out images mislead the tuned attackers. On TL they are right on {held:.1f} % of them and on "
        f'{tested:.1f} % of the test images. Let fresh images choose: piggyback.choose_on = "test".'
        for name, (held, tested) in means.items()
        if held - tested > MISLED
    ]


def _failed(name: str, row: Row, scratch: Row, tl: Row) -> bool:
    """Whether the one setting gets less from this model than from scratch, and a tuned attacker enough."""
    trio = (row, scratch, tl)
    if any(name not in one.get("piggyback_worst", {}) for one in trio):
        return False
    left = recovered(*([one["piggyback_worst"][name]] for one in trio)) or {"share": None}
    return row["piggyback"][name] < scratch["piggyback"][name] and (left["share"] or 0.0) > LEFT
