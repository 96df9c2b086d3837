"""What a reader of the tables must be told beside them: sentences, computed from the rows of every seed."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from dtlctl.report.evidence import Models
from dtlctl.report.results import Row

LEFT = 0.1
"""The share of what TL gives away that must be left for an attack to have failed: less could be chance."""
CHANCE = 3.0
"""So many points at least must be left, too."""
MISLED = 10.0
"""Points by which held-out images must flatter an attacker before that is told: some hundred images differ by less."""


def caveats(models: Models, tables: Sequence[Mapping[str, Row]], seeds: Sequence[int]) -> list[str]:
    """A sentence for everything that makes a number of the table mean less than it seems to.

    models: those that every seed has. tables: all rows of every seed, by model.
    """
    found = []
    for model, rows in models.items() if {"scratch", "TL"} <= models.keys() else ():
        for seed, *three in zip(seeds, rows, models["scratch"], models["TL"], strict=True):
            found += [f"{model} on {text}" for text in _failures(seed, *three)]
    found += _misled(models.get("TL", []))
    lacking = []
    for model in dict.fromkeys(model for table in tables for model in table if model not in models):
        at = [str(seed) for seed, table in zip(seeds, tables, strict=True) if model not in table]
        lacking.append(f"{model} (seed{'s' * (len(at) > 1)} {', '.join(at)})")
    return [*found, f"Left out, because a seed lacks it: {', '.join(lacking)}."] if lacking else found


def _failures(seed: int, row: Row, scratch: Row, tl: Row) -> list[str]:
    """Wherever the one setting gets less from a model than from scratch, and a tuned attacker much more.

    Such weights make the one setting fail, by their scale for instance; they do not hold less than random ones, as its
    number alone would say.
    """
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
