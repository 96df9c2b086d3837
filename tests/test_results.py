"""Published tables are what the sidecars in the repository say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtlctl.bench import collision, training
from dtlctl.many import compare as comparison
from dtlctl.report import audit, grids, summary, tables

ROOT = Path(__file__).parents[1]
STUDIES = sorted({path.parent.parent for path in (ROOT / "docs" / "results").glob("*/*/recipe.json")})


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_shows_the_table_of_its_sidecars(study: Path):
    runs = sorted(path.parent for path in study.glob("*/recipe.json"))
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    for part in tables.markdown(summary.summarise(runs)).strip().split("\n\n"):
        assert part in page, f"{study.name}: the page does not show\n{part}"
    for part in (p for run in runs if (audits := audit.read(run)) for p in audit.tables(audits)):
        assert part in page, f"{study.name}: the page does not show\n{part}"


def test_there_are_studies():
    assert {study.name for study in STUDIES} >= {"quickstart"}


def test_the_readme_shows_one_of_the_runs():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.markdown(summary.summarise([ROOT / "docs/results/quickstart/seed-0"])).strip() in page


BENCHES = sorted((ROOT / "docs/results/bench").glob("*.json"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_the_page_on_performance_shows_what_was_measured(path: Path):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"<!-- bench: {path.stem} -->\n")
    shown, text = (
        rest.partition("<!-- end bench -->")[0],
        (training if path.stem.startswith("train_") else collision).text,
    )
    assert found and shown.strip() == f"```text\n{text(json.loads(path.read_text()))}\n```"


def test_the_page_on_performance_shows_what_was_printed():
    """Where the sidecar of a benchmark was lost, what it printed was kept."""
    printed = (ROOT / "docs/results/bench/train_h200.txt").read_text(encoding="utf-8")
    assert f"```text\n{printed.strip()}\n```" in (ROOT / "docs/performance.md").read_text(encoding="utf-8")


def test_two_processes_made_what_one_made():
    """The page's numbers are those of the two sidecars, and of the comparison of their weights."""
    folder = ROOT / "docs/results/two_processes"
    one, two = (json.loads((folder / run / "gc.json").read_text()) for run in ("one", "two"))
    page = folder.with_suffix(".md").read_text(encoding="utf-8")
    assert (one["processes"], two["processes"], one["precision"]) == (1, 2, "float64")
    assert one["key"] == two["key"] and one["metrics"] == two["metrics"]
    for name, value in one["metrics"].items():
        assert f"| {name.capitalize()} after 800 steps (%) | {value:.6f} | {value:.6f} |" in page
    difference = json.loads((folder / "difference.json").read_text())["largest_relative_difference"]
    assert f"{difference:.1e} (`difference.json`)" in page


def test_the_curve_and_the_match_show_their_documents():
    """The sweep's table is that of its table.json; who needed which λ is what compare.json says."""
    folder = ROOT / "docs/results"
    curve = json.loads((folder / "quickstart_curve/table.json").read_text())
    for part in grids.markdown(curve).strip().split("\n\n"):
        assert part in (folder / "quickstart_curve.md").read_text(encoding="utf-8")
    for name in ("quickstart_matched", "tin100_matched", "tin100_fresh", "tin100_target", "tin100_both", "tin100_gpu"):
        found = json.loads((folder / name / "compare.json").read_text())
        for part in comparison._needed(found):
            assert part in (folder / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("document", "label"),
    [
        ("quickstart_matched/compare.json", "{}"),
        ("tin100_matched/compare.json", "{}"),
        ("tin100_matched/first_search.json", "{}, first search"),
        ("tin100_fresh/compare.json", "{}"),
        ("tin100_target/compare.json", "{}"),
        ("tin100_target/tried.json", "{}, tried before"),
        ("tin100_both/compare.json", "{}"),
        ("tin100_both/tried.json", "{}, tried beside"),
        ("tin100_parts/tried.json", "{}"),
        ("tin100_gpu/compare.json", "{}"),
        ("tin100_gpu/unfinished.json", "{}, not attacked"),
    ],
)
def test_a_match_shows_every_value_of_lambda_that_was_tried(document: str, label: str):
    """A row a loss: each λ, the mean of what it cost, and each seed's; in the order in which they were tried."""
    path = ROOT / "docs/results" / document
    page = path.parent.with_suffix(".md").read_text(encoding="utf-8")
    for variant, found in json.loads(path.read_text(encoding="utf-8"))["variants"].items():
        tried = [
            f"{one['lambda']:g}: diverged"
            if one["drop"] is None
            else f"{one['lambda']:g}: {one['drop']:.1f} ({', '.join(f'{drop:.1f}' for drop in one['drops'])})"
            for one in found["tried"]
        ]
        assert f"| {label.format(variant)} | {'; '.join(tried)} |" in page
