"""Put what the sidecars say into docs/reliability.md, between the page's markers.

python -m tests.reliability.page
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "docs" / "results" / "reliability"
GROUPS = {
    "kill": "`kill -9` in every stage: at a step, in an evaluation, while saving, while publishing, twice in an epoch",
    "publish": "`kill -9` before and after every write boundary of a publication over an old checkpoint",
    "signal": "SIGTERM and SIGINT in every stage: at a step, in an evaluation, while publishing",
    "disk full": "no space left at a write boundary of a save or a publication",
    "file": "hostile or damaged images, tables, checkpoints, sidecars and states",
    "recipe": "hostile or damaged recipes, names and overrides",
    "processes": "two processes, the fault in one of them",
}


def entries() -> list[dict]:
    """All faults that were kept."""
    return [e for path in sorted(RESULTS.glob("faults*.json")) for e in json.loads(path.read_text())["faults"]]


def table(every: list[dict]) -> str:
    """One row a group, and one for all."""
    lines = [
        "| group | what | faults | kept | lost | mixed | tracebacks | hangs |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group in [*GROUPS, "all"]:
        made = [e for e in every if group in (e["group"], "all")]
        counts = [len(made), sum(e["ok"] for e in made)]
        counts += [sum(e[key] for e in made) for key in ("lost", "mixed", "traceback", "hang")]
        lines.append(f"| {group} | {GROUPS.get(group, '')} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def cost() -> str:
    """What `overhead.json` says, in a sentence."""
    found = json.loads((RESULTS / "overhead.json").read_text())
    return (
        f"Saving the {found['state_bytes'] / 1e6:.0f} MB of a ResNet-18 with its momentum took "
        f"{found['seconds_a_save_median']} s in the median of {found['saves']}: "
        f"{found['overhead_percent_at_default']} % of the run time at the default interval."
    )


def put(page: str, name: str, text: str) -> str:
    """The page with the text between the markers of that name."""
    between = re.compile(rf"(<!-- {name} -->\n\n).*?(\n*<!-- end {name} -->)", re.DOTALL)
    return between.sub(lambda found: found[1] + text + "\n\n" + found[2].lstrip("\n"), page)


if __name__ == "__main__":
    page = put(PAGE.read_text(encoding="utf-8"), "table: faults", table(entries()))
    PAGE.write_text(put(page, "cost", cost()), encoding="utf-8")
