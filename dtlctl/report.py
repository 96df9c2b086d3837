"""Tables and plots, from sidecars and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dtlctl import checkpoint
from dtlctl.attacks.recovery import recovered
from dtlctl.caveats import caveats, left_out
from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.results import ATTACKS, Row, measured, recipe_of, refuse_other_images

TUNED = (
    "Under tuned attackers: PL of the table's one setting, of the attacker who is best on {chosen}, "
    "and of the best of all by test accuracy, which nobody can choose; the share (PL − scratch) / (TL − scratch) that "
    "the tuned attacker recovers, with its 95 % t interval over seeds."
)
FRESH = "half of the test images, and judged by the other half"

PAIRED = " Taken seed by seed: ± is of the difference."


def summarise(runs: list[Path]) -> dict[str, Any]:
    """The document `table.json` of one run, or of several that differ in nothing but seed and name.

    {"recipe": ..., "seeds": [...], "rows": [{"model", "acc_s", "acc_t", "piggyback": {name: %}, "audit_auc"}, ...]}:
    accuracies in %, means over seeds; with several seeds each number x has x_ci, the half width of its 95 % t
    interval. A number that was not measured is left out. vs_TL and vs_TGT are rows of differences, taken seed by seed,
    so that their intervals are those of the difference. Under tuned attackers a row also has piggyback_worst and
    piggyback_max; recovered and recovered_worst are shares of what TL gives away (see `recovered`); curves holds
    [[steps of the attack, %], ...] by dataset. audits_sha256 stands for all that audit.md shows besides; caveats
    are sentences.
    """
    from dtlctl import report_audit

    recipes = [recipe_of(run) for run in runs]
    plain = [{**r.resolved(), "seed": 0, "name": "", "checkpoint_minutes": 0} for r in recipes]
    for run, other in zip(runs, plain, strict=True):
        if other != plain[0]:
            raise RecipeError(f"{run}: its recipe differs from {runs[0]} in more than the seed; report them separately")
    found = [measured(run, recipe) for run, recipe in zip(runs, recipes, strict=True)]
    refuse_other_images(found)
    seeds, tables = [recipe.seed for recipe in recipes], [one.rows for one in found]
    models = [model for model in tables[0] if all(model in t for t in tables)]
    by_seed: dict[str, list[Row]] = {model: [table[model] for table in tables] for model in models}
    rows = [_average(own) for own in by_seed.values()]
    for row, own in zip(rows, by_seed.values(), strict=True):
        for reference in [name for name in ("TGT", "TL") if name in by_seed]:
            row[f"vs_{reference}"] = _average([_less(*pair) for pair in zip(own, by_seed[reference], strict=True)])
        if {"scratch", "TL"} <= by_seed.keys():
            _add_shares(row, own, by_seed["scratch"], by_seed["TL"])
    return {
        "recipe": recipes[0].resolved(),
        "seeds": seeds,
        "rows": rows,
        "caveats": [
            *caveats(by_seed, seeds),
            *left_out(tables, seeds),
            *dict.fromkeys(sentence for one in found for sentence in one.renamed),
        ],
        "audits_sha256": checkpoint.key({"audits": report_audit.read_all(runs)}),
    }


def write(
    table: dict[str, Any], folder: Path, command: str, runs: Sequence[Path] = (), before: Sequence[str] = ()
) -> None:
    """Write table.json, table.md, figures, report.html and, of the audits of `runs`, audit.md into `folder`.

    Those of an earlier report there that this one has not are removed. command: what makes it again. before: Markdown
    parts to stand before the tables. Raises CheckpointError where that cannot be.
    """
    from dtlctl import figures, page, report_audit

    audits = report_audit.read_all(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = figures.save({**figures.of_table(table), **report_audit.figures(audits)}, folder)
        text, audited = [*before, markdown(table).strip()], report_audit.tables_of_all(audits)
        checkpoint.write(folder / "report.html", page.of_table(table, drawn, command, [*text, *audited]).encode())
        checkpoint.write(folder / "table.md", ("\n\n".join(text) + "\n").encode())
        if audited:
            checkpoint.write(folder / "audit.md", ("\n\n".join(audited) + "\n").encode())
        else:
            (folder / "audit.md").unlink(missing_ok=True)  # of audits that are gone, or not of this recipe
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
        [row["model"], number(row, "acc_s"), number(row, "acc_t")]
        + [attacked_number(row, s, "piggyback") for s in sets]
        + ([number(row, "audit_auc", ".3f")] if audited else [])
        for row in rows
    ]
    parts = [
        f"Accuracies in %, seed {seeds[0]}." if len(seeds) == 1 else f"Accuracies in %. {note}",
        grid(columns, lines),
    ]

    if "TL" in by_name:
        parts.append("Differences in points (higher Acc_t is better, lower PL is better)." + (PAIRED if note else ""))
        tuned = [name for name in sets if name in by_name["TL"].get("piggyback_worst", {})]
        shown = [row for row in rows if row["model"] not in ("scratch", "pre", "TGT")]
        parts.append(grid(*_differences(shown, sets, tuned)))
    if any(row.get("piggyback_worst") for row in rows):
        columns = [
            "Model",
            *(f"{s} {kind}" for s in sets for kind in ("one setting", "tuned", "best of all", "recovered")),
        ]
        lines = [[row["model"], *(cell for s in sets for cell in attacked(row, s))] for row in rows]
        chosen = FRESH if table["recipe"]["piggyback"].get("choose_on") == "test" else "held-out images of his own"
        parts += [TUNED.format(chosen=chosen), grid(columns, lines)]
    return "\n\n".join([*parts, *table.get("caveats", [])]) + "\n"


def _differences(rows: list[Row], sets: list[str], tuned: list[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines in the form of the paper's Table 1; tuned: datasets with tuned attackers."""
    others = [other for other in ("TGT", "TL") if f"vs_{other}" in rows[0]]
    columns = ["Model", *(f"Acc_t vs {other}" for other in others)]
    columns += [*(f"PL {s} vs TL" for s in sets), *(f"tuned {s} vs TL" for s in tuned)]
    lines = [
        [row["model"]]
        + [number(row[f"vs_{other}"], "acc_t", "+.1f") for other in others]
        + [attacked_number(row["vs_TL"], s, "piggyback", "+.1f") for s in sets]
        + [attacked_number(row["vs_TL"], s, "piggyback_worst", "+.1f") for s in tuned]
        for row in rows
    ]
    return columns, lines


def attacked_number(row: Row, name: str, kind: str, form: str = ".1f") -> str:
    """One kind of Acc_pl (see ATTACKS) on one dataset, with its interval."""
    halves = {f"{dataset}_ci": half for dataset, half in row.get(f"{kind}_ci", {}).items()}
    return number({**row.get(kind, {}), **halves}, name, form)


def attacked(row: Row, name: str) -> list[str]:
    """PL of one setting, of the tuned attacker, of the best attacker by test accuracy, and the recovered share."""
    cells = [attacked_number(row, name, kind) for kind in ATTACKS]
    share = row.get("recovered_worst", {}).get(name)
    if share is None:
        return [*cells, "–"]
    width = f" [{share['low']:.0%}, {share['high']:.0%}]" if share.get("low") is not None else ""
    return [*cells, f"{share['share']:.0%}{width}"]


def _average(rows: list[Row]) -> Row:
    """Means, and with several seeds half widths of 95 % intervals beside them."""
    result: Row = {"model": rows[0]["model"]}
    plain = [k for k, v in rows[0].items() if isinstance(v, float) and all(k in row for row in rows)]
    for name in plain:
        _add(result, name, [row[name] for row in rows])
    for kind in [k for k in ATTACKS if k in rows[0]]:
        averages: Row = {}
        sets = [s for s in rows[0][kind] if all(s in row.get(kind, {}) for row in rows)]
        for name in sets:
            _add(averages, name, [row[kind][name] for row in rows])
        result[kind] = {s: averages[s] for s in sets}
        if len(rows) > 1:
            result[f"{kind}_ci"] = {s: averages[f"{s}_ci"] for s in sets}
    if "curves" in rows[0]:
        result["curves"] = {s: _mean_curve([row["curves"].get(s, []) for row in rows]) for s in result["piggyback"]}
    return result


def _less(row: Row, other: Row) -> Row:
    """The row of differences between two models of one seed, of accuracies that both have."""
    less: Row = {"model": row["model"]}
    if "acc_t" in row and "acc_t" in other:
        less["acc_t"] = row["acc_t"] - other["acc_t"]
    for kind in [kind for kind in ATTACKS if kind in row and kind in other]:
        less[kind] = {s: value - other[kind][s] for s, value in row[kind].items() if s in other[kind]}
    return less


def _mean_curve(curves: list[list[list[float]]]) -> list[list[float]]:
    """The mean of curves at the steps that all of them have."""
    found = [{step: value for step, value in curve} for curve in curves]  # noqa: C416
    return [[step, mean(curve[step] for curve in found)] for step in found[0] if all(step in curve for curve in found)]


def _add_shares(row: Row, own: list[Row], scratch: list[Row], tl: list[Row]) -> None:
    """The recovered share of every dataset, for the one setting and for the tuned attacker."""
    for kind, name in (("piggyback", "recovered"), ("piggyback_worst", "recovered_worst")):
        shares = {
            s: recovered(*([one[kind][s] for one in group] for group in (own, scratch, tl)))
            for s in row.get(kind, {})
            if all(s in one.get(kind, {}) for group in (scratch, tl) for one in group)
        }
        if shares:
            row[name] = shares


def _add(row: Row, name: str, values: list[float]) -> None:
    row[name] = mean(values)
    if len(values) > 1:
        from scipy.stats import t

        row[f"{name}_ci"] = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def number(row: Row, name: str, form: str = ".1f") -> str:
    """A number with its interval, or a dash where there is none."""
    if name not in row:
        return "–"
    return f"{row[name]:{form}}" + (f" ± {row[f'{name}_ci']:{form.lstrip('+')}}" if f"{name}_ci" in row else "")


def grid(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]

    def show(line: list[str]) -> str:
        first, *rest = (
            text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join(":" + "-" * (w + 1) if not i else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([show(columns), rule, *map(show, lines)])
