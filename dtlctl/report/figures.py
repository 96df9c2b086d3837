"""Figures, drawn small enough to be read on a telephone, each as PNG and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# One colour for every model, told apart by the colour-blind too (Okabe and Ito, then Tol), on light and on dark.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#b8a500", "#8c8c8c", "#9467bd", "#17a589",
           "#882255", "#332288", "#999933", "#aa4499")  # fmt: skip
INK = "#010203"
"""Nearly black, and in a page the text's own colour: there it becomes `currentColor`."""
NAMES = ("piggyback", "roc", "tradeoff-*", "steps-*", "sweep-*", "curve-*")
"""Of all figures of a report."""


def of_table(table: dict[str, Any]) -> dict[str, Any]:
    """Figures by file name, of one report: Fig. 2, the trade-off of Fig. 6, and the attack's steps."""
    rows = [row for row in table["rows"] if row["piggyback"]]
    sets = list(dict.fromkeys(name for row in rows for name in row["piggyback"]))
    colours = colours_of(row["model"] for row in table["rows"])
    found: dict[str, Any] = {}
    if rows:
        found["piggyback"] = _bars(rows, sets, colours)
    for name in sets:
        kept = [row for row in rows if "acc_t" in row and name in row["piggyback"]]
        if len(kept) > 1:
            found[f"tradeoff-{name}"] = _tradeoff(kept, name, colours)
        curves = {row["model"]: row.get("curves", {}).get(name, []) for row in rows}
        if any(len(curve) > 1 for curve in curves.values()):
            found[f"steps-{name}"] = _lines(
                curves, colours, "steps of the attack", "Acc_pl (%)", f"{name}: steps to recover"
            )
    return found


def of_sweep(key: str, curves: dict[str, dict[str, list[list[float]]]], models: Iterable[str]) -> dict[str, Any]:
    """Fig. 5: Acc_pl over a swept number. curves: {dataset: {model: [[value, %], ...]}}."""
    colours = colours_of(models)
    return {
        f"sweep-{name}": _lines(lines, colours, key, "Acc_pl (%)", f"{name} over {key}", log=True)
        for name, lines in curves.items()
    }


def of_curves(name: str, curves: dict[str, list[list[float]]], reference: dict[str, list[float]]) -> Any:
    """Fig. 6: target accuracy over Acc_pl along λ, one line a variant; references are single points [PL, Acc_t]."""
    colours = colours_of([*curves, *reference])
    figure, axes = _axes()
    for model, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", color=colours[model], label=model, markersize=4, linewidth=1.2)
    for model, (x, y) in reference.items():
        axes.plot(x, y, "*", color=colours[model], label=model, markersize=10)
    return _finished(figure, axes, f"Acc_pl {name} (%)", "Acc_t (%)", "Upper left is better")


def quoted(row: dict[str, Any], name: str) -> str:
    """Which accuracy of a table's row to hold against it: the tuned attacker's, where there is one."""
    return "piggyback_worst" if name in row.get("piggyback_worst", {}) else "piggyback"


def save(figures: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write NAME.png and NAME.svg of every figure; return each one's SVG for a page. Closes the figures.

    Figures of an earlier report in this folder that are not drawn again are removed: nothing vouches for them now.
    """
    import matplotlib.pyplot as plt

    earlier = {path for name in NAMES for form in ("svg", "png") for path in folder.glob(f"{name}.{form}")}
    for path in earlier - {folder / f"{name}.{form}" for name in figures for form in ("svg", "png")}:
        path.unlink()
    drawn = {}
    for name, figure in figures.items():
        with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        svg = buffer.getvalue()
        drawn[name] = _for_page(svg)
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
        plt.close(figure)
    return drawn


def _for_page(svg: str) -> str:
    """An SVG to stand in HTML: no prolog, the text's own colour, as wide as there is room."""
    svg = re.sub(
        r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].replace(INK, "currentColor"), flags=re.DOTALL
    )
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)


def colours_of(models: Iterable[str]) -> dict[str, str]:
    """One for every model, by its place."""
    return {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(dict.fromkeys(models))}


def _axes(height: float = 3.2) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, height), layout="constrained")
    return figure, axes


def _finished(figure: Any, axes: Any, x: str, y: str, title: str) -> Any:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_facecolor("none")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=8, ncols=4, loc="outside lower center", frameon=False, labelcolor=INK)
    return figure


def _bars(rows: list[dict[str, Any]], sets: list[str], colours: dict[str, str]) -> Any:
    """Acc_pl by dataset and model; a diamond is the tuned attacker's."""
    figure, axes = _axes(0.9 + 0.26 * len(rows) * len(sets))
    place, ticks, labels = 0.0, [], []
    for name in sets:
        for row in (row for row in rows if name in row["piggyback"]):
            value, half = row["piggyback"][name], row.get("piggyback_ci", {}).get(name)
            axes.barh(place, value, 0.75, color=colours[row["model"]], xerr=half, ecolor="#888888", capsize=2)
            end = value + (half or 0)
            if name in row.get("piggyback_worst", {}):
                tuned = row["piggyback_worst"][name]
                axes.plot(tuned, place, "D", color=INK, markersize=4)
                end = max(end, tuned)
            axes.text(end + 1.5, place, f"{value:.0f}", va="center", fontsize=8, color=INK)
            ticks.append(place)
            labels.append(row["model"] if len(sets) == 1 else f"{row['model']} · {name}")
            place += 1
        place += 0.6
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    tuned = any("piggyback_worst" in row for row in rows)
    title = "What an attacker gets out (lower is better)" + ("\n◆ tuned attacker" if tuned else "")
    return _finished(figure, axes, "Acc_pl (%)", "", title)


def _tradeoff(rows: list[dict[str, Any]], name: str, colours: dict[str, str]) -> Any:
    """Acc_t over Acc_pl, worst attacker where there is one: upper left is better."""
    figure, axes = _axes()
    for row in rows:
        kind = quoted(row, name)
        x, y = row[kind][name], row["acc_t"]
        axes.errorbar(
            x, y, xerr=row.get(f"{kind}_ci", {}).get(name), yerr=row.get("acc_t_ci"), fmt="o", capsize=2,
            color=colours[row["model"]], label=row["model"], elinewidth=0.7,
        )  # fmt: skip
    return _finished(figure, axes, f"Acc_pl {name} (%)", "Acc_t (%)", f"{name}: upper left is better")


def _lines(
    curves: dict[str, list[list[float]]], colours: dict[str, str], x: str, y: str, title: str, *, log: bool = False
) -> Any:
    figure, axes = _axes()
    for model, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colours[model], label=model, markersize=3, linewidth=1.2)
    if log and all(point[0] > 0 for points in curves.values() for point in points):
        axes.set_xscale("log")
        measured = sorted({point[0] for points in curves.values() for point in points})
        axes.set_xticks(measured, [f"{value:g}" for value in measured])
        axes.minorticks_off()
    return _finished(figure, axes, x, y, title)
