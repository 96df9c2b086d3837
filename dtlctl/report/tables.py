"""The tables of a report as data, and as Markdown that also reads well as plain text."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from dtlctl.report.results import ATTACKS, BUDGETS, Row
from dtlctl.report.templates import span

Columns = dict[str, Callable[[Row], str]]
"""By heading, what shows a row's cell."""


@dataclass(frozen=True)
class Table:
    """One table: cells as they are shown, the first column to the left, the others to the right."""

    note: str
    """What it shows, in a sentence. Without columns that is all."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    heading: str = ""
    """Over it, and over those after it without one, on a page."""


def markdown(document: dict[str, Any], before: Sequence[Table] = ()) -> str:
    """All tables of a report (`summary.summarise`), after those given, its caveats, and last its verdict."""
    return render([*before, *of_report(document)], [*document["caveats"], *document["verdict"]["sentences"]])


def render(tables: Iterable[Table], caveats: Iterable[str] = ()) -> str:
    """Tables as Markdown, and sentences below them."""
    parts = [part for table in tables for part in (table.note, _grid(table)) if part]
    return "\n\n".join([*parts, *caveats]) + "\n"


def of_report(document: dict[str, Any]) -> list[Table]:
    """Accuracies in the form of the paper's Table 3, differences in that of Table 1, then tuned attackers."""
    rows = document["rows"]
    sets = piggyback_sets(rows)
    tables = [Table(accuracies_note(document["seeds"]), *accuracies(rows), "Accuracies")]
    if any(row["model"] == "TL" for row in rows):
        tables.append(_differences(document, sets))
    if any(row.get("piggyback_worst") for row in rows):
        tables.append(_tuned(document))
        tables += [_strength(rows, name) for name in sets if any(row.get("strength", {}).get(name) for row in rows)]
    return tables


def accuracies(rows: Sequence[Row], kinds: Sequence[str] = ("piggyback",)) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line for every row: the model, its accuracies under these kinds of ATTACKS, the loss's AUC."""
    columns: Columns = {"Acc_s": partial(cell, name="acc_s"), "Acc_t": partial(cell, name="acc_t")}
    for kind, name in product(kinds, piggyback_sets(rows)):
        columns[f"PL {name}{' tuned' * (kind == 'piggyback_worst')}"] = partial(cell, name=kind, dataset=name)
    if any("audit_auc" in row for row in rows):
        columns["MIA AUC"] = partial(cell, name="audit_auc", form=".3f")
    return ["Model", *columns], _lines(columns, rows)


def accuracies_note(seeds: Sequence[int]) -> str:
    """What the numbers of a table of accuracies are."""
    if len(seeds) == 1:
        return f"Accuracies in %, seed {seeds[0]}."
    return f"Accuracies in %. Mean over seeds {', '.join(map(str, seeds))} ± half width of the 95 % interval."


def chosen_on(recipe: dict[str, Any]) -> str:
    """On which images tuned attackers choose what they do."""
    half = "half of the test images, and judged by the other half"
    return half if recipe["piggyback"]["choose_on"] == "test" else "held-out images of his own"


def piggyback_sets(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["piggyback"]))


def _differences(document: dict[str, Any], sets: list[str]) -> Table:
    rows = [row for row in document["rows"] if row["model"] not in ("scratch", "pre", "TGT")]
    tl = next(row for row in rows if row["model"] == "TL")
    tuned = [name for name in sets if name in tl.get("piggyback_worst", {})]
    others = [other for other in ("TGT", "TL") if f"vs_{other}" in tl]
    columns: Columns = {f"Acc_t vs {other}": partial(_against, other=other, name="acc_t") for other in others}
    columns |= {f"PL {name} vs TL": partial(_against, name="piggyback", dataset=name) for name in sets}
    columns |= {f"tuned {name} vs TL": partial(_against, name="piggyback_worst", dataset=name) for name in tuned}
    note = "Differences in points (higher Acc_t is better, lower PL is better)."
    if len(document["seeds"]) > 1:
        note += " Taken seed by seed: ± is of the difference."
    return Table(note, ["Model", *columns], _lines(columns, rows), "Against TGT and TL")


def _lines(columns: Columns, rows: Sequence[Row]) -> list[list[str]]:
    return [[row["model"], *(show(row) for show in columns.values())] for row in rows]


def _against(row: Row, name: str, dataset: str | None = None, other: str = "TL") -> str:
    return cell(row[f"vs_{other}"], name, dataset, form="+.1f")


def _tuned(document: dict[str, Any]) -> Table:
    sets = list(dict.fromkeys(name for row in document["rows"] for name in row.get("piggyback_worst", {})))
    kinds = ("one setting", "tuned", "best of all", "recovered", "tuned by")
    lines = []
    for row in document["rows"]:
        line = [row["model"]]
        for name in sets:
            share = document["evidence"][row["model"]]["attacks"].get(name, {}).get("recovered")
            who = [each for each, _ in Counter(row.get("tuned_by", {}).get(name, [])).most_common()]
            line += [cell(row, kind, name) for kind in ATTACKS]
            line += [span(share, ".0%") if share else "–", ", ".join(who) or "–"]
        lines.append(line)
    note = (
        "Under tuned attackers: PL of the table's one setting, of the attacker who is best on "
        f"{chosen_on(document['recipe'])}, and of the best of all by test accuracy, which nobody can choose; the share "
        "(PL − scratch) / (TL − scratch) that the better of the first two recovers from models that saw the source, "
        "with its 95 % interval."
    )
    return Table(note, ["Model", *(f"{s} {kind}" for s in sets for kind in kinds)], lines, "Under tuned attackers")


def _strength(rows: Sequence[Row], name: str) -> Table:
    curves = {row["model"]: dict(row["strength"][name]) for row in rows if row.get("strength", {}).get(name)}
    winners = {row["model"]: row["winner"][name] for row in rows if name in row.get("winner", {})}
    budgets = [k for k in BUDGETS if any(k in curve for curve in curves.values())]
    lines = []
    for model, curve in curves.items():
        told = [f"{curve[k]:.1f}" if k in curve else "–" for k in budgets]
        lines.append([model, *told, f"{curve[max(curve)]:.1f} ({max(curve)})"])
        lines[-1] += ["; ".join(dict.fromkeys(winners.get(model, ["–"])))] if winners else []
    note = (
        f"Strength against budget on {name}: accuracy in % on the images that choose, of the best of so many trials; "
        "of a search the first ones, of a grid the mean over all orders. It flatters: other images judge."
    )
    more = ["what the search chose, to use without `search`"] * bool(winners)
    return Table(note, ["Model", *map(str, budgets), "all", *more], lines)


def cell(row: Row, name: str, dataset: str | None = None, *, form: str = ".1f") -> str:
    """A number of a row, or one of ATTACKS on a dataset, with its interval over seeds; a dash where there is none."""
    value, half = row.get(name), row.get(f"{name}_ci")
    if dataset is not None:
        value, half = (value or {}).get(dataset), (half or {}).get(dataset)
    if value is None:
        return "–"
    return f"{value:{form}}" if half is None else f"{value:{form}} ± {half:{form.lstrip('+')}}"


def _grid(table: Table) -> str:
    if not table.columns:
        return ""
    columns, *lines = [[cell.replace("|", "\\|") for cell in line] for line in (table.columns, *table.rows)]
    first, *others = [max(map(len, cells)) for cells in zip(columns, *lines, strict=True)]
    rule = [f":{'-' * (first + 1)}", *(f"{'-' * (width + 1)}:" for width in others)]
    aligned = [[cell.ljust(first), *map(str.rjust, cells, others)] for cell, *cells in (columns, *lines)]
    head, *rows = [f"| {' | '.join(line)} |" for line in aligned]
    return "\n".join([head, f"|{'|'.join(rule)}|", *rows])
