"""What a reader of the table must be told beside it."""

from __future__ import annotations

from typing import Any


def caveats(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for every model that the one setting gets less from than from scratch, and a tuned attacker more.

    rows: those of `report.summarise`. Such weights make the one setting fail, by their scale for instance; they do not
    hold less than random ones, as its number alone would say.
    """
    scratch = next((row for row in rows if row["model"] == "scratch"), {})
    return [
        f"{row['model']} on {name}: the one setting fails on these weights. It gets {row['piggyback'][name]:.1f}, less "
        f"than from scratch ({scratch['piggyback'][name]:.1f}), and a tuned attacker gets {tuned:.1f}: quote that one."
        for row in rows
        for name, tuned in row.get("piggyback_worst", {}).items()
        if name in scratch.get("piggyback_worst", {})
        and row["piggyback"][name] < scratch["piggyback"][name]
        and tuned > scratch["piggyback_worst"][name]
    ]
