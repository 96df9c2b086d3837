"""Faults are injected again, a sample of them or all, and docs/reliability.md shows what its sidecars say."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.reliability import faults, page
from tests.reliability.fork import together

needs = pytest.mark.skipif(not list(page.RESULTS.glob("*.json")), reason="no full run of the faults was kept yet")


@needs
def test_the_page_shows_what_the_sidecars_say():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.table(page.entries()) in text
    assert page.cost() in text


@needs
def test_the_faults_are_many_and_nothing_was_lost():
    every = page.entries()
    assert len(every) >= 200
    assert {e["group"] for e in every} == set(page.GROUPS)
    assert not [e for e in every if not e["ok"] or e["lost"] or e["mixed"] or e["traceback"] or e["hang"]]


SAMPLE = ["kills:50", "publishing:45", "signals:30", "disk:18", "files:35", "recipes:25"]


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(SAMPLE, id="a fixed sample"),
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_by_a_fault(groups: list[str], tmp_path: Path):
    chosen = [word for group in groups for word in ("--group", group)]
    done = together(partial(faults.main, [*chosen, "--seed", "1"]), tmp_path, patience=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok ")
