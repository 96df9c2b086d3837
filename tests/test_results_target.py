"""The page on retaining with the target's images: every number is that of its sidecars."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

STUDY = Path(__file__).parents[1] / "docs/results/tin100_target"
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
SEEDS = (6, 7, 8)
LOSSES = ("null-tgt", "rand-tgt")
DATASETS = ("tin100-10", "tin20b")
ATTACKERS = {"tuned": "acc_pl_worst", "one setting": "acc_pl"}
METRICS = {**ATTACKERS, "best of all": "acc_pl_max"}


def pl(model: str, dataset: str, attacker: str, study: Path = STUDY) -> list[float]:
    """PL seed by seed, of the one setting, of the tuned attacker, or of one of his kinds."""
    found = []
    for seed in SEEDS:
        path = study / f"matched-{seed}/piggyback/{model}/{dataset}.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        assert document["seed"] == seed
        kinds = {one["kind"]: one["acc_pl"] for one in document["metrics"]["attackers"]}
        found.append({**kinds, **{name: document["metrics"][key] for name, key in METRICS.items()}}[attacker])
    return found


def drops(model: str, dataset: str, attacker: str, study: Path = STUDY) -> list[float]:
    """Points of PL below TL, seed by seed."""
    pairs = zip(pl("TL", dataset, attacker, study), pl(model, dataset, attacker, study), strict=True)
    return [before - after for before, after in pairs]


def interval(three: list[float]) -> str:
    """Mean ± half width of the 95 % t interval of three seeds."""
    return f"{mean(three):.1f} ± {4.3027 * stdev(three) / 3**0.5:.1f}"  # t(0.975, 2)


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_page_shows_what_running_statistics_hide(dataset: str):
    for model in ("TL", *LOSSES):
        cells = [interval(pl(model, dataset, attacker)) for attacker in ("probe", "renorm-probe", "tuned")]
        assert f"| {model} | {dataset} | {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("attacker", [*ATTACKERS, "probe"])
def test_the_page_shows_what_each_loss_takes_by_seed(dataset: str, attacker: str):
    """And how many times RAND's drop that of `null-space` is: by seed, and of the means."""
    taken = {model: drops(model, dataset, attacker) for model in LOSSES}
    for model, three in taken.items():
        points = " | ".join(f"{one:.1f}" for one in three)
        assert f"| {model} | {dataset} | {attacker} | {points} | {interval(three)} |" in PAGE
    ours, theirs = ([*taken[model], mean(taken[model])] for model in LOSSES)
    times = " | ".join(f"{one / other:.1f}" for one, other in zip(ours, theirs, strict=True))
    assert f"| times | {dataset} | {attacker} | {times} |" in PAGE


def test_the_page_says_what_null_space_is_ahead_by():
    below = [
        interval([rand - null for null, rand in zip(*(pl(one, name, "tuned") for one in LOSSES), strict=True)])
        for name in DATASETS
    ]
    taken = [[interval(drops(model, name, "tuned")) for name in DATASETS] for model in LOSSES]
    (own, other), (theirs, their_other) = taken
    alike = [f"{interval(drops(model, name, 'probe'))}" for model in ("rand-tgt", "null-tgt") for name in DATASETS]
    assert "here they take {} and {}, and {} and {}.".format(*alike) in PAGE
    assert f"it takes {own} points on a tenth of the source's images and {other} on 20 others" in PAGE
    assert f"RAND {theirs} and {their_other}: 1.4 and 1.5 times. He gets {below[0]} and {below[1]} points less" in PAGE


def test_the_page_shows_attackers_with_other_learning_rates():
    """By seed, and with what held-out images choose of these and the probes; then the differences."""
    best: dict[str, list[float]] = {}
    for model in ("TL", *LOSSES):
        full = [json.loads((STUDY / f"lr/seed-{seed}/{model}.json").read_text())["metrics"] for seed in SEEDS]
        probes = [json.loads((STUDY / f"matched-{seed}/piggyback/{model}/tin100-10.json").read_text())["metrics"]
                  for seed in SEEDS]  # fmt: skip
        assert all(abs(one["acc_pl"] - two["acc_pl"]) <= 0.25 for one, two in zip(full, probes, strict=True))
        mine = [one["acc_pl_worst"] for one in full]
        best[model] = [
            max(one["chosen"] + two["attackers"], key=lambda strike: strike["val"])["acc_pl"]
            for one, two in zip(full, probes, strict=True)
        ]
        cells = [*(f"{one:.1f}" for one in mine), interval(mine), interval(best[model])]
        assert f"| {model} | {' | '.join(cells)} |" in PAGE
    below = [theirs - ours for ours, theirs in zip(*(best[model] for model in LOSSES), strict=True)]
    first, second, third = (f"{points:.1f}" for points in below)
    taken = [[tl - one for tl, one in zip(best["TL"], best[model], strict=True)] for model in LOSSES]
    assert f"gets {first}, {second} and {third} points less" in PAGE and f"({interval(below)})" in PAGE
    ours, theirs = map(interval, taken)
    times = f"{mean(taken[0]) / mean(taken[1]):.1f}"
    assert f"{ours} points less than from `TL`, and {theirs} from `rand-tgt`: {times} times" in PAGE
