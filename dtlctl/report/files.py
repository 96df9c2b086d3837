"""A report's files in its folder: tables, figures, and a page with all of them that fetches nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from dtlctl.errors import CheckpointError
from dtlctl.report import audit, figures, tables
from dtlctl.report.figures import Drawing
from dtlctl.report.tables import Table
from dtlctl.report.verdict import WORDS, percent, points, shared
from dtlctl.storage import checkpoint


def write(
    document: dict[str, Any], folder: Path, command: str, runs: Sequence[Path] = (), before: Sequence[Table] = ()
) -> None:
    """Write the report of a document of `summary.summarise`, and of the audits of `runs`, into `folder`.

    command: what makes it again. before: tables to stand before its own. Raises CheckpointError where that cannot be.
    """
    audits, recipe, seeds, verdict = audit.read(runs), document["recipe"], document["seeds"], document["verdict"]
    colours = figures.colours_of([*(row["model"] for row in document["rows"]), *(one.model for one in audits)])
    drawings = {**figures.of_table(document), **audit.figures(audits, colours)}
    shown = [*before, *tables.of_report(document)]
    page = {
        "title": f"May it be published? {recipe['name']}",
        "subtitle": f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.",
        "verdict": [text for text in verdict["sentences"] if text not in verdict["caveats"]],
        "cards": cards(document),
        "attackers": [who(recipe["piggyback"])],
        "audited": audit.conclusion(audits),
    }
    caveats = [*verdict["caveats"], *document["caveats"]]
    publish(document, folder, command, shown, caveats, drawings, page, audit.tables(audits))


def publish(
    document: dict[str, Any], folder: Path, command: str, shown: Sequence[Table], caveats: Sequence[str],
    drawings: dict[str, Drawing], page: dict[str, Any], audited: Sequence[Table] = (),
) -> None:  # fmt: skip
    """Write table.json, table.md, figures, report.html and, if there are any, audit.md and verdict.json into `folder`.

    Those of an earlier report there that this one has not are removed. page: the rest of what `page.html.j2` shows.
    Raises CheckpointError where that cannot be.
    """
    template = environment().get_template("page.html.j2")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = figures.save(drawings, folder)
        html = template.render(
            **{"verdict": [], "cards": [], "audited": "", **page}, command=command, caveats=caveats, figures=drawn,
            tables=shown, audits=audited,
        )  # fmt: skip
        checkpoint.write(folder / "report.html", html.encode())
        checkpoint.write(folder / "table.md", tables.render(shown, [*page.get("verdict", []), *caveats]).encode())
        for name, text in (
            ("audit.md", tables.render(audited) if audited else ""),
            ("verdict.json", dump(document["verdict"]) if "verdict" in document else ""),
        ):
            if text:
                checkpoint.write(folder / name, text.encode())
            else:
                (folder / name).unlink(missing_ok=True)  # of an earlier report
        checkpoint.write(folder / "table.json", dump(document).encode())  # last: it vouches for the others
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written: {error.strerror}") from None


def environment() -> jinja2.Environment:
    """Where the page's template is; what it shows is text and never markup, but for the figures."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def is_current(document: dict[str, Any], folder: Path) -> bool:
    """Whether the folder holds the report of this document, and of the same audits."""
    try:
        return (folder / "table.json").read_text(encoding="utf-8") == dump(document)
    except (OSError, ValueError):
        return False


def dump(document: dict[str, Any]) -> str:
    """The document as table.json has it."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def cards(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What to see first of every model that could be published: what it keeps, and what attackers get from it.

    Beside that what they get from the references, which gives the number its meaning.
    """
    found, rows = document["evidence"], {row["model"]: row for row in document["rows"]}
    shown = []
    for model, own in found.items():
        if "acc_t" not in own:
            continue
        lines = [f"price {points(own.get('price'))}"] if model not in ("TL", "TGT") else []
        for name, one in own["attacks"].items():
            others = {
                other: found[other]["attacks"] for other in ("TGT", "scratch") if other in found and other != model
            }
            beside = [
                f"{other} {each[name]['accuracy']['value']:.1f}" for other, each in others.items() if name in each
            ]
            lines.append(f"{name}: attackers get {percent(one['accuracy'])}" + f" ({', '.join(beside)})" * bool(beside))
            lines += [shared(one)] if one["recovered"] and model != "TL" else []
        name, _, words = (WORDS.get(model) or f"{model}, {disposal(document, model)}").partition(", ")
        chosen = model == document["verdict"]["recommended"]
        shown.append({
            "name": name, "words": words, "accuracy": tables.number(rows[model], "acc_t"), "chosen": chosen,
            "lines": lines if own["attacks"] else [*lines, "never attacked"],
        })  # fmt: skip
    return sorted(shown, key=lambda card: not card["chosen"])


def disposal(document: dict[str, Any], model: str) -> str:
    """A variant in words."""
    settings = document["recipe"]["dispose"][model]
    start = {"fresh": "a new network that learned TL's answers"}.get(settings["init"], "TL, trained on")
    loss = settings["unlearn"]["kind"]
    if loss == "none":
        return f"{start}; no unlearning loss"
    lam, price = settings["lambda"], settings["price"]
    return f"{start}; {loss}, " + (f"λ = {lam:g}" if price is None else f"for a price of {price:g}")


def who(piggyback: dict[str, Any]) -> str:
    """The attackers of a recipe's table [piggyback], in words."""
    length = f"{piggyback['steps']} steps" if piggyback["steps"] else f"{piggyback['epochs']} epochs"
    setting = f"SGD, learning rate {piggyback['lr']:g}, {length}"
    text = f"The one setting is the paper's attacker: full fine-tuning ({setting})."
    if not piggyback["attackers"]:
        return f"{text} No tuned attacker was asked for: read these numbers as those of a weak one."
    tuned = []
    for one in piggyback["attackers"]:
        name = next((key for key in ("C", "k") if key in one), "lr")
        rates, name = one[name], name if name != "lr" else f"{one['optimizer']}, learning rate"
        where = f"; on {', '.join(one['datasets'])} only" if one["datasets"] else ""
        tuned.append(f"{one['kind']} ({name} {', '.join(f'{rate:g}' for rate in rates)}{where})")
    chosen = "images held out of the attacker's own; the test split picks nothing"
    if piggyback["choose_on"] == "test":
        chosen = "half of the test images; the other half judges it"
    return (
        f"{text} The tuned ones: {'; '.join(tuned)}. Each picks its setting and its length on {chosen}. "
        "Then it trains once more, on all he has."
    )
