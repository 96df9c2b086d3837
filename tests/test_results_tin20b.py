"""The page on another target, under the settings found for the first: its numbers are those of its sidecars."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from tests.test_results_both import STUDY as BOTH
from tests.test_results_target import SEEDS, drops, interval, pl
from tests.test_results_target import STUDY as TARGET

STUDY = TARGET.with_name("tin100_tin20b")
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
DATASETS = ("tin100-10", "cifar10")
ATTACKERS = ("tuned", "one setting", "probe", "renorm-probe", "best of all")
LOSSES = {"null-both": BOTH, "rand-both": BOTH, "rand-tgt": TARGET}
"""Each loss, and the study of the first target that has it."""
BASELINES = ("rand-both", "rand-tgt")
PRICES = json.loads((STUDY / "prices.json").read_text(encoding="utf-8"))


def sidecar(model: str, study: Path, seed: int) -> dict:
    path = study / f"matched-{seed}/dispose/{model}/model.json"
    return json.loads(path.read_text(encoding="utf-8"))


def less(baseline: str, dataset: str, attacker: str = "tuned") -> list[float]:
    """Points of PL that an attacker gets less from `null-both` than from a baseline, seed by seed."""
    pairs = zip(pl(baseline, dataset, attacker, STUDY), pl("null-both", dataset, attacker, STUDY), strict=True)
    return [theirs - ours for theirs, ours in pairs]


def test_every_setting_is_that_of_the_first_target():
    """And so is the pre-trained network: the target's data alone differ."""
    for seed in SEEDS:
        for model, study in LOSSES.items():
            ours, theirs = sidecar(model, STUDY, seed), sidecar(model, study, seed)
            assert ours["settings"] == theirs["settings"]
            assert ours["data"]["source"] == theirs["data"]["source"]
            assert ours["data"]["target"]["images"] == theirs["data"]["target"]["images"] == 500
            assert ours["data"]["target"]["train"] != theirs["data"]["target"]["train"]
        parents = {sidecar(model, STUDY, seed)["parent"]["TL"] for model in LOSSES}
        tl = [json.loads((study / f"matched-{seed}/finetune/model.json").read_text()) for study in (STUDY, BOTH)]
        assert parents == {tl[0]["weights_sha256"]} and tl[0]["parent"] == tl[1]["parent"]


@pytest.mark.parametrize("model", LOSSES)
def test_the_page_shows_what_each_loss_costs(model: str):
    """On validation images, here and on the first target, and on test images here."""
    first = json.loads((LOSSES[model] / "compare.json").read_text(encoding="utf-8"))["variants"][model]["drop"]
    tl = [json.loads((STUDY / f"matched-{seed}/finetune/model.json").read_text())["metrics"]["acc_t"] for seed in SEEDS]
    test = [before - sidecar(model, STUDY, s)["metrics"]["acc_t"] for before, s in zip(tl, SEEDS, strict=True)]
    found = PRICES["variants"][model]
    assert found["drop"] == pytest.approx(mean(found["drops"]), abs=1e-3)
    seeds = ", ".join(f"{drop:.1f}" for drop in found["drops"])
    lam = sidecar(model, STUDY, SEEDS[0])["settings"]["lambda"]
    assert f"| {model} | {lam:g} | {first:.1f} | {found['drop']:.1f} ({seeds}) | {interval(test)} |" in PAGE


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_page_shows_what_each_loss_takes_by_seed(dataset: str, attacker: str):
    """And how many points less he gets from `null-both` than from either RAND."""
    for model in LOSSES:
        three = drops(model, dataset, attacker, STUDY)
        points = " | ".join(f"{one:.1f}" for one in three)
        assert f"| {model} | {dataset} | {attacker} | {points} | {interval(three)} |" in PAGE
    for baseline in BASELINES:
        row = f"| null-both below {baseline} | {dataset} | {attacker} |"
        three = less(baseline, dataset, attacker)
        assert f"{row} {' | '.join(f'{one:.1f}' for one in three)} | {interval(three)} |" in PAGE


def test_the_page_says_what_carries_over():
    """Prices and drops, and the drops of `null-both` as multiples of RAND's."""
    own, other = DATASETS
    price = {model: f"{PRICES['variants'][model]['drop']:.1f}" for model in LOSSES}
    taken = {(m, d, a): interval(drops(m, d, a, STUDY)) for m in LOSSES for d in DATASETS for a in ATTACKERS}
    short = "`null-both` costs {} points and takes {} from the tuned attacker on the source's own classes; RAND"
    assert short.format(price["null-both"], taken["null-both", own, "tuned"]) in PAGE
    rest = "costs {} and {} and takes {} and {}."
    assert rest.format(*(price[m] for m in BASELINES), *(taken[m, own, "tuned"] for m in BASELINES)) in PAGE
    assert f"{price['null-both']} points here, 0.8 with CIFAR-10" in PAGE
    assert f"{price['rand-both']} with both datasets' images and {price['rand-tgt']} with the target's" in PAGE
    less_left = [interval(less(baseline, own)) for baseline in BASELINES]
    ratios = [
        f"{mean(drops('null-both', own, 'tuned', STUDY)) / mean(drops(m, own, 'tuned', STUDY)):.1f}" for m in BASELINES
    ]
    assert "{} and {} points less are left to him, {} and {} times the drop".format(*less_left, *ratios) in PAGE
    words = "he loses {} points by `null-both`, {} and {} by RAND: of the two probes"
    assert words.format(*(taken[m, other, "tuned"] for m in LOSSES)) in PAGE
    words = "loses {} points by `null-both` and next to nothing by RAND, {} and {}."
    assert words.format(*(taken[m, other, "one setting"] for m in LOSSES)) in PAGE
    ahead = interval([-one for one in less("rand-tgt", other, "renorm-probe")])
    assert f"the probe with renewed statistics gets {ahead} points less than from `null-both`" in PAGE
    assert f"on seed 8 RAND with both costs {PRICES['variants']['rand-both']['drops'][2]:.1f}." in PAGE


def test_the_readme_says_it_too():
    readme = (STUDY.parents[2] / "README.md").read_text(encoding="utf-8")
    price, taken = (
        [f"{PRICES['variants'][m]['drop']:.1f}" for m in LOSSES],
        [interval(drops(m, "tin100-10", "tuned", STUDY)) for m in LOSSES],
    )
    assert "the loss of the last row costs {} points and takes {} on".format(price[0], taken[0]) in readme  # noqa: UP032
    assert f"random labels cost {price[1]} and {price[2]} and take {taken[1]} and {taken[2]}" in readme
