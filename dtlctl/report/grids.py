"""Tables and figures over the points of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError
from dtlctl.many.sweep import Point
from dtlctl.recipe.loading import names_in
from dtlctl.report import figures, files, page, tables
from dtlctl.report.summary import summarise as summary_of
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint


def summarise(done: Sequence[tuple[Point, Experiment]]) -> dict[str, Any]:
    """{"over": {key: [values]}, "points": [{"values": {key: value}, "table": ...}]}; seeds are averaged in a point."""
    groups: dict[str, list[tuple[Point, Experiment]]] = {}
    for point, experiment in done:
        values = {key: value for key, value in point.values.items() if key != "seed"}
        groups.setdefault(checkpoint.key(values), []).append((point, experiment))
    found = [
        {
            "values": {key: value for key, value in group[0][0].values.items() if key != "seed"},
            "table": summary_of([experiment.folder for _, experiment in group]),
        }
        for group in groups.values()
    ]
    keys = done[0][0].values
    over = {key: list(dict.fromkeys(str(point.values[key]) for point, _ in done)) for key in keys}
    return {"over": over, "points": found}


def write(document: dict[str, Any], folder: Path, command: str, name: str, runs: Sequence[Path]) -> None:
    """Write table.json, table.md, figures and report.html; a sweep over seeds alone is the report of these runs."""
    if len(document["points"]) == 1:
        files.write(document["points"][0]["table"], folder, command, runs)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "audit.md").unlink(missing_ok=True)  # of a sweep over seeds alone: it is not this one's
        drawn = figures.save(draw(document), folder)
        parts = [
            f"<h1>{escape(name)}: {escape(', '.join(document['over']))}</h1>",
            f"<h2>Who attacks</h2><p>{page.THREAT}</p>",
            "<h2>Figures</h2>",
            page.figures(drawn, command),
            *page.tables(markdown(document), command),
        ]
        checkpoint.write(folder / "report.html", page.document(name, parts).encode())
        checkpoint.write(folder / "table.md", markdown(document).encode())
        checkpoint.write(folder / "table.json", files.dump(document).encode())
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written: {error.strerror}") from None


def markdown(document: dict[str, Any]) -> str:
    """One row a point and model; what no swept key of its own changes is shown once. Below, the caveats."""
    if len(document["points"]) == 1:
        return tables.markdown(document["points"][0]["table"])
    found, keys = document["points"], list(document["points"][0]["values"])
    sets = list(dict.fromkeys(s for point in found for row in point["table"]["rows"] for s in row["piggyback"]))
    tuned = any("piggyback_worst" in row for point in found for row in point["table"]["rows"])
    columns = ["Model", *map(_heading, keys), "Acc_s", "Acc_t", *(f"PL {s}" for s in sets)]
    columns += [f"PL {s} tuned" for s in sets] if tuned else []
    audited = any("audit_auc" in row for point in found for row in point["table"]["rows"])
    columns += ["MIA AUC"] * audited
    fixed, lines = set(_fixed(found)), []
    for number, point in enumerate(found):
        for row in point["table"]["rows"]:
            if row["model"] in fixed and number:
                continue
            values = ["–"] * len(keys) if row["model"] in fixed else _values(point, row["model"])
            line = [row["model"], *values, tables.number(row, "acc_s"), tables.number(row, "acc_t")]
            kinds = ("piggyback", "piggyback_worst") if tuned else ("piggyback",)
            line += [tables.attacked_number(row, s, kind) for kind in kinds for s in sets]
            line += [tables.number(row, "audit_auc", ".3f")] * audited
            if line not in lines:  # a model whose own λ is the same at two points was made once
                lines.append(line)
    lines.sort(key=lambda line: line[0] not in fixed)
    seeds = found[0]["table"]["seeds"]
    note = f"Mean over seeds {', '.join(map(str, seeds))} ± half width of the 95 % interval."
    intro = f"Accuracies in %. {note}" if len(seeds) > 1 else f"Accuracies in %, seed {seeds[0]}."
    return "\n\n".join([intro, tables.grid(columns, lines), *_caveats(found)]) + "\n"


def _caveats(found: list[dict[str, Any]]) -> list[str]:
    """The caveats of the points' tables, each once, with the points that it is of where these are not all."""
    places: dict[str, list[str]] = {}
    for point in found:
        place = ", ".join(f"{key} = {value}" for key, value in point["values"].items())
        for sentence in point["table"].get("caveats", []):
            places.setdefault(sentence, []).append(place)
    return [text if len(at) == len(found) else f"At {'; '.join(at)}: {text}" for text, at in places.items()]


def _is_odds(key: str) -> bool:
    return key.endswith(".odds")


def _along_a_curve(key: str) -> bool:
    return key.endswith(".lambda") or _is_odds(key)


def _heading(key: str) -> str:
    """Of a swept key's column: a factor of odds is shown as the λ that it came to."""
    if not _is_odds(key):
        return key
    return "λ" if (variant := names_in(key)[1]) == "*" else f"λ {variant}"


def _values(point: dict[str, Any], model: str) -> list[str]:
    """The values of the swept keys: of a variant's for that variant alone, and of a factor of its odds the λ."""
    dispose = point["table"]["recipe"]["dispose"]
    lam = str(dispose.get(model, {}).get("lambda", "–"))
    shown = {key: lam if _is_odds(key) else str(value) for key, value in point["values"].items()}
    return [shown[key] if _is_of(key, model, dispose) else "–" for key in shown]


def _is_of(key: str, model: str, dispose: dict[str, Any]) -> bool:
    """Whether a swept key is of the model's own table of [dispose], or outside of it; `*` is who unlearns something."""
    names = names_in(key)
    unlearns = model in dispose and dispose[model]["unlearn"]["kind"] != "none"
    return names[0] != "dispose" or names[1:2] in ([], [model]) or (names[1] == "*" and unlearns)


def _fixed(found: list[dict[str, Any]]) -> list[str]:
    """Models whose numbers are the same at every point."""
    rows = [{row["model"]: row for row in point["table"]["rows"]} for point in found]
    return [model for model, row in rows[0].items() if all(other.get(model) == row for other in rows)]


def draw(document: dict[str, Any]) -> dict[str, Any]:
    """Fig. 6 for variants that were made at several λ; Fig. 5 for one swept number of another kind."""
    found = document["points"]
    sets = list(dict.fromkeys(s for point in found for row in point["table"]["rows"] for s in row["piggyback"]))
    rows = [{row["model"]: row for row in point["table"]["rows"]} for point in found]
    drawn: dict[str, Any] = {}
    keys = list(found[0]["values"])
    if any(map(_along_a_curve, keys)):
        for name in sets:
            curves = _along_lambda(found, rows, name)
            drawn_through = {label.partition(" ")[0] for label in curves}
            fixed = [m for m in ("TGT", "TL", *found[0]["table"]["recipe"]["dispose"]) if m not in drawn_through]
            stars = {m: _place(rows[0][m], name) for m in fixed if m in rows[0] and _place(rows[0][m], name)}
            if curves:
                drawn[f"curve-{name}"] = figures.of_curves(name, curves, stars)
    elif len(keys) == 1 and all(isinstance(point["values"][keys[0]], (int, float)) for point in found):
        lines = {
            name: {
                model: [
                    [point["values"][keys[0]], row[model][figures.quoted(row[model], name)][name]]
                    for point, row in zip(found, rows, strict=True)
                    if name in row.get(model, {}).get("piggyback", {})
                ]
                for model in rows[0]
            }
            for name in sets
            if not keys[0].startswith("data.piggyback.") or names_in(keys[0])[2] == name
        }
        drawn |= figures.of_sweep(keys[0], lines, rows[0])
    return drawn


def _along_lambda(
    found: list[dict[str, Any]], rows: list[dict[str, dict[str, Any]]], name: str
) -> dict[str, list[list[float]]]:
    """[PL, Acc_t] by rising λ: one curve for every variant and choice of the other swept keys."""
    places: dict[str, dict[float, list[float]]] = {}
    for point, row in zip(found, rows, strict=True):
        dispose = point["table"]["recipe"]["dispose"]
        swept = {key: str(value) for key, value in point["values"].items() if not _along_a_curve(key)}
        for variant, settings in dispose.items():
            others = [value for key, value in swept.items() if _is_of(key, variant, dispose)]
            if variant in row and (place := _place(row[variant], name)):
                places.setdefault(" ".join([variant, *others]), {})[settings["lambda"]] = place
    return {label: [at[lam] for lam in sorted(at)] for label, at in places.items() if len(at) > 1}


def _place(row: dict[str, Any], name: str) -> list[float]:
    """[PL, Acc_t], or nothing where one of them was not measured."""
    return [row[figures.quoted(row, name)][name], row["acc_t"]] if name in row["piggyback"] and "acc_t" in row else []
