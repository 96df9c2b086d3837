"""What a reader of the table must be told beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def caveats(models: Mapping[str, Sequence[Row]], seeds: Sequence[int]) -> list[str]:
    """A sentence wherever the one setting gets less than from scratch, and a tuned attacker more.

    models: the rows of `report` by model, one a seed. Such weights make the one setting fail, by their scale for
    instance; they do not hold less than random ones, as its number alone would say.
    """
    return [
        f"{model} on {name}, seed {seed}: the one setting fails on these weights. "
        f"It gets {row['piggyback'][name]:.1f}, less than from scratch "
        f"({scratch['piggyback'][name]:.1f}), and a tuned attacker gets {tuned:.1f}."
        for model, rows in models.items()
        for seed, row, scratch in zip(seeds, rows, models.get("scratch", [{}] * len(rows)), strict=True)
        for name, tuned in row.get("piggyback_worst", {}).items()
        if name in scratch.get("piggyback_worst", {})
        and row["piggyback"][name] < scratch["piggyback"][name]
        and tuned > scratch["piggyback_worst"][name]
    ]
