"""A report tells results of other data than its recipe's from the sidecars alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtlctl.errors import CheckpointError
from dtlctl.recipe.loading import load
from dtlctl.report import summary, tables
from dtlctl.run.experiment import Experiment
from dtlctl.stages.runner import run


def new_experiment(recipe_file: Path, *changes: str) -> Experiment:
    return Experiment(load(recipe_file, list(changes)), recipe_file.parent / "runs", quiet=True)


@pytest.fixture
def finished(finished: Path) -> Path:
    """The folder of the tiny recipe's run, everything done."""
    return finished.parent / "runs" / "tiny"


def rows(folder: Path) -> dict[str, dict]:
    return {row["model"]: row for row in summary.summarise([folder])["rows"]}


def test_results_of_another_fraction_or_augmentation_are_left_out(recipe_file: Path, finished: Path):
    """One stage again, with another table: the attacks that stand in the folder were not made as its recipe says.

    0.031 draws as many images of a class as 0.03 does: the same ones.
    """
    before = rows(finished)
    assert before["TL"]["piggyback"].keys() == {"again"}
    for change, attacked in (
        ("data.piggyback.again.fraction=0.5", False),
        ("data.piggyback.again.augment=crop-flip", False),
        ("data.piggyback.again.fraction=0.031", True),
    ):
        other = new_experiment(recipe_file, change)
        with other.results.opened():
            run(other, ("pretrain",))
        found = summary.summarise([finished])
        assert [bool(row["piggyback"]) for row in found["rows"] if row["model"] in ("TL", "gc")] == [attacked] * 2
        assert not [sentence for sentence in found["caveats"] if sentence.startswith("data.")]
    with new_experiment(recipe_file, "data.target.fraction=0.5").results.opened():
        assert rows(finished).keys() == {"scratch", "pre"}
    with new_experiment(recipe_file).results.opened():
        assert rows(finished) == before


def test_a_dataset_that_has_another_name_now_is_named_below_the_tables(recipe_file: Path, finished: Path):
    """It may be the same one, and what `run` calls up to date is not left out; the data may be out of reach."""
    path = finished / "recipe.json"
    recipe, before = json.loads(path.read_text()), rows(finished)
    recipe["data"]["piggyback"]["again"] |= {"path": "elsewhere/now", "test": "valid", "revision": "v1"}
    path.write_text(json.dumps(recipe))
    table = summary.summarise([finished])
    assert {row["model"]: row for row in table["rows"]} == before
    sentence = (
        'data.piggyback.again for scratch, TL, gc: made with path = "builtin:digits", revision = null, test = "test"; '
        'the recipe has path = "elsewhere/now", revision = "v1", test = "valid". '
        "What saw other images is made again by dtlctl run RECIPE."
    )
    assert table["caveats"][-1] == sentence
    assert f"\n\n{sentence}\n\n" in tables.markdown(table)


@pytest.mark.parametrize(
    "datasets",
    [
        3,
        {},
        {"piggyback.again": {"table": 3}},
        {"piggyback.again": {"class_images": 1}},
        {"piggyback.again": {"table": {}}},
    ],
)
def test_datasets_that_are_none_are_named(finished: Path, datasets: object):
    path = finished / "piggyback/TL/again.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "datasets": datasets}))
    with pytest.raises(CheckpointError, match=r"TL/again\.json: not the data of piggyback; delete it"):
        summary.summarise([finished])
