"""The page on performance shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtlctl.bench import collision, training

ROOT = Path(__file__).parents[2]
BENCHES = sorted((ROOT / "docs/results/bench").glob("*.json"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_the_page_shows_what_a_sidecar_says(path: Path):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"<!-- bench: {path.stem} -->\n")
    shown, text = (
        rest.partition("<!-- end bench -->")[0],
        (training if path.stem.startswith("train_") else collision).text,
    )
    assert found and shown.strip() == f"```text\n{text(json.loads(path.read_text()))}\n```"


def test_the_page_shows_what_was_printed():
    """Where the sidecar of a benchmark was lost, what it printed was kept."""
    printed = (ROOT / "docs/results/bench/train_h200.txt").read_text(encoding="utf-8")
    assert f"```text\n{printed.strip()}\n```" in (ROOT / "docs/performance.md").read_text(encoding="utf-8")
