"""May it be published? Sentences from the numbers of a report, and no more than these numbers say."""

import math
from dataclasses import dataclass
from typing import Any

from dtlctl.errors import EvidenceError, counted
from dtlctl.recipe.settings import PASSES, Publish
from dtlctl.report.evidence import Evidence
from dtlctl.report.intervals import Figure
from dtlctl.report.results import NEVER_SAW_THE_SOURCE
from dtlctl.report.templates import points, said, shared

YARDSTICK = 2.0
"""Points of Acc_t: a model above this price is not recommended where the recipe has no limit of its own."""

ENOUGH = 100
"""Steps of an attacker: fewer are told."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers recommend, or that they recommend nothing."""

    sentences: list[str]
    """The recommendation, the recipe's limits, the models one by one, then `caveats`."""
    recommended: str | None
    meets_limits: bool
    """Whether the recommended model is shown to be within the recipe's limits; True where it has none."""
    caveats: list[str]
    """What makes all of it mean less."""
    models: dict[str, dict[str, Any]]
    """By model what is known of it, the decision, and the reasons against it."""


def verdict(document: dict[str, Any], limits: Publish | None) -> Verdict:
    """The verdict on a document of `summary.summarise`, of which it reads `evidence`, `seeds` and `older`."""
    found: dict[str, Evidence] = document["evidence"]
    caveats, limits = _caveats(document), limits or Publish()
    limited = limits != Publish()
    if lacking := _lacking(found):
        caveats = caveats[-1:] if document["older"] else []
        return Verdict([f"No verdict: {lacking}", *caveats], None, not limited, caveats, {})
    leaks = _leaks(found)
    against = {model: _against(found, model, limits) for model in found if "acc_t" in found[model]}
    chosen = _chosen(found, against)
    status = held(found, chosen, limits) if chosen else []
    models = {
        model: {**found[model], "decision": "publish" if model == chosen else "not recommended", "reasons": reasons}
        for model, reasons in against.items()
    }
    sentences = [
        said("conclusion", chosen, leaks),
        *(f"[publish] {text}" for _, text in status),
        *(said("told", found, model, [] if model == chosen else why, leaks) for model, why in against.items()),
        *caveats,
    ]
    meets = all(state == "met" for state, _ in status) and (chosen is not None or not limited)
    return Verdict(sentences, chosen, meets, caveats, models)


def demand(document: dict[str, Any], model: str | None, limits: Publish | None, where: str) -> None:
    """Raise EvidenceError where it is not shown that a model, or the recommended one, is within the limits.

    model: None where none is recommended. where: the recipe's file, for the message.
    """
    if limits in (None, Publish()):
        return
    if model is None:
        raise EvidenceError(
            f"{where}: [publish]: no model is recommended; the verdict says why\n"
            "TGT gives nothing of the source away (export --model TGT); longer pre-training and disposal may do better"
        )
    if short := [text for state, text in held(document["evidence"], model, limits) if state != "met"]:
        end = "low" if model == "TGT" else "high"  # of the interval: TGT meets what it is not shown to be beyond
        enough = document["evidence"].get(model, {}).get("price", {}).get(end) or 0
        looser = [f"publish.price={math.ceil(enough)}"] * any(text.startswith("price") for text in short)
        looser += ["a larger publish.recovered"] * any(text.startswith("from") for text in short)
        other = f"another limit ({' and '.join(looser)}, by --set) or " * bool(looser)
        raise EvidenceError(
            f"{where}: [publish] is not met by {model}: {' '.join(short)}\n"
            f"more test images narrow an interval; without training there is {other}none "
            "(their lines deleted), which the card tells"
        )


def _lacking(found: dict[str, Evidence]) -> str:
    """What there must be for any verdict and is not there."""
    for model in ("TL", "TGT"):
        if "acc_t" not in found.get(model, {}):
            return f"{model} has not been made; dtlctl run RECIPE makes it."
    if not found["TL"]["attacks"]:
        return "TL was never attacked; nothing is known of what it gives away."
    if not found.get("scratch", {}).get("attacks"):
        return "scratch was never attacked; what an attacker learns by himself is not known."
    return ""


def _leaks(found: dict[str, Evidence], model: str = "TL") -> list[str]:
    """The datasets on which a model is shown to give more than scratch."""
    attacks = found.get(model, {"attacks": {}})["attacks"]
    return [name for name, one in attacks.items() if _positive(one["above"].get("scratch"))]


def _positive(one: Figure | None) -> bool:
    return one is not None and one["low"] is not None and one["low"] > 0


def _against(found: dict[str, Evidence], model: str, limits: Publish) -> list[str]:
    """What speaks against publishing a model, by the rules of the verdict."""
    own, leaks = found[model], _leaks(found)
    if model == "TGT":
        gains = {other: one["gain"] for other, one in found.items() if "gain" in one}
        better = [other for other, gain in gains.items() if _positive(gain)]
        unknown = [other for other, gain in gains.items() if gain["low"] is None]
        why = [f"shown to be better on the target: {', '.join(better)}"] * bool(better)
        return why + [f"not known to be best on the target: no interval for {', '.join(unknown)}"] * bool(unknown)
    if model == "TL":
        return ["it was not disposed of"] if leaks else ["what it gives away is not shown, nor shown to be nothing"]
    why = [] if _positive(own["gain"]) else [f"not shown to be better on the target than TGT ({points(own['gain'])})"]
    why += [] if leaks else ["no attack on TL shows anything to dispose of"]
    for name in leaks:
        if name not in own["attacks"]:
            why.append(f"not attacked on {name}")
        elif (high := own["attacks"][name]["above"]["TL"]["high"]) is None or high >= 0:
            why.append(f"attackers of {name} are not shown to get less than from TL")
        elif limits.recovered is not None and own["attacks"][name]["recovered"]["value"] > limits.recovered:
            why.append(f"more than {limits.recovered:.0%} is recovered on {name}")
    most = YARDSTICK if limits.price is None else limits.price
    yardstick = ", the yardstick where [publish] has no price" if limits.price is None else ""
    if own["price"]["value"] > most:
        why.append(f"it costs more than {most:g} points{yardstick}")
        if round(passes := own.get("passes", PASSES)) < PASSES:
            short = f"after {passes:.2g} passes over the source, where {PASSES} are recommended"
            why[-1] += f"; {short}: longer costs less, and may leave attackers more"
    return why


def _chosen(found: dict[str, Evidence], against: dict[str, list[str]]) -> str | None:
    """The variant that nothing speaks against and that gives away least; TGT where no other is shown to be better."""
    leaks = _leaks(found)
    if good := [model for model, why in against.items() if model != "TGT" and not why]:
        left = {model: max(found[model]["attacks"][name]["recovered"]["value"] for name in leaks) for model in good}
        return min(good, key=lambda model: (left[model], found[model]["price"]["value"]))
    others = [model for model in against if model not in ("TGT", "TL")] or ["TL"]
    gains = [found[model]["gain"] for model in others]
    return "TGT" if all(one["low"] is not None and one["low"] <= 0 for one in gains) else None


def held(found: dict[str, Evidence], model: str, limits: Publish) -> list[tuple[str, str]]:
    """Every limit that the recipe sets: ("met", "missed" or "not resolved", a sentence)."""
    own, states = found.get(model, {"attacks": {}}), []
    if limits.price is not None:
        figure = {"value": 0.0, "low": 0.0, "high": 0.0} if model == "TL" else own.get("price")
        state, why = _state(figure, limits.price, own.get("images"))
        if model == "TGT" and state == "not resolved":  # no disposal is paid for: only what is shown counts
            state, why = "met", "not shown to be more: met"
        states.append((state, f"price of {model}, at most {limits.price:g}: {points(figure)}: {why}."))
    if limits.recovered is None:
        return states
    if model in NEVER_SAW_THE_SOURCE:
        return [*states, ("met", f"from {model}, which never saw the source, nothing can be recovered: met.")]
    leaks = _leaks(found)
    for name in dict.fromkeys([*leaks, *_leaks(found, model)]):
        one = own["attacks"].get(name, {})
        state, why = _state(one.get("recovered"), limits.recovered, one.get("images"))
        states.append((state, f"from {model} on {name}, at most {limits.recovered:.0%}: {shared(one)}: {why}."))
    if not leaks:
        why = f"no attack gets more from TL than from scratch, so none tells of {model}: not resolved."
        states.append(("not resolved", why))
    return states


def _state(figure: Figure | None, limit: float, images: int | None) -> tuple[str, str]:
    """Whether the whole interval is within a limit, or beyond it; in one word, and in words."""
    if figure is None or figure["low"] is None or figure["high"] is None:
        return "not resolved", "not resolved"
    if figure["high"] <= limit:
        return "met", "met"
    if figure["low"] > limit:
        return "missed", "missed"
    return "not resolved", f"not resolved on {counted(images, 'image')}" if images else "not resolved"


def _caveats(document: dict[str, Any]) -> list[str]:
    """What makes a verdict mean less: one seed, weak attackers, models that nobody attacked, results left out."""
    found, caveats = document["evidence"], []
    attacks = [attack for one in found.values() for attack in one["attacks"].items()]
    if len(document["seeds"]) == 1:
        caveats.append("One seed: the intervals are those of the test images; another seed may end elsewhere.")
    if weak := dict.fromkeys(name for name, one in attacks if not one["tuned"]):
        weakly = f"Attacked with one setting only, none tuned: {', '.join(weak)}."
        caveats.append(f"{weakly} Stronger attackers may get more.")
    table = document.get("recipe", {}).get("piggyback", {})
    steps = [one["steps"] for one in (table, *table.get("attackers", ())) if one.get("steps")]
    curves = [curve for row in document.get("rows", ()) for curve in row.get("curves", {}).values() if curve]
    if (steps := [*steps, *(curve[-1][0] for curve in curves)]) and min(steps) < ENOUGH:
        caveats.append(f"Attackers had as few as {counted(min(steps), 'step')}: with more they may get more.")
    names = dict.fromkeys(name for name, _ in attacks)
    saw = [model for model, one in found.items() if model not in NEVER_SAW_THE_SOURCE and "acc_t" in one]
    lacks = {model: [name for name in names if name not in found[model]["attacks"]] for model in saw}
    if never := [f"{model} on {', '.join(some)}" for model, some in lacks.items() if some]:
        attacked = "Never attacked" if len(document["seeds"]) == 1 else "Not attacked with every seed"
        caveats.append(f"{attacked}, so nothing is known of what they give away: {'; '.join(never)}.")
    if older := ", ".join(document["older"]):
        caveats.append(
            f"Left out, as older than the recipe or the model that it is about: {older}. dtlctl run RECIPE renews it."
        )
    return caveats
