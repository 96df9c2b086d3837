"""The tables of a report, in Markdown that also reads well as plain text."""

from __future__ import annotations

from typing import Any

from dtlctl.report.results import ATTACKS, Row

TUNED = (
    "Under tuned attackers: PL of the table's one setting, of the attacker who is best on {chosen}, "
    "and of the best of all by test accuracy, which nobody can choose; the share (PL − scratch) / (TL − scratch) that "
    "the tuned attacker recovers, with its 95 % t interval over seeds."
)
FRESH = "half of the test images, and judged by the other half"

PAIRED = " Taken seed by seed: ± is of the difference."


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
