"""Tables and figures over the points of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dtlctl import checkpoint, figures, page, report
from dtlctl.errors import CheckpointError
from dtlctl.experiment import Experiment
from dtlctl.sweep import Point


def summarise(done: Sequence[tuple[Point, Experiment]]) -> dict[str, Any]:
    """{"over": {key: [values]}, "points": [{"values": {key: value}, "table": ...}]}; seeds are averaged in a point."""
    groups: dict[str, list[tuple[Point, Experiment]]] = {}
    for point, lab in done:
        values = {key: value for key, value in point.values.items() if key != "seed"}
        groups.setdefault(checkpoint.key(values), []).append((point, lab))
    found = [
        {
            "values": {key: value for key, value in group[0][0].values.items() if key != "seed"},
            "table": report.summarise([lab.folder for _, lab in group]),
        }
        for group in groups.values()
    ]
    keys = done[0][0].values
    over = {key: list(dict.fromkeys(str(point.values[key]) for point, _ in done)) for key in keys}
    return {"over": over, "points": found}


def write(document: dict[str, Any], folder: Path, command: str, name: str) -> None:
    """Write table.json, table.md, figures and report.html; a sweep over seeds alone is the report of these runs."""
    if len(document["points"]) == 1:
        report.write(document["points"][0]["table"], folder, command)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(report.dump(document), encoding="utf-8")
        (folder / "table.md").write_text(markdown(document), encoding="utf-8")
        drawn = figures.save(draw(document), folder)
        parts = [
            f"<h1>{escape(name)}: {escape(', '.join(document['over']))}</h1>",
            f"<h2>Who attacks</h2><p>{page.THREAT}</p>",
            "<h2>Figures</h2>",
            page.figures(drawn, command),
            *page.tables(markdown(document), command),
        ]
        (folder / "report.html").write_text(page.document(name, parts), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written: {error.strerror}") from None


def markdown(document: dict[str, Any]) -> str:
    """One row a point and model; what no swept key changes is shown once."""
    if len(document["points"]) == 1:
        return report.markdown(document["points"][0]["table"])
    found, keys = document["points"], list(document["points"][0]["values"])
    sets = list(dict.fromkeys(s for point in found for row in point["table"]["rows"] for s in row["piggyback"]))
    tuned = any("piggyback_worst" in row for point in found for row in point["table"]["rows"])
    columns = ["Model", *keys, "Acc_s", "Acc_t", *(f"PL {s}" for s in sets)]
    columns += [f"PL {s} tuned" for s in sets] if tuned else []
    fixed, lines = set(_fixed(found)), []
    for number, point in enumerate(found):
        for row in point["table"]["rows"]:
            if row["model"] in fixed and number:
                continue
            values = ["–" if row["model"] in fixed else str(value) for value in point["values"].values()]
            line = [row["model"], *values, report.number(row, "acc_s"), report.number(row, "acc_t")]
            kinds = ("piggyback", "piggyback_worst") if tuned else ("piggyback",)
            lines.append(line + [report.attacked_number(row, s, kind) for kind in kinds for s in sets])
    lines.sort(key=lambda line: line[0] not in fixed)
    seeds = found[0]["table"]["seeds"]
    note = f"Mean over seeds {', '.join(map(str, seeds))} ± half width of the 95 % interval."
    intro = f"Accuracies in %. {note}" if len(seeds) > 1 else f"Accuracies in %, seed {seeds[0]}."
    return f"{intro}\n\n{report.grid(columns, lines)}\n"


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
    if any(key.endswith(".lambda") for key in keys):
        for name in sets:
            curves = {
                variant: points
                for variant in found[0]["table"]["recipe"]["dispose"]
                if len(points := _along_lambda(found, rows, variant, name)) > 1
            }
            fixed = [m for m in ("TGT", "TL", *found[0]["table"]["recipe"]["dispose"]) if m not in curves]
            stars = {m: _place(rows[0][m], name) for m in fixed if m in rows[0] and _place(rows[0][m], name)}
            if curves:
                drawn[f"curve-{name}"] = figures.of_curves(name, curves, stars)
    elif len(keys) == 1 and all(isinstance(point["values"][keys[0]], (int, float)) for point in found):
        lines = {
            name: {
                model: [
                    [point["values"][keys[0]], row[model]["piggyback"][name]]
                    for point, row in zip(found, rows, strict=True)
                    if name in row.get(model, {}).get("piggyback", {})
                ]
                for model in rows[0]
            }
            for name in sets
        }
        drawn |= figures.of_sweep(keys[0], lines, rows[0])
    return drawn


def _along_lambda(found: list[dict[str, Any]], rows: list[dict[str, Any]], variant: str, name: str) -> list[Any]:
    """[PL, Acc_t] of a variant by rising λ."""
    places = {
        point["table"]["recipe"]["dispose"][variant]["lambda"]: _place(row[variant], name)
        for point, row in zip(found, rows, strict=True)
        if variant in row and _place(row[variant], name)
    }
    return [places[value] for value in sorted(places)]


def _place(row: dict[str, Any], name: str) -> list[float]:
    return [row["piggyback"][name], row["acc_t"]] if name in row["piggyback"] and "acc_t" in row else []
