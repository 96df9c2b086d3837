"""Figures, drawn small enough to be read on a telephone, each as PNG and SVG."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dtlctl.report.results import Row
from dtlctl.report.tables import chosen_on, piggyback_sets

# One colour for every model, told apart by the colour-blind too (Okabe and Ito, then Tol), on light and on dark.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#b8a500", "#8c8c8c", "#9467bd", "#17a589",
           "#882255", "#332288", "#999933", "#aa4499")  # fmt: skip
INK = "#010203"
"""Nearly black, and in a page the text's own colour: there it becomes `currentColor`."""
NAMES = ("piggyback", "roc", "tradeoff-*", "steps-*", "sweep-*", "curve-*", "strength-*")
"""Of all figures of a report."""
WHO = {"piggyback": "the one setting", "piggyback_worst": "the tuned attacker"}
"""Whose accuracy a figure shows, by the row's key."""

STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"font.size": 9.6, **dict.fromkeys(("axes.titlesize", "axes.labelsize"), "medium")},
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), "small"),
    **{"axes.facecolor": "none", "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
    **{"figure.constrained_layout.use": True, "svg.fonttype": "none"},
}
"""Matplotlib's settings while a figure is drawn and saved."""

KEPT = "kept on the target: Acc_t (%)"
ALONG = {
    "steps": ("curves", "steps of the attack", "Acc_pl (%)", "steps to recover",
              "How fast the attacker of the one setting gets there."),
    "strength": ("strength", "trials", "best on images that choose (%)", "strength against budget",
                 "What more trials get the attacker: where it still rises, more would."),
}  # fmt: skip
"""By name the figures of a curve: its key in a row, both axes, the title, the caption."""
Drawing = tuple[Figure, str]
"""A figure and its caption."""
Curves = dict[str, list[list[float]]]
"""Points [x, y] by model, or [x, y, low and high end of x, and of y]."""


def of_table(table: dict[str, Any]) -> dict[str, Drawing]:
    """Figures by file name, of one report: Fig. 2, the trade-off of Fig. 6, the attack's steps, and its trials."""
    rows = [row for row in table["rows"] if row["piggyback"]]
    sets = piggyback_sets(rows)
    colours = colours_of(row["model"] for row in table["rows"])
    found = {"piggyback": _bars(rows, sets, colours, chosen_on(table["recipe"]))} if rows else {}
    for name in sets:
        points, who = {}, WHO["piggyback"]
        for model, own in [(m, o) for m, o in table["evidence"].items() if "acc_t" in o and name in o["attacks"]]:
            both = own["attacks"][name]["accuracy"], own["accuracy"]
            known = all(one["low"] is not None for one in both)
            ends = [one[end] for one in both for end in ("low", "high")] if known else []
            points[model] = [[*(one["value"] for one in both), *ends]]
            who = "the strongest attacker" if own["attacks"][name]["tuned"] else who
        if len(points) > 1:
            caption = f"What the owner keeps over what {who} gets, as in Fig. 6 of the paper"
            caption += "; lines: 95 % intervals." if any(len(place) > 2 for (place,) in points.values()) else "."
            look = (f"Acc_pl {name} of {who} (%)", KEPT, f"{name}: upper left is better")
            found[f"tradeoff-{name}"] = _lines(points, colours, *look), caption
        for kind, (of, x, y, title, caption) in ALONG.items():
            curves = {row["model"]: row.get(of, {}).get(name, []) for row in rows}
            if any(len(curve) > 1 for curve in curves.values()):
                figure = _lines(curves, colours, x, y, f"{name}: {title}", log=of == "strength")
                found[f"{kind}-{name}"] = figure, caption
    return found


def of_sweep(key: str, name: str, kind: str, curves: Curves) -> Drawing:
    """Fig. 5: one kind of Acc_pl on a dataset over a swept number, [value, %], by model."""
    figure = _lines(curves, colours_of(curves), key, f"Acc_pl of {WHO[kind]} (%)", f"{name} over {key}", log=True)
    return figure, f"Piggyback accuracy of {WHO[kind]} over the swept key, as in Fig. 5 of the paper."


def of_curves(name: str, kind: str, curves: Curves, stars: dict[str, list[float]]) -> Drawing:
    """Fig. 6: Acc_t over one kind of Acc_pl along λ, [PL, Acc_t], one line a variant; a star is a single model."""
    look = (f"Acc_pl {name} of {WHO[kind]} (%)", KEPT, "Upper left is better")
    figure = _lines(curves, colours_of([*curves, *stars]), *look, stars=stars)
    return figure, f"Target accuracy over piggyback accuracy ({WHO[kind]}) along λ, as in Fig. 6 of the paper."


def save(figures: dict[str, Drawing], folder: Path) -> list[dict[str, str]]:
    """Write NAME.png and NAME.svg of every figure; returns what a page shows."""
    drawn = []
    for name, (figure, caption) in figures.items():
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, transparent=True)
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        # In a page: no prolog, the text's own colour, as wide as there is room for letters to be read.
        width, svg = 72 * figure.get_figwidth(), (folder / f"{name}.svg").read_text(encoding="utf-8")
        least = f"; min-width: {width:.0f}px" if width > 400 else ""
        head = rf'<svg viewBox="\1" role="img" style="max-width: {2 * width:.0f}px{least}">'
        svg = re.sub(r'^.*?<svg [^>]*?viewBox="([^"]+)".*?</metadata>', head, svg, count=1, flags=re.DOTALL)
        drawn.append({"kind": name.partition("-")[0], "svg": svg.replace(INK, "currentColor"), "caption": caption})
    return drawn


def colours_of(models: Iterable[str]) -> dict[str, str]:
    return {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(dict.fromkeys(models))}


@matplotlib.rc_context(STYLE)
def _bars(rows: Sequence[Row], sets: list[str], colours: dict[str, str], chosen: str) -> Drawing:
    """Acc_pl by dataset and model; a diamond is the tuned attacker's. To the right, the numbers of both, by column."""
    figure = Figure(figsize=(4.6, 1.1 + 0.26 * (len(rows) * len(sets) + 1)))
    axes = figure.subplots()
    both = [(n, name, row) for n, name in enumerate(sets) for row in rows if name in row["piggyback"]]
    bars = [(row, name, place + 0.6 * n) for place, (n, name, row) in enumerate(both)]
    tuned = any(row.get("piggyback_worst") for row in rows)
    columns = {"bar": "piggyback", **({"◆": "piggyback_worst"} if tuned else {})}
    for row, name, place in bars:
        value, half = row["piggyback"][name], row.get("piggyback_ci", {}).get(name)
        axes.barh(place, value, 0.75, color=colours[row["model"]], xerr=half, ecolor="#888888", capsize=2)
        if name in row.get("piggyback_worst", {}):
            axes.plot(row["piggyback_worst"][name], place, "D", color=INK, markersize=4)
    for x, (head, kind) in zip((116, 130), columns.items(), strict=False):
        shown = [(f"{row[kind][name]:.0f}", place) for row, name, place in bars if name in row.get(kind, {})]
        for text, place in [(head, -0.8), *shown]:
            axes.text(x, place, text, va="center", ha="right", fontsize=8)
    labels = [row["model"] if len(sets) == 1 else f"{row['model']} · {name}" for row, name, _ in bars]
    axes.set_yticks([place for *_, place in bars], labels)
    axes.set_xticks(range(0, 101, 20))
    caption = "Piggyback accuracy by dataset, as in Fig. 2 of the paper. Bars: the one setting"
    caption += f"; diamonds: the attacker tuned on {chosen}" if tuned else ""
    caption += "; lines: 95 % interval of the one setting over seeds" if "piggyback_ci" in rows[0] else ""
    title = "What an attacker gets out (lower is better)" + "\nbar: one setting, ◆: tuned attacker" * tuned
    axes.set(xlabel="Acc_pl (%)", title=title, xlim=(0, 103 + 14 * len(columns)), ylim=(bars[-1][-1] + 0.6, -1.2))
    return figure, f"{caption}."


@matplotlib.rc_context(STYLE)
def _lines(
    curves: Curves, colours: dict[str, str], x: str, y: str, title: str, *,
    stars: dict[str, list[float]] | None = None, log: bool = False,
) -> Figure:  # fmt: skip
    """A line, or a dot, for every model, with error bars if its points have intervals; a star is a single point."""
    figure = Figure(figsize=(4.6, 3.2))
    axes = figure.subplots()
    look: dict[str, Any] = {"fmt": "o-", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.7, "capsize": 2}
    for model, points in curves.items():
        if points:
            line = np.array(points).T
            errors = np.abs(line[2:].reshape(2, -1, len(points)) - line[:2, None]) if len(line) > 2 else (None, None)
            axes.errorbar(*line[:2], *reversed(errors), color=colours[model], label=model, **look)
    for model, point in (stars or {}).items():
        axes.plot(*point, "*", color=colours[model], label=model, markersize=10)
    measured = sorted({point[0] for points in curves.values() for point in points})
    if log and measured and measured[0] > 0:
        axes.set_xscale("log")
        axes.set_xticks(measured, [f"{value:g}" for value in measured])
        axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y, title=title)
    figure.legend(ncols=4, loc="outside lower center")
    return figure
