"""Membership inference in the form of the paper's Table 2, with log-log ROC curves; from sidecars and nothing else."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from dtlctl.attacks.membership import RATES
from dtlctl.report.figures import STYLE, Drawing
from dtlctl.report.results import Row, reading, recipe_of, results_of
from dtlctl.report.tables import Table

MODES = {
    "as-is": "Source head as it is",
    "reprobe": "Source head fitted anew on the features",
    "target": "Target head, and the target's own images",
}
UNRESOLVED = "not to be resolved by"


def _shown(numbers: Row) -> dict[str, str]:
    accuracy, deviation = (100 * numbers[f"balanced_accuracy{end}"] for end in ("", "_std"))
    shown = {
        "balanced accuracy in %, mean ± deviation over repeats": f"{accuracy:.1f} ± {deviation:.1f}",
        "AUC [95 % interval]": _auc(numbers),
    }
    for rate in RATES:
        found = f"{UNRESOLVED} fewer than {round(1 / rate)} non-members"
        if point := numbers[f"tpr_at_{rate:g}"]:
            found = f"{100 * point['tpr']:.1f} [{100 * point['low']:.1f}, {100 * point['high']:.1f}]"
        shown[f"TPR at {100 * rate:g}% FPR in % [95 % interval]"] = found
    return shown


def _auc(numbers: Row) -> str:
    return f"{numbers['auc']:.3f} [{numbers['auc_low']:.3f}, {numbers['auc_high']:.3f}]"


class Audit(NamedTuple):
    """The audit of one model."""

    run: str
    """The run's name, where there are several; two in different places may have one name."""
    model: str
    metrics: Row


def read(runs: Sequence[Path]) -> list[Audit]:
    """The audits that belong to the runs' recipes, in their order. Raises CheckpointError for no run or no sidecar."""
    found = []
    for run in runs:
        for job, path, sidecar in results_of(run, recipe_of(run)):
            if job.stage == "audit":
                with reading(path, "metrics of audit"):
                    _check(sidecar["metrics"])
                found.append(Audit(run.name if len(runs) > 1 else "", job.model, sidecar["metrics"]))
    order = [one.model for one in found]
    return sorted(found, key=lambda one: order.index(one.model))


def tables(audits: Sequence[Audit]) -> list[Table]:
    """Balanced accuracy (Table 2), AUC, and TPR at low FPR in both modes, then the readouts; nothing without audits."""
    if not audits:
        return []
    several = any(one.run for one in audits)
    first = [[one.model, *[one.run] * several] for one in audits]
    columns, found = ["Model", *["Run"] * several], []
    for mode, title in MODES.items():
        results = [{name: _shown(numbers) for name, numbers in _results(one.metrics, mode).items()} for one in audits]
        names = list(dict.fromkeys(name for one in results for name in one))
        heading = f"Membership inference, as in Table 2 of the paper: {title[0].lower()}{title[1:]}"
        for what in next((shown for one in results for shown in one.values()), ()):
            cells = [[one[name][what] if name in one else "–" for name in names] for one in results]
            shown = {cell for row in cells for cell in row} - {"–"}
            if len(shown) == 1 and UNRESOLVED in (only := shown.pop()):
                found.append(Table(f"{title}: {what}: {only}.", heading=heading))
            else:
                lines = [[*own, *row] for own, row in zip(first, cells, strict=True)]
                found.append(Table(f"{title}: {what}.", [*columns, *names], lines, heading))
            heading = ""
    lines = [[*own, *_readouts(one.metrics)] for own, one in zip(first, audits, strict=True)]
    readouts = [*columns, "AUC without the model", "Source head", "Entropy / log K", "Steps to relearn"]
    found.append(Table("Control and readouts.", readouts, lines, "Control and readouts"))
    if compared := [(own, one.metrics["cka"]) for own, one in zip(first, audits, strict=True) if "cka" in one.metrics]:
        stages = list(next(iter(compared[0][1].values())))
        all_of = [(own, other, by) for own, others in compared for other, by in others.items()]
        lines = [[*own, other, *(f"{value:.2f}" for value in by.values())] for own, other, by in all_of]
        note = "Linear CKA of each stage with the same one of another model, on test images of the source; 1: the same."
        found.append(Table(note, [*columns, "Compared with", *stages], lines, "Where the source still is"))
    return found


def conclusion(audits: Sequence[Audit]) -> str:
    """One sentence: how well the strongest attack on each model tells the source's training images from others."""
    found: dict[str, list[Row]] = {}
    for one in audits:
        modes = ["as-is", "reprobe"] if one.metrics["source_head"] == "trained" else ["reprobe"]
        attacks = [attack for mode in modes for attack in _results(one.metrics, mode).values()]
        found.setdefault(one.model, []).extend(attack for attack in attacks if "auc_low" in attack)
    best = [(model, max(attacks, key=lambda attack: attack["auc"])) for model, attacks in found.items() if attacks]
    said = ", ".join(f"{_auc(one)} on {model}" for model, one in best)
    runs = len(audits) // max(1, len({one.model for one in audits}))
    which = f"the strongest membership attack of any of {runs} runs" if runs > 1 else "the strongest membership attack"
    who = f"Who was a training image of the source: {which} has an AUC of"
    return f"{who} {said}; 0.5 is chance, 1 knows all." if said else ""


@matplotlib.rc_context({**STYLE, "font.size": 7.2})
def figures(audits: Sequence[Audit], colours: Mapping[str, str]) -> dict[str, Drawing]:
    """The ROC curves of the first run, by the figure's name; nothing where there was no audit. colours: by model.

    On logarithmic axes, one panel a mode and attack, one line a model.
    """
    audits = [*{one.model: one for one in reversed(audits)}.values()][::-1]
    modes = [mode for mode in MODES if any(_results(one.metrics, mode) for one in audits)]
    names = list(dict.fromkeys(n for mode in modes for one in audits for n in _results(one.metrics, mode)))
    if not names:
        return {}
    figure = Figure(figsize=(2.3 * len(names), 2.3 * len(modes) + 0.5))
    panels = figure.subplots(len(modes), len(names), squeeze=False)
    for (mode, name), axes in zip(product(modes, names), panels.flat, strict=True):
        for one in audits:
            if roc := _results(one.metrics, mode).get(name, {}).get("roc"):
                # A rate of 0 has no place on a logarithmic axis.
                rates = [value or None for value in roc["tpr"]]
                axes.loglog(roc["fpr"], rates, label=one.model, linewidth=1, color=colours[one.model])
        axes.plot([1e-4, 1], [1e-4, 1], color="grey", linestyle=":", linewidth=0.8)
        axes.set(xlim=(1e-3, 1), ylim=(1e-3, 1.1), title=f"{name}, {mode}")
    panels[-1][0].set(xlabel="false positive rate", ylabel="true positive rate")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    caption = "Who was a member: true over false positive rate, both logarithmic; dotted: chance."
    runs = list(dict.fromkeys(one.run for one in audits if one.run))
    return {"roc": (figure, f"{caption} Run: {', '.join(runs)}." if runs else caption)}


def _check(metrics: Row) -> None:
    """Raise whatever comes of it where numbers that are shown are missing or of another form."""
    _readouts(metrics)
    for numbers in [numbers for mode in MODES for numbers in _results(metrics, mode).values()]:
        _shown(numbers)
        roc = numbers.get("roc", {"fpr": [], "tpr": []})
        if len(roc["fpr"]) != len(roc["tpr"]):
            raise ValueError("a point of a curve has two rates")


def _results(metrics: Row, mode: str) -> dict[str, Row]:
    own = metrics if mode == "as-is" else metrics.get(mode, {})
    return {n: v for n, v in own.items() if isinstance(v, dict) and "balanced_accuracy_std" in v and n != "blind"}


def _readouts(metrics: Row) -> list[str]:
    steps, entropy = "–", f"{metrics['entropy_readout']['share_of_log_k']:.2f}"
    if relearning := metrics["relearning"]:
        steps = f"> {relearning['budget']}" if relearning["steps"] is None else str(relearning["steps"])
    return [f"{metrics['blind']['auc']:.3f}", metrics["source_head"], entropy, steps]
