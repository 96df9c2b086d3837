"""What a reader of the tables must be told beside them: sentences, computed from the rows of every seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from dtlctl.report.intervals import recovered
from dtlctl.report.results import Row

LEFT = 0.1
"""The share of what TL gives away that must be left for an attack to have failed: less could be chance."""
MISLED = 10.0
"""Points by which held-out images must flatter an attacker before that is told: some hundred images differ by less."""

Models = Mapping[str, Sequence[Row]]
"""Rows by model, one a seed."""


def caveats(models: Models, seeds: Sequence[int]) -> list[str]:
    """A sentence for everything that makes a number of the table mean less than it seems to."""
    return [*_failures(models, seeds), *_misled(models)]


def left_out(tables: Sequence[Mapping[str, Row]], seeds: Sequence[int]) -> list[str]:
    """A sentence for all models that are not in the table because one of the seeds has no numbers of theirs."""
    lacking = {
        model: [str(seed) for seed, table in zip(seeds, tables, strict=True) if model not in table]
        for model in dict.fromkeys(model for table in tables for model in table)
    }
    said = [f"{model} (seed{'s' * (len(at) > 1)} {', '.join(at)})" for model, at in lacking.items() if at]
    return [f"Left out, because a seed lacks it: {', '.join(said)}."] if said else []


def _failures(models: Models, seeds: Sequence[int]) -> list[str]:
    """Wherever the one setting gets less than from scratch, and a tuned attacker much more.

    Such weights make the one setting fail, by their scale for instance; they do not hold less than random ones, as its
    number alone would say.
    """
    found = []
    for model, rows in models.items() if {"scratch", "TL"} <= models.keys() else ():
        for seed, row, scratch, tl in zip(seeds, rows, models["scratch"], models["TL"], strict=True):
            for name, tuned in row.get("piggyback_worst", {}).items():
                if any(name not in one.get("piggyback_worst", {}) for one in (scratch, tl)):
                    continue
                share = recovered(*([one["piggyback_worst"][name]] for one in (row, scratch, tl)))
                single, least = row["piggyback"][name], scratch["piggyback"][name]
                if share and (share["share"] or 0) > LEFT and single < least:
                    found.append(
                        f"{model} on {name}, seed {seed}: the one setting fails on these weights. It gets "
                        f"{single:.1f}, less than from scratch ({least:.1f}), and a tuned attacker gets {tuned:.1f}."
                    )
    return found


def _misled(models: Models) -> list[str]:
    """Wherever held-out images flatter the attacker on TL: it was trained on them, and what it knows chooses badly."""
    rows, found = models.get("TL", []), []
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
