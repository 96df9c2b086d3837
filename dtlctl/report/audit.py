"""Membership inference in the form of the paper's Table 2, with log-log ROC curves; from sidecars and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dtlctl.attacks.membership import RATES
from dtlctl.report.figures import INK
from dtlctl.report.results import belonging, recipe_of
from dtlctl.report.tables import grid

Audits = dict[str, dict[str, Any]]
"""The metrics of every audited model, by name, in the order of the recipe."""
UNRESOLVED = "not to be resolved by"


def read(run: Path) -> Audits:
    """The audits that belong to the run's recipe, as the rows of its table do.

    Raises CheckpointError where there is no recipe, and for a file there that is no sidecar.
    """
    return {
        job.model: sidecar["metrics"]
        for job, sidecar in belonging(run, recipe_of(run))
        if job.stage == "audit" and "blind" in sidecar["metrics"]
    }


def read_all(runs: Sequence[Path]) -> list[tuple[str, Audits]]:
    """The name and the audits of those runs that have any. Two runs in different places may have one name."""
    return [(run.name, audits) for run in runs if (audits := read(run))]


def tables_of_all(found: Sequence[tuple[str, Audits]]) -> list[str]:
    """Markdown parts: the tables of every run, under its name where there are several."""
    return [part for name, audits in found for part in ([f"## {name}"] if len(found) > 1 else []) + tables(audits)]


def figures(found: Sequence[tuple[str, Audits]], colours: Mapping[str, str]) -> dict[str, Any]:
    """The ROC curves of the first run, by the figure's name; nothing where there was no audit. colours: by model."""
    curves = chart(found[0][1], colours) if found else None
    return {"roc": curves} if curves else {}


def tables(audits: Audits) -> list[str]:
    """Markdown: balanced accuracy (Table 2), AUC, and TPR at low FPR in both modes, then the readouts."""
    parts = []
    for mode, title in (("as-is", "Source head as it is"), ("reprobe", "Source head fitted anew on the features")):
        names = list(dict.fromkeys(name for metrics in audits.values() for name in _results(metrics, mode)))
        if not names:
            continue
        rates = [f"TPR at {rate:.1%} FPR".replace(".0", "") for rate in RATES]
        for what, show in (
            ("balanced accuracy in %, mean ± deviation over repeats", _accuracy),
            ("AUC [95 % interval]", _auc),
            *((f"{text} in % [95 % interval]", _tpr(rate)) for text, rate in zip(rates, RATES, strict=True)),
        ):
            cells = [[show(_results(m, mode).get(name)) for name in names] for m in audits.values()]
            shown = {cell for row in cells for cell in row} - {"–"}
            if len(shown) == 1 and UNRESOLVED in (only := shown.pop()):
                parts.append(f"{title}: {what}: {only}.")
                continue
            lines = [[model, *row] for model, row in zip(audits, cells, strict=True)]
            parts += [f"{title}: {what}.", grid(["Model", *names], lines)]
    lines = [[model, f"{m['blind']['auc']:.3f}", m["source_head"], *_readouts(m)] for model, m in audits.items()]
    columns = ["Model", "AUC without the model", "Source head", "Entropy / log K", "Steps to relearn"]
    return [*parts, "Control and readouts.", grid(columns, lines)]


def chart(audits: Audits, colours: Mapping[str, str]) -> Any:
    """ROC curves on logarithmic axes, one panel a mode and attack, one line a model; None where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in ("as-is", "reprobe") if any(_results(m, mode) for m in audits.values())]
    names = list(dict.fromkeys(n for mode in modes for m in audits.values() for n in _results(m, mode)))
    if not names:
        return None
    size = (2.3 * len(names), 2.3 * len(modes) + 0.5)
    figure, panels = plt.subplots(len(modes), len(names), figsize=size, layout="constrained", squeeze=False)
    for mode, row in zip(modes, panels, strict=True):
        for name, axes in zip(names, row, strict=True):
            for model, metrics in audits.items():
                if roc := _results(metrics, mode).get(name, {}).get("roc"):
                    # A rate of 0 has no place on a logarithmic axis.
                    rates = [value or None for value in roc["tpr"]]
                    axes.loglog(roc["fpr"], rates, label=model, linewidth=1, color=colours[model])
            axes.plot([1e-4, 1], [1e-4, 1], color="grey", linestyle=":", linewidth=0.8)
            axes.set(xlim=(1e-3, 1), ylim=(1e-3, 1.1), facecolor="none")
            axes.set_title(f"{name}, {mode}", fontsize=8, color=INK)
            axes.tick_params(labelsize=6, colors=INK, which="both")
            axes.spines[:].set_color(INK)
    panels[-1][0].set_xlabel("false positive rate", fontsize=7, color=INK)
    panels[-1][0].set_ylabel("true positive rate", fontsize=7, color=INK)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, loc="outside lower center", ncols=8, frameon=False, labelcolor=INK)
    return figure


def _results(metrics: dict[str, Any], mode: str) -> dict[str, Any]:
    held = metrics if mode == "as-is" else metrics.get("reprobe", {})
    return {n: v for n, v in held.items() if isinstance(v, dict) and "balanced_accuracy_std" in v and n != "blind"}


def _accuracy(numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return "–"
    return f"{100 * numbers['balanced_accuracy']:.1f} ± {100 * numbers['balanced_accuracy_std']:.1f}"


def _auc(numbers: dict[str, Any] | None) -> str:
    return "–" if numbers is None else f"{numbers['auc']:.3f} [{numbers['auc_low']:.3f}, {numbers['auc_high']:.3f}]"


def _tpr(rate: float):
    def show(numbers: dict[str, Any] | None) -> str:
        if numbers is None:
            return "–"
        if (point := numbers[f"tpr_at_{rate:g}"]) is None:
            return f"{UNRESOLVED} fewer than {round(1 / rate)} non-members"
        return f"{100 * point['tpr']:.1f} [{100 * point['low']:.1f}, {100 * point['high']:.1f}]"

    return show


def _readouts(metrics: dict[str, Any]) -> list[str]:
    entropy, relearning = metrics.get("entropy_readout"), metrics.get("relearning")
    steps = "–"
    if relearning:
        steps = f"> {relearning['budget']}" if relearning["steps"] is None else str(relearning["steps"])
    return [f"{entropy['share_of_log_k']:.2f}" if entropy else "–", steps]
