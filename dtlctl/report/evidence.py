"""What the verdict is about, model by model, with the intervals of images and seeds: from the rows of every seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import Any

from dtlctl.report.intervals import Number, above, accuracy, cost, number, share
from dtlctl.report.results import ATTACKS, Row

Models = Mapping[str, Sequence[Row]]
"""Rows by model, one a seed."""
Evidence = dict[str, Any]
"""Of one model: {"acc_t", "images", "price", "gain", "attacks": {dataset: {...}}}, of what was measured.

price: points of Acc_t lost from TL; gain: points above TGT. An attack has the "accuracy" of the strongest attacker,
"attacker", the "images" that judge it, "tuned" (whether any attacker tuned himself), "above": {scratch, TGT, TL: points
above them} and "recovered". Each of these numbers is {"value", "low", "high"}.
"""


def evidence(models: Models, outside: Collection[str] = ()) -> dict[str, Evidence]:
    """By model, but for `pre`, which nobody publishes. outside: models that have not seen the source, as scratch."""
    names = dict.fromkeys(name for rows in models.values() for row in rows for name in row["piggyback"])
    attacks = {name: _attacks(models, name) for name in names}
    found = {model: _target(models, model) for model in models if model != "pre"}
    for name, by_model in attacks.items():
        numbers = {model: attack["accuracy"] for model, attack in by_model.items()}
        for model in found.keys() & by_model.keys():
            found[model]["attacks"][name] = {**by_model[model], **_compared(numbers, model, outside)}
    return found


def _target(models: Models, model: str) -> Evidence:
    """What a model keeps of the target, and how that compares with TL and TGT on the same images."""
    own = models[model]
    if not all("acc_t" in row for row in own):
        return {"attacks": {}}
    known = [len(row["answers"]) for row in own if "answers" in row]
    found: Evidence = {"acc_t": mean(row["acc_t"] for row in own), "images": min(known, default=None)}
    for name, pair in (("price", (models.get("TL"), own)), ("gain", (own, models.get("TGT")))):
        before, after = pair
        if before and after and all("acc_t" in row for row in (*before, *after)):
            both = [
                (a["answers"], b["answers"]) for a, b in zip(*pair, strict=True) if "answers" in a.keys() & b.keys()
            ]
            found[name] = _plain(cost([row["acc_t"] for row in before], [row["acc_t"] for row in after], both))
    return {**found, "attacks": {}}


def _attacks(models: Models, name: str) -> dict[str, dict[str, Any]]:
    """The strongest attacker of every model on one dataset: by kinds that all attacked models have, in every seed.

    That of the best by test images is left out: nobody can choose it.
    """
    attacked = {model: rows for model, rows in models.items() if all(name in row["piggyback"] for row in rows)}
    every = [row for rows in attacked.values() for row in rows]
    kinds = [kind for kind in ATTACKS if kind != "piggyback_max" and all(name in row.get(kind, {}) for row in every)]
    found = {}
    for model, rows in attacked.items():
        best = [(row, max(kinds, key=lambda kind: row[kind][name])) for row in rows]
        values, images = [row[kind][name] for row, kind in best], [row["judged"][name].get(kind) for row, kind in best]
        repeats = [row["repeats"][name] if kind == "piggyback_worst" else [] for row, kind in best]
        tuned = [row.get("tuned_by", {}).get(name, []) if kind != "piggyback" else [] for row, kind in best]
        who = [text for each in tuned for text in each or ["full, one setting"]]
        found[model] = {
            "accuracy": number(values) if None in images else accuracy(values, images, repeats),
            "attacker": ", ".join(dict.fromkeys(who)),
            "images": None if None in images else min(images),
            "tuned": len(kinds) > 1,
        }
    return found


def _compared(numbers: Mapping[str, Number], model: str, outside: Collection[str]) -> dict[str, Any]:
    """What an attacker gets from a model, and by how much more than from the references."""
    others = [other for other in ("scratch", "TGT", "TL") if other in numbers and other != model]
    part = None
    if {"scratch", "TL"} <= numbers.keys() and model not in {"scratch", "TGT", *outside}:
        part = share(numbers[model], numbers["scratch"], numbers["TL"])
    return {
        "accuracy": _plain(numbers[model]),
        "above": {other: _plain(above(numbers[model], numbers[other])) for other in others},
        "recovered": part and _plain(part),
    }


def _plain(one: Number) -> dict[str, float | None]:
    return {"value": one.value, "low": one.low, "high": one.high}
