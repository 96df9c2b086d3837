"""A report's files in its folder: tables, figures, and a page with all of them that fetches nothing from anywhere."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError
from dtlctl.report import audit, figures, tables, templates
from dtlctl.report.figures import Drawing
from dtlctl.report.tables import Table
from dtlctl.storage import checkpoint


def write(
    document: dict[str, Any], folder: Path, command: str, runs: Sequence[Path] = (), before: Sequence[Table] = ()
) -> None:
    """Write the report of a document of `summary.summarise`, and of the audits of `runs`, after tables that stand
    `before`. command: what makes it again. Raises CheckpointError where it cannot be written."""
    audits, recipe, seeds, verdict = audit.read(runs), document["recipe"], document["seeds"], document["verdict"]
    colours = figures.colours_of([*(row["model"] for row in document["rows"]), *(one.model for one in audits)])
    page = {
        "title": f"May it be published? {recipe['name']}",
        "subtitle": f"Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}.",
        "verdict": [text for text in verdict["sentences"] if text not in verdict["caveats"]],
        "caveats": [*verdict["caveats"], *document["caveats"]],
        "tables": [*before, *tables.of_report(document)],
        "evidence": document["evidence"],
        "chosen": verdict["recommended"],
        "dispose": recipe["dispose"],
        "reasons": {model: one["reasons"] for model, one in verdict["models"].items()},
        "attackers": [templates.said("who", recipe["piggyback"])],
        "audited": audit.conclusion(audits),
        "audits": audit.tables(audits),
    }
    publish(document, folder, command, page, {**figures.of_table(document), **audit.figures(audits, colours)})


def publish(
    document: dict[str, Any], folder: Path, command: str, page: dict[str, Any], drawings: dict[str, Drawing]
) -> None:
    """Write table.json, table.md, figures, report.html and, if there are any, audit.md and verdict.json; those of an
    earlier report there that this one has not are removed, once all of this one is written. page: what `page.html.j2`
    shows."""
    page = {"verdict": [], "evidence": {}, "audited": "", "audits": [], **page}
    work = folder / f".report.{os.getpid()}.tmp"  # two may write at once
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a dead process with our number
        work.mkdir(parents=True)
        drawn = figures.save(drawings, work)
        texts = {
            "report.html": templates.render("page.html.j2", **page, command=command, figures=drawn),
            "table.md": tables.render(page["tables"], [*page["verdict"], *page["caveats"]]),
            "audit.md": tables.render(page["audits"]) if page["audits"] else "",
            "verdict.json": checkpoint.dump(document["verdict"]) if "verdict" in document else "",
            "table.json": checkpoint.dump(document),
        }
        for name, text in texts.items():
            if text:
                checkpoint.write(work / name, text.encode())
        if (folder / "table.json").exists():  # elsewhere, a file of such a name is somebody's own
            drawings_there = [f"{name}.{form}" for name in figures.NAMES for form in ("svg", "png")]
            for name in ("table.json", "audit.md", "verdict.json", *drawings_there):
                for path in folder.glob(name):
                    if not (work / path.name).exists():
                        path.unlink()
        for path in sorted(work.iterdir(), key=lambda path: path.name == "table.json"):  # last: it vouches for the rest
            os.replace(path, folder / path.name)
        checkpoint.sync(folder)
    except CheckpointError as error:
        error.args = (str(error).replace(f"{work}{os.sep}", f"{folder}{os.sep}"),)
        raise
    except OSError as error:
        raise CheckpointError(f"{folder}: the report cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_current(document: dict[str, Any], folder: Path) -> bool:
    """Whether the folder holds the report of this document, and of the same audits."""
    try:
        return (folder / "table.json").read_text(encoding="utf-8") == checkpoint.dump(document)
    except (OSError, ValueError):
        return False
