"""report.html: one file to look at, with figures inside and nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dtlctl.report.tables import number

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --paper: #ffffff; --tint: #f4f6f9;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b4; --line: #323a46; --paper: #14181e;
  --tint: #1c222a; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { max-width: 44rem; } .soft { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--tint); border-radius: .5rem; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.5rem; font-weight: 600; }
.card small { font-weight: 400; font-size: .6em; } .card span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; color: var(--ink); }
figcaption { color: var(--soft); font-size: .85rem; }
.figures .roc { grid-column: 1 / -1; overflow-x: auto; } .roc svg { min-width: 70rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { color: var(--soft); font-weight: 500; } code { font-size: .85em; background: var(--tint); padding: .1em .3em;
  border-radius: .25rem; overflow-wrap: anywhere; }
"""

THREAT = (
    "The owner publishes one model for the target task and keeps the source data. The attacker has all weights of "
    "that model and a few labelled images of his own: part of the source, or a new task. He has neither the rest of "
    "the source data nor the pre-trained model nor the owner's settings. He fine-tunes what he was given."
)
HEADINGS = {
    "Accuracies": "Accuracies, as in Table 3",
    "Differences": "Against TGT and TL, as in Table 1",
    "Under tuned": "Under tuned attackers",
    "Who needed": "Which λ",
    "Source head as it is: balanced": "Membership inference, as in Table 2",
    "Source head fitted anew on the features: balanced": "Membership inference through a new source head",
    "Control and readouts": "Control and readouts",
}
"""By the first words of the paragraph that introduces a table."""
CAPTIONS = {
    "piggyback": "Piggyback accuracy by dataset, as in Fig. 2 of the paper; bars: the one setting of the recipe, "
    "lines: 95 % interval over seeds, diamonds: the attacker tuned on held-out images.",
    "tradeoff": "What the owner keeps over what the attacker gets, the tuned one if any, as in Fig. 6.",
    "steps": "How fast the attacker of the one setting gets there.",
    "sweep": "Piggyback accuracy over the swept key, as in Fig. 5.",
    "roc": "Who was a member: true over false positive rate, both logarithmic; dotted: chance.",
    "curve": "Target accuracy over piggyback accuracy (the tuned attacker's, if any) along λ, as in Fig. 6.",
}


def of_table(table: dict[str, Any], drawn: dict[str, str], command: str, text: Sequence[str]) -> str:
    """The page of one report. drawn: {figure's name: its SVG}; command: what makes it again; text: Markdown parts."""
    name, seeds = table["recipe"]["name"], table["seeds"]
    attackers = table["recipe"]["piggyback"].get("attackers") or []
    parts = [
        f"<h1>What is left to piggyback on: {escape(name)}</h1>",
        f"<p class=soft>Accuracies in %, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        + (". ± and lines: 95 % interval over seeds." if len(seeds) > 1 else ". One seed has no interval.")
        + "</p>",
        _cards(table),
        f"<h2>Who attacks</h2><p>{THREAT}</p>",
        f"<p>{_who(attackers, table['recipe']['piggyback'])}</p>",
        "<h2>Figures</h2>",
        figures(drawn, command),
        *tables("\n\n".join(text), command),
    ]
    return document(name, parts)


def document(title: str, parts: list[str]) -> str:
    """A whole page around HTML parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def figures(drawn: dict[str, str], command: str) -> str:
    cells = [
        f"<figure class={kind}>{svg}<figcaption>{CAPTIONS.get(kind, '')} <code>{escape(command)}</code>"
        "</figcaption></figure>"
        for kind, svg in ((name.partition("-")[0], svg) for name, svg in drawn.items())
    ]
    return f"<div class=figures>{''.join(cells)}</div>"


def _cards(table: dict[str, Any]) -> str:
    """The few numbers to see first: TL, then every variant with what it keeps and what is recovered."""
    cards = []
    for row in table["rows"]:
        if row["model"] in ("scratch", "TGT", "pre") or "acc_t" not in row:
            continue
        shares = {**row.get("recovered", {}), **row.get("recovered_worst", {})}
        said = [f"{share['share']:.0%} of {escape(name)}" for name, share in shares.items() if share]
        left = f"<br>recovered: {', '.join(said)}" if said and row["model"] != "TL" else ""
        value, sign, half = number(row, "acc_t").partition(" ±")
        shown = f"{value}<small>{sign}{half}</small>"
        cards.append(f"<div class=card>{escape(row['model'])}<b>{shown}</b><span>target{left}</span></div>")
    return f"<div class=cards>{''.join(cards)}</div>"


def _who(attackers: list[dict[str, Any]], single: dict[str, Any]) -> str:
    length = f"{single['steps']} steps" if single["steps"] else f"{single['epochs']} epochs"
    text = f"The paper's attacker: full fine-tuning, one setting (SGD, learning rate {single['lr']:g}, {length})."
    if not attackers:
        return text + " No tuned attacker was asked for: read these numbers as those of a weak one."
    rates = [
        f"{a['kind']} ({'C' if 'C' in a else a['optimizer'] + ', learning rate'} "
        f"{', '.join(f'{r:g}' for r in a.get('C', a.get('lr', [])))}"
        + (f"; on {', '.join(a['datasets'])} only" if a.get("datasets") else "")
        + ")"
        for a in attackers
    ]
    chosen = "images held out of the attacker's own; the test split picks nothing"
    if single.get("choose_on") == "test":
        chosen = "half of the test images; the other half judges it"
    return (
        text + f" The tuned ones: {escape('; '.join(rates))}. Each picks its setting and its length on {chosen}. "
        "Then it trains once more, on all he has."
    )


def tables(markdown: str, command: str) -> list[str]:
    """The report's Markdown as HTML: paragraphs and pipe tables, the first in the form of Table 3, then Table 1."""
    parts = []
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if block.startswith("## "):
            parts.append(f"<h2>{escape(block[3:])}</h2>")
            continue
        if not lines[0].startswith("|"):
            parts += [f"<h2>{title}</h2>" for start, title in HEADINGS.items() if block.startswith(start)]
            parts.append(f"<p>{escape(block)} <code>{escape(command)}</code></p>")
            continue
        head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
        parts.append(
            "<div class=scroll><table><thead><tr>"
            + "".join(f"<th>{escape(cell)}</th>" for cell in head)
            + "</tr></thead><tbody>"
            + "".join(f"<tr>{row}</tr>" for row in rows)
            + "</tbody></table></div>"
        )
    return parts
