"""Tables and plots, from sidecars and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dtlctl import checkpoint, report_audit
from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.plan import Job, jobs
from dtlctl.recipe import REFERENCES, Recipe

Row = dict[str, Any]


def summarise(runs: list[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe": ..., "seeds": [...], "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc"}, ...]}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t
    interval. A number that was not measured is left out. "audits_sha256" stands for all that audit.md and the ROC
    curves show besides.
    """
    recipes = [_recipe(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    tables = [_rows(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    rows = [_average([table[model] for table in tables]) for model in tables[0] if all(model in t for t in tables)]
    audits = checkpoint.key({run.name: report_audit.read(run) for run in runs})
    return {
        "recipe": recipes[0].resolved(),
        "seeds": [r.seed for r in recipes],
        "rows": rows,
        "audits_sha256": audits,
    }


def write(table: dict[str, Any], folder: Path, runs: list[Path]) -> None:
    """Write table.json, table.md, the chart and the audits into `folder`. Raises CheckpointError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(row["piggyback"] for row in table["rows"]):
            chart(table, folder)
        report_audit.write(runs, folder)
        checkpoint.write(folder / "table.md", markdown(table).encode())
        checkpoint.write(folder / "table.json", dump(table).encode())  # last: it vouches for the others
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written: {error.strerror}") from None


def is_current(table: dict[str, Any], folder: Path) -> bool:
    """Whether the folder holds the report of this table, and of the same audits."""
    try:
        return (folder / "table.json").read_text(encoding="utf-8") == dump(table)
    except (OSError, ValueError):
        return False


def dump(table: dict[str, Any]) -> str:
    """The table as table.json has it."""
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def markdown(table: dict[str, Any]) -> str:
    """Accuracies in the form of the paper's Table 3, then differences in that of Table 1."""
    rows, seeds = table["rows"], table["seeds"]
    sets = list(dict.fromkeys(name for row in rows for name in row["piggyback"]))
    by_name = {row["model"]: row for row in rows}
    note = f"Mean over seeds {', '.join(map(str, seeds))} ± half width of the 95 % interval." if len(seeds) > 1 else ""
    audited = any("audit_auc" in row for row in rows)

    columns = ["Model", "Acc_s", "Acc_t", *(f"PL {s}" for s in sets), *(["MIA AUC"] if audited else [])]
    lines = [
        [row["model"], _number(row, "acc_s"), _number(row, "acc_t")]
        + [_number({**row["piggyback"], **_intervals(row)}, s) for s in sets]
        + ([_number(row, "audit_auc", ".3f")] if audited else [])
        for row in rows
    ]
    parts = [
        f"Accuracies in %, seed {seeds[0]}." if len(seeds) == 1 else f"Accuracies in %. {note}",
        _grid(columns, lines),
    ]

    if {"TL", "TGT"} <= by_name.keys():
        tl, tgt = by_name["TL"], by_name["TGT"]
        columns = ["Model", "Acc_t vs TGT", "Acc_t vs TL", *(f"PL {s} vs TL" for s in sets)]
        lines = [
            [row["model"], _difference(row, tgt, "acc_t"), _difference(row, tl, "acc_t")]
            + [_difference(row["piggyback"], tl["piggyback"], s) for s in sets]
            for row in rows
            if row["model"] not in ("scratch", "pre", "TGT")
        ]
        parts += ["Differences in points (higher Acc_t is better, lower PL is better).", _grid(columns, lines)]
    return "\n\n".join(parts) + "\n"


def chart(table: dict[str, Any], folder: Path) -> None:
    """Acc_pl of every model by piggyback dataset, in the manner of Fig. 2: piggyback.png and piggyback.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in table["rows"] if row["piggyback"]]
    sets = list(dict.fromkeys(name for row in rows for name in row["piggyback"]))
    figure, axes = plt.subplots(figsize=(2 + 2.6 * len(sets), 3.6), layout="constrained")
    width, colours = 0.85 / len(rows), plt.get_cmap("tab10")
    for place, row in enumerate(rows):
        heights = [row["piggyback"].get(name, 0) for name in sets]
        errors = [row.get("piggyback_ci", {}).get(name, 0) for name in sets] if "piggyback_ci" in row else None
        left = [x + place * width for x in range(len(sets))]
        bars = axes.bar(left, heights, width, yerr=errors, label=row["model"], color=colours(place % 10), capsize=2)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks([x + 0.425 - width / 2 for x in range(len(sets))], sets)
    axes.set_ylabel("Acc_pl (%)")
    axes.set_title("Piggyback accuracy: what an attacker gets out (lower is better)", fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"piggyback.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def _recipe(run: Path) -> Recipe:
    try:
        document = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        return Recipe.model_validate(document)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{run / 'recipe.json'}: not a run's recipe ({reason})") from None


def _rows(run: Path, recipe: Recipe) -> dict[str, Row]:
    """Measured numbers by model, the references first; stale results are left out."""
    rows: dict[str, Row] = {}
    plan = jobs(recipe)
    weights: dict[str, str] = {}
    for model in [*REFERENCES, *recipe.dispose]:
        rows[model] = {"model": model, "piggyback": {}}
    for job in plan:
        sidecar = checkpoint.read_sidecar(run / job.path)
        if sidecar is None or not _belongs(sidecar, job, recipe, weights):
            continue
        if "weights_sha256" in sidecar:
            weights[job.model] = sidecar["weights_sha256"]
        row, metrics = rows[job.model], sidecar["metrics"]
        try:
            if job.stage == "piggyback":
                row["piggyback"][job.dataset.partition(".")[2]] = float(metrics["acc_pl"])
            elif job.stage == "audit":
                if "loss" in metrics:
                    row["audit_auc"] = float(metrics["loss"]["auc"])
            else:
                row.update({name: float(value) for name, value in metrics.items()})
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{run / job.path}: not the metrics of {job.stage}; delete it") from None
    return {model: row for model, row in rows.items() if row["piggyback"] or len(row) > 2}


def _belongs(sidecar: Row, job: Job[Any], recipe: Recipe, weights: dict[str, str]) -> bool:
    """Whether the result was made as the run's recipe now says, from the model that is there now."""
    described = all(sidecar.get(name) == value for name, value in job.described(recipe).items() if name != "settings")
    described = described and _described(sidecar, job, recipe) == job.described(recipe)
    return described and (job.parent is None or sidecar["parent"].get(job.parent) == weights.get(job.parent))


def _described(sidecar: Row, job: Job[Any], recipe: Recipe) -> Row | None:
    """What the job would be with the result's settings; a key that is younger than the result is at its default."""
    try:
        return replace(job, settings=type(job.settings).model_validate(sidecar.get("settings"))).described(recipe)
    except ValueError:
        return None


def _average(rows: list[Row]) -> Row:
    """Means, and with several seeds half widths of 95 % intervals beside them."""
    result: Row = {"model": rows[0]["model"]}
    for name in [k for k in rows[0] if k not in ("model", "piggyback") and all(k in row for row in rows)]:
        _add(result, name, [row[name] for row in rows])
    sets = [s for s in rows[0]["piggyback"] if all(s in row["piggyback"] for row in rows)]
    averages: Row = {}
    for name in sets:
        _add(averages, name, [row["piggyback"][name] for row in rows])
    result["piggyback"] = {s: averages[s] for s in sets}
    if len(rows) > 1:
        result["piggyback_ci"] = {s: averages[f"{s}_ci"] for s in sets}
    return result


def _add(row: Row, name: str, values: list[float]) -> None:
    row[name] = mean(values)
    if len(values) > 1:
        from scipy.stats import t

        row[f"{name}_ci"] = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def _number(row: Row, name: str, form: str = ".1f") -> str:
    if name not in row:
        return "–"
    return f"{row[name]:{form}}" + (f" ± {row[f'{name}_ci']:{form}}" if f"{name}_ci" in row else "")


def _intervals(row: Row) -> Row:
    return {f"{name}_ci": half for name, half in row.get("piggyback_ci", {}).items()}


def _difference(row: Row, reference: Row, name: str) -> str:
    return f"{row[name] - reference[name]:+.1f}" if name in row and name in reference else "–"


def _grid(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]

    def show(line: list[str]) -> str:
        first, *rest = (
            text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(":" + "-" * (w + 1) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([show(columns), rule, *map(show, lines)])
