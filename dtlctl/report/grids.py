"""Tables and figures over the points of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtlctl.recipe.overrides import names_in
from dtlctl.report import figures, files, tables
from dtlctl.report.figures import Curves, Drawing
from dtlctl.report.results import Row
from dtlctl.report.summary import summarise as summary_of
from dtlctl.report.tables import Table
from dtlctl.report.templates import said
from dtlctl.storage import checkpoint

Point = dict[str, Any]
"""{"values": {swept key: value}, "table": a document of `summary.summarise`}."""

ALONG_A_CURVE = (".lambda", ".odds", ".price")
"""Ends of the swept keys whose values are points of one curve."""


def summarise(done: Sequence[tuple[Mapping[str, Any], Path]]) -> dict[str, Any]:
    """{"over": {key: [values]}, "points": [...]}, over a point's seeds; done: swept values and folder of every run."""
    groups: dict[str, tuple[dict[str, Any], list[Path]]] = {}
    for swept, folder in done:
        values = {key: value for key, value in swept.items() if key != "seed"}
        groups.setdefault(checkpoint.key(values), (values, []))[1].append(folder)
    over = {key: list(dict.fromkeys(str(values[key]) for values, _ in done)) for key in done[0][0]}
    points = [{"values": values, "table": summary_of(folders)} for values, folders in groups.values()]
    return {"over": over, "points": points}


def write(document: dict[str, Any], folder: Path, command: str, name: str, runs: Sequence[Path]) -> None:
    """Write table.json, table.md, figures and report.html; a sweep over seeds alone is the report of these runs."""
    found = document["points"]
    if len(found) == 1:
        files.write(found[0]["table"], folder, command, runs)
        return
    page = {
        "title": f"{name}: {', '.join(document['over'])}",
        "subtitle": "",
        "tables": [_table(found)],
        "caveats": _caveats(found),
        "attackers": list(dict.fromkeys(said("who", point["table"]["recipe"]["piggyback"]) for point in found)),
    }
    files.publish(document, folder, command, page, draw(document))


def markdown(document: dict[str, Any]) -> str:
    found = document["points"]
    if len(found) == 1:
        return tables.markdown(found[0]["table"])
    return tables.render([_table(found)], _caveats(found))


def _table(found: Sequence[Point]) -> Table:
    """One row a point and model; what no swept key of its own changes is shown once."""
    (first, *others), places = _by_model(found), [(point, row) for point in found for row in point["table"]["rows"]]
    fixed = {model for model, row in first.items() if all(other.get(model) == row for other in others)}
    tuned = any("piggyback_worst" in row for _, row in places)
    kinds = ["piggyback", *["piggyback_worst"] * tuned]
    (model_column, *columns), lines = tables.accuracies([row for _, row in places], kinds)
    shown: dict[Sequence[str], bool] = {}  # a model whose own λ is the same at two points was made once
    for (point, _), (model, *cells) in zip(places, lines, strict=True):
        dispose, values = point["table"]["recipe"]["dispose"], []
        for key, value in point["values"].items():
            # Of a factor of the odds of λ, the λ that it came to is shown.
            own = dispose.get(model, {}).get("lambda") or "–" if key.endswith(".odds") else value
            values.append(str(own) if model not in fixed and _is_of(key, model, dispose) else "–")
        shown[(model, *values, *cells)] = model not in fixed
    note = tables.accuracies_note(found[0]["table"]["seeds"])
    if tuned:
        chosen = dict.fromkeys(tables.chosen_on(point["table"]["recipe"]) for point in found)
        note += f" Tuned: by the attacker who is best on {' or '.join(chosen)}."
    odds = {key: f"λ {names_in(key)[1]}".removesuffix(" *") for key in found[0]["values"] if key.endswith(".odds")}
    heads = [model_column, *(odds.get(key, key) for key in found[0]["values"]), *columns]
    return Table(note, heads, sorted(shown, key=lambda line: shown[line]), "Accuracies at every point")


def _caveats(found: Sequence[Point]) -> list[str]:
    """The caveats of the points' tables and their verdicts' first sentences, each once, with the points it is of."""
    places: dict[str, list[str]] = {}
    for point in found:
        place = ", ".join(f"{key} = {value}" for key, value in point["values"].items())
        for sentence in (*point["table"]["caveats"], *point["table"]["verdict"]["sentences"][:1]):
            places.setdefault(sentence, []).append(place)
    return [text if len(at) == len(found) else f"At {'; '.join(at)}: {text}" for text, at in places.items()]


def _is_of(key: str, model: str, dispose: dict[str, Any]) -> bool:
    """Whether a swept key is of the model's own table of [dispose], or outside of it; `*` is who unlearns something."""
    names = names_in(key)
    unlearns = model in dispose and dispose[model]["unlearn"]["kind"] != "none"
    return names[0] != "dispose" or names[1:2] in ([], [model]) or (names[1] == "*" and unlearns)


def _by_model(found: Sequence[Point]) -> list[dict[str, Row]]:
    return [{row["model"]: row for row in point["table"]["rows"]} for point in found]


def draw(document: dict[str, Any]) -> dict[str, Drawing]:
    """Fig. 6 for variants that were made at several λ; Fig. 5 for one swept number of another kind."""
    found, rows = document["points"], _by_model(document["points"])
    keys, drawn = list(found[0]["values"]), {}
    for name in tables.piggyback_sets(row for one in rows for row in one.values()):
        attacked = [row for one in rows for row in one.values() if name in row["piggyback"]]
        tuned = all(name in row.get("piggyback_worst", {}) for row in attacked)
        kind = "piggyback_worst" if tuned else "piggyback"
        if any(key.endswith(ALONG_A_CURVE) for key in keys):
            if curves := _along_lambda(found, rows, name, kind):
                on_curves = {label.partition(" ")[0] for label in curves}
                single = [m for m in ("TGT", "TL", *found[0]["table"]["recipe"]["dispose"]) if m not in on_curves]
                stars = {m: place for m in single if (place := _place(rows[0].get(m, {}), name, kind))}
                drawn[f"curve-{name}"] = figures.of_curves(name, kind, curves, stars)
        elif len(keys) == 1 and all(type(point["values"][keys[0]]) in (int, float) for point in found):
            if keys[0].startswith("data.piggyback.") and names_in(keys[0])[2] != name:
                continue
            at = [(point["values"][keys[0]], row) for point, row in zip(found, rows, strict=True)]
            lines = {
                model: [[x, row[model][kind][name]] for x, row in at if name in row.get(model, {}).get(kind, {})]
                for model in rows[0]
            }
            drawn[f"sweep-{name}"] = figures.of_sweep(keys[0], name, kind, lines)
    return drawn


def _along_lambda(found: Sequence[Point], rows: Sequence[dict[str, Row]], name: str, kind: str) -> Curves:
    """[PL, Acc_t] by rising λ: one curve for every variant and choice of the other swept keys."""
    places: dict[str, dict[float, list[float]]] = {}
    for point, row in zip(found, rows, strict=True):
        dispose = point["table"]["recipe"]["dispose"]
        swept = {key: str(value) for key, value in point["values"].items() if not key.endswith(ALONG_A_CURVE)}
        for variant, settings in dispose.items():
            others = [value for key, value in swept.items() if _is_of(key, variant, dispose)]
            if place := _place(row.get(variant, {}), name, kind):
                along = settings["price"] if settings["lambda"] is None else settings["lambda"]
                places.setdefault(" ".join([variant, *others]), {})[along] = place
    return {label: [at[lam] for lam in sorted(at)] for label, at in places.items() if len(at) > 1}


def _place(row: Row, name: str, kind: str) -> list[float]:
    """[PL, Acc_t], or nothing where one of them was not measured."""
    return [row[kind][name], row["acc_t"]] if name in row.get(kind, {}) and "acc_t" in row else []
