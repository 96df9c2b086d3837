"""A part of the faults that docs/reliability.md lists is injected again; the page is what the sidecars say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    return [e for path in sorted(RESULTS.glob("faults*.json")) for e in json.loads(path.read_text())["faults"]]


def row(group: str, made: list[dict]) -> str:
    counts = [sum(not e["ok"] for e in made)] + [
        sum(e[k] for e in made) for k in ("lost", "mixed", "traceback", "hang")
    ]
    return f"| {group} | {GROUPS.get(group, '')} | {len(made)} | " + " | ".join(map(str, counts)) + " |"


def table() -> list[str]:
    """The rows of the page's table, from the sidecars."""
    every = entries()
    rows = [row(group, [e for e in every if e["group"] == group]) for group in GROUPS]
    return [*rows, row("all", every)]


def test_the_page_shows_what_the_sidecars_say():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for line in table():
        assert line in page, line
    cost = json.loads((RESULTS / "overhead.json").read_text())
    for key in ("seconds_a_save_median", "overhead_percent_at_default", "overhead_percent_at_default_longest"):
        assert f"{cost[key]}" in page, key


def test_the_faults_are_many_and_nothing_was_lost():
    every = entries()
    assert len(every) >= 200
    assert {e["group"] for e in every} == set(GROUPS)
    assert not [e for e in every if not e["ok"] or e["lost"] or e["mixed"] or e["traceback"] or e["hang"]]


CRASHES = ["kills:35", "publishing:30", "signals:20", "disk:12", "files:25", "recipes:25"]


@pytest.mark.parametrize("groups", [CRASHES, ["processes:6"]], ids=["one process", "two processes"])
def test_a_sample_of_the_faults(groups: list[str]):
    chosen = [word for group in groups for word in ("--group", group)]
    command = [sys.executable, "-m", "tests.reliability.faults", *chosen, "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok ")
