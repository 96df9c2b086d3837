"""What of its data a run decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtlctl.data import entry
from dtlctl.many.compare import held_back
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment


def test_a_large_split_is_decoded_as_far_as_it_is_drawn(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """1,000 digits of which the target draws 2 %. Another seed draws others of the same listing; held-back images are
    decoded for whoever compares, and change no key."""
    monkeypatch.setattr(entry, "WHOLE", 0)
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    first, second = (Experiment(load(recipe_file, [f"seed={seed}"]), tmp_path, quiet=True) for seed in (0, 1))
    one, two = (experiment.data.identity("target") for experiment in (first, second))
    assert (one["train"], one["test"], one["images"]) == (two["train"], two["test"], 20)
    assert one["drawn"] != two["drawn"] and one["index"] != two["index"]
    images = first.data.images("target", "train")
    assert images.rows.tolist() == first.data.index("target").tolist()
    drawn = {row for experiment in (first, second) for row in experiment.data.index("target").tolist()}
    assert not any(images.pixels[row].any() for row in range(1000) if row not in drawn)
    assert len(held_back(first)) == 980 and all(images.pixels[row].any() for row in held_back(first))
    assert Experiment(first.recipe, tmp_path, quiet=True).data.identity("target") == one
