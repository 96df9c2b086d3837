"""Membership inference in the form of the paper's Table 2, with log-log ROC curves; from sidecars and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtlctl import checkpoint
from dtlctl.attacks.membership import RATES

Audits = dict[str, dict[str, Any]]
"""The metrics of every audited model, by name, in the order of the table."""


def write(runs: list[Path], folder: Path) -> None:
    """Write audit.md, and roc.png and roc.svg of the first run, where any of the runs was audited.

    Several runs come one after the other: a table each. Nothing is written of audits that hold no trials, as those
    of earlier versions do not.
    """
    found = [(run, audits) for run in runs if (audits := read(run))]
    if not found:
        return
    parts = [text for run, audits in found for text in ([f"## {run.name}"] if len(found) > 1 else []) + tables(audits)]
    checkpoint.write(folder / "audit.md", ("\n\n".join(parts) + "\n").encode())
    chart(found[0][1], folder)


def read(run: Path) -> Audits:
    """The audits under a run's folder whose models are still those that were audited.

    Raises CheckpointError for a file there that is no sidecar.
    """
    found: Audits = {}
    for path in sorted((run / "audit").glob("*.json"), key=lambda p: (_rank(p.stem), p.stem)):
        place = {"pre": "pretrain", "TL": "finetune"}.get(path.stem, f"dispose/{path.stem}")
        sidecar, model = checkpoint.read_sidecar(path), checkpoint.read_sidecar(run / place / "model.json")
        if not sidecar or not model or "blind" not in sidecar["metrics"]:
            continue
        if model.get("weights_sha256") == sidecar["parent"].get(path.stem):
            found[path.stem] = sidecar["metrics"]
    return found


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
            lines = [[model, *(show(_results(m, mode).get(name), m) for name in names)] for model, m in audits.items()]
            parts += [f"{title}: {what}.", _grid(["Model", *names], lines)]
    lines = [[model, f"{m['blind']['auc']:.3f}", m["source_head"], *_readouts(m)] for model, m in audits.items()]
    columns = ["Model", "AUC without the model", "Source head", "Entropy / log K", "Steps to relearn"]
    return [*parts, "Control and readouts.", _grid(columns, lines)]


def chart(audits: Audits, folder: Path) -> None:
    """ROC curves on logarithmic axes, one panel a mode and attack, one line a model: roc.png and roc.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in ("as-is", "reprobe") if any(_results(m, mode) for m in audits.values())]
    names = list(dict.fromkeys(n for mode in modes for m in audits.values() for n in _results(m, mode)))
    if not names:
        return
    size = (2.3 * len(names), 2.5 * len(modes))
    figure, grid = plt.subplots(len(modes), len(names), figsize=size, layout="constrained", squeeze=False)
    for mode, row in zip(modes, grid, strict=True):
        for name, axes in zip(names, row, strict=True):
            for model, metrics in audits.items():
                if roc := _results(metrics, mode).get(name, {}).get("roc"):
                    # A rate of 0 has no place on a logarithmic axis.
                    axes.loglog(roc["fpr"], [value or None for value in roc["tpr"]], label=model, linewidth=1)
            axes.plot([1e-4, 1], [1e-4, 1], color="grey", linestyle=":", linewidth=0.8)
            axes.set(xlim=(1e-3, 1), ylim=(1e-3, 1.1))
            axes.set_title(f"{name}, {mode}", fontsize=8)
            axes.tick_params(labelsize=6)
    grid[-1][0].set_xlabel("false positive rate", fontsize=7)
    grid[-1][0].set_ylabel("true positive rate", fontsize=7)
    figure.legend(*grid[0][0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=8)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"roc.{suffix}", dpi=120, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def _rank(model: str) -> int:
    return {"pre": 0, "TL": 1}.get(model, 2)


def _results(metrics: dict[str, Any], mode: str) -> dict[str, Any]:
    held = metrics if mode == "as-is" else metrics.get("reprobe", {})
    return {n: v for n, v in held.items() if isinstance(v, dict) and "balanced_accuracy_std" in v and n != "blind"}


def _accuracy(numbers: dict[str, Any] | None, _: Any) -> str:
    if numbers is None:
        return "–"
    return f"{100 * numbers['balanced_accuracy']:.1f} ± {100 * numbers['balanced_accuracy_std']:.1f}"


def _auc(numbers: dict[str, Any] | None, _: Any) -> str:
    return "–" if numbers is None else f"{numbers['auc']:.3f} [{numbers['auc_low']:.3f}, {numbers['auc_high']:.3f}]"


def _tpr(rate: float):
    def show(numbers: dict[str, Any] | None, metrics: dict[str, Any]) -> str:
        if numbers is None:
            return "–"
        if (point := numbers[f"tpr_at_{rate:g}"]) is None:
            return f"n/a (needs ≥ {round(1 / rate)})"
        return f"{100 * point['tpr']:.1f} [{100 * point['low']:.1f}, {100 * point['high']:.1f}]"

    return show


def _readouts(metrics: dict[str, Any]) -> list[str]:
    entropy, relearning = metrics.get("entropy_readout"), metrics.get("relearning")
    steps = "–"
    if relearning:
        steps = f"> {relearning['budget']}" if relearning["steps"] is None else str(relearning["steps"])
    return [f"{entropy['share_of_log_k']:.2f}" if entropy else "–", steps]


def _grid(columns: list[str], lines: list[list[str]]) -> str:
    rule = [":--", *("--:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, rule, *lines])
