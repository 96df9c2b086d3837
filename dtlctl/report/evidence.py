"""What the verdict is about, model by model, with the intervals of images and seeds: from the rows of every seed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dtlctl.report.intervals import Number, above, accuracy, cost, share
from dtlctl.report.results import ATTACKS, NEVER_SAW_THE_SOURCE, Row

Models = Mapping[str, Sequence[Row]]
"""Rows by model, one a seed."""
Evidence = dict[str, Any]
"""Of one model: {"acc_t", "accuracy", "images", "price", "gain", "passes", "draws", "attacks": {dataset: {...}}}, of
what was measured.

accuracy: Acc_t with its interval; price: points of it lost from TL; gain: points above TGT; passes: of its disposal
over the source, in the seed that had fewest; draws: of it, in the seed that had most. An attack has the "accuracy" of
the strongest attacker, "attacker", the "images" that judge it, "tuned" (whether any attacker tuned himself), "above":
{scratch, TGT, TL: points above them} and "recovered". Each of these numbers is an `intervals.Figure`. Of `pre`, which
nobody publishes, the attacks alone.
"""


def evidence(models: Models, outside: Collection[str] = ()) -> dict[str, Evidence]:
    """By model. outside: models that have not seen the source, as scratch."""
    names = dict.fromkeys(name for rows in models.values() for row in rows for name in row["piggyback"])
    found = {model: _target(models, model) for model in models}
    for name in names:
        attacks = _attacks(models, name)
        numbers = {model: number for model, (number, _) in attacks.items()}
        for model, (number, said) in attacks.items():
            others = [other for other in ("scratch", "TGT", "TL") if other in numbers and other != model]
            part = None
            if {"scratch", "TL"} <= numbers.keys() and model not in {*NEVER_SAW_THE_SOURCE, *outside}:
                part = share(number, numbers["scratch"], numbers["TL"])
            found[model]["attacks"][name] = {
                "accuracy": number.figure(),
                **said,
                "above": {other: above(number, numbers[other]).figure() for other in others},
                "recovered": part,
            }
    return found


def _target(models: Models, model: str) -> Evidence:
    """What a model keeps of the target, and how that compares with TL and TGT on the same images."""
    own = models[model]
    if model == "pre" or not all("acc_t" in row for row in own):
        return {"attacks": {}}
    images = [len(row["answers"]) if "answers" in row else None for row in own]
    kept = accuracy([row["acc_t"] for row in own], images, [[]] * len(own))
    known = min((count for count in images if count), default=None)
    found: Evidence = {"acc_t": kept.value, "accuracy": kept.figure(), "images": known}
    for name, before, after in (("price", models.get("TL"), own), ("gain", own, models.get("TGT"))):
        if before and after and before is not after and all("acc_t" in row for row in (*before, *after)):
            pairs = [(a, b) for a, b in zip(before, after, strict=True) if "answers" in a.keys() & b.keys()]
            both = [(a["answers"], b["answers"]) for a, b in pairs]
            found[name] = cost([row["acc_t"] for row in before], [row["acc_t"] for row in after], both).figure()
    if passes := [row["passes"] for row in own if "passes" in row]:
        found["passes"] = min(passes)
    return {**found, "draws": max(row.get("draws", 1) for row in own), "attacks": {}}


def _attacks(models: Models, name: str) -> dict[str, tuple[Number, dict[str, Any]]]:
    """The strongest attacker of every model on one dataset: by kinds that all attacked models have, in every seed.

    That of the best by test images is left out: nobody can choose it.
    """
    attacked = {model: rows for model, rows in models.items() if all(name in row["piggyback"] for row in rows)}
    every = [row for rows in attacked.values() for row in rows]
    kinds = [kind for kind in ATTACKS if kind != "piggyback_max" and all(name in row.get(kind, {}) for row in every)]
    found = {}
    for model, rows in attacked.items():
        best = [(row, max(kinds, key=lambda kind: row[kind][name])) for row in rows]
        images = [row["judged"][name].get(kind) for row, kind in best]
        repeats = [row["repeats"][name] if kind == "piggyback_worst" else [] for row, kind in best]
        tuned = [row.get("tuned_by", {}).get(name, []) if kind != "piggyback" else [] for row, kind in best]
        who = dict.fromkeys(text for each in tuned for text in each or ["full, one setting"])
        found[model] = (
            accuracy([row[kind][name] for row, kind in best], images, repeats),
            {"attacker": ", ".join(who), "images": None if None in images else min(images), "tuned": len(kinds) > 1},
        )
    return found
