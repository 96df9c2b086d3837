"""A report's files in its folder: tables, figures, and the page around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError
from dtlctl.report import audit, figures, page
from dtlctl.report.tables import markdown
from dtlctl.storage import checkpoint


def write(
    table: dict[str, Any], folder: Path, command: str, runs: Sequence[Path] = (), before: Sequence[str] = ()
) -> None:
    """Write table.json, table.md, figures, report.html and, of the audits of `runs`, audit.md into `folder`.

    Those of an earlier report there that this one has not are removed. command: what makes it again. before: Markdown
    parts to stand before the tables. Raises CheckpointError where that cannot be.
    """
    audits = audit.read_all(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        colours = figures.colours_of([*(row["model"] for row in table["rows"]), *(m for _, one in audits for m in one)])
        drawn = figures.save({**figures.of_table(table), **audit.figures(audits, colours)}, folder)
        text, audited = [*before, markdown(table).strip()], audit.tables_of_all(audits)
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
