"""The page of curves on photographs: every number is that of its sidecars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

STUDY = Path(__file__).parents[1] / "docs/results/tin100_curves"
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
SEEDS = (6, 7, 8)
REFERENCES = ("scratch", "TGT", "pre", "TL")
LOSSES = ("gc", "rand", "unif", "neg", "null", "null-fresh")
NO_LAMBDA = ("fresh", "distilled")
CURVES = ("gc", "rand", "null", "null-fresh")
ODDS = ("0.4", "1", "2.5")
RETAINING = [
    ("SRC-KD", "gc", (6, 7)),
    ("TGT-KD", "gc-tgt-kd", (6, 7)),
    ("TGT-CE", "gc-tgt-ce", (6, 7)),
    ("TGT-A-GEM", "gc-tgt-a-gem", (6, 7)),
    ("rand", "rand-tgt-kd", (6,)),
    ("null", "null-tgt-kd", (6,)),
]
ATTACKERS = ("acc_pl_worst", "acc_pl")  # tuned, and of one setting


def sidecars(path: str, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Of these seeds."""
    found = [json.loads((STUDY / path.format(seed)).read_text(encoding="utf-8")) for seed in seeds]
    assert [one["seed"] for one in found] == [*seeds]
    return found


def interval(three: list[float], sign: str = "") -> str:
    """Mean ± half width of the 95 % t interval of three seeds."""
    return f"{mean(three):{sign}.1f} ± {4.3027 * stdev(three) / 3**0.5:.1f}"  # t(0.975, 2)


def metric(path: str, name: str, seeds: Sequence[int] = SEEDS) -> list[float]:
    return [one["metrics"][name] for one in sidecars(path, seeds)]


def price(path: str) -> list[float]:
    """Points of Acc_t from TL on the test images, seed by seed."""
    return [
        own - tl
        for own, tl in zip(metric(f"{path}/model.json", "acc_t"), metric("TL/seed-{}.json", "acc_t"), strict=True)
    ]


def fraction_row(model: str) -> str:
    """Fig. 5: PL on a tenth of the source's images by both attackers, with 2.5, 10 and 40 % of the images."""
    paths = [f"fraction/{gamma}/seed-{{}}/{model}.json" for gamma in ("0.025", "0.1", "0.4")]
    return " | ".join([model, *(interval(metric(path, attacker)) for attacker in ATTACKERS for path in paths)])


def below_on_validation(model: str, odds: str) -> float:
    """Mean points of Acc_t below TL on target images that nothing is trained or tested on."""
    validation = json.loads((STUDY / "validation.json").read_text(encoding="utf-8"))
    return mean(validation[f"{seed}/TL"] - validation[f"{seed}/{model}/{odds}"] for seed in SEEDS)


def taken(path: str) -> list[str]:
    """PL on both datasets, by the tuned attacker and by the one setting."""
    return [
        interval(metric(f"{path}/{name}.json", attacker)) for name in ("tin100-10", "tin20b") for attacker in ATTACKERS
    ]


def curve_row(model: str, odds: str) -> str:
    """Fig. 6a: what λ is, what it costs on validation and on test images, and what both attackers get."""
    path = f"lambda/{odds}/seed-{{}}/{model}"
    (lam,) = {one["settings"]["lambda"] for one in sidecars(f"{path}/model.json")}
    cells = [f"{lam:.3g}", f"{below_on_validation(model, odds):.1f}", interval(price(path), "+"), *taken(path)]
    return " | ".join([model, *cells])


def drop_row(model: str, odds: str) -> str:
    """Points of PL below TL under the tuned attacker, seed by seed."""
    cells, before = [], "../tin100_matched/matched-{}/piggyback/TL"
    for name in ("tin100-10", "tin20b"):
        pairs = zip(
            *(metric(f"{at}/{name}.json", ATTACKERS[0]) for at in (before, f"lambda/{odds}/seed-{{}}/{model}")),
            strict=True,
        )
        cells.append(interval([tl - own for tl, own in pairs]))
    (lam,) = {one["settings"]["lambda"] for one in sidecars(f"lambda/{odds}/seed-{{}}/{model}/model.json")}
    return " | ".join([model, f"{lam:.3g}", f"{below_on_validation(model, odds):.1f}", *cells])


def part_row(model: str) -> str:
    """What a variant without λ costs, on validation images too, and what both attackers get."""
    path = f"no-lambda/seed-{{}}/{model}"
    return " | ".join([model, f"{below_on_validation(model, '1'):.1f}", interval(price(path), "+"), *taken(path)])


def retaining_row(name: str, model: str, seeds: tuple[int, ...]) -> str:
    """Fig. 6b, seed by seed: points of Acc_t from TL on validation and on test images, and PL by both attackers."""
    validation = json.loads((STUDY / "retain/validation.json").read_text(encoding="utf-8"))
    own, tl = (metric(f"retain/seed-{{}}/{one}/model.json", "acc_t", seeds) for one in (model, "TL"))
    prices = [
        [validation[f"{seed}/{model}"] - validation[f"{seed}/TL"] for seed in seeds],
        [after - before for after, before in zip(own, tl, strict=True)],
    ]
    cells = [", ".join(f"{price:+.1f}" for price in column) for column in prices]
    cells += [
        ", ".join(f"{pl:.1f}" for pl in metric(f"retain/seed-{{}}/{model}/{data}.json", attacker, seeds))
        for data in ("tin100-10", "tin20b")
        for attacker in ATTACKERS
    ]
    return " | ".join([name, *cells])


@pytest.mark.parametrize("model", [*REFERENCES, *LOSSES, *NO_LAMBDA])
def test_the_page_shows_what_more_images_give_the_attacker(model: str):
    assert f"| {fraction_row(model)} |" in PAGE


@pytest.mark.parametrize("odds", ODDS)
def test_the_page_shows_every_point_of_the_curves(odds: str):
    for model in CURVES:
        assert f"| {curve_row(model, odds)} |" in PAGE
        assert f"| {drop_row(model, odds)} |" in PAGE


@pytest.mark.parametrize("model", NO_LAMBDA)
def test_the_page_shows_what_each_part_does(model: str):
    assert f"| {part_row(model)} |" in PAGE


@pytest.mark.parametrize(("name", "model", "seeds"), RETAINING)
def test_the_page_shows_what_each_retaining_loss_does(name: str, model: str, seeds: tuple[int, ...]):
    assert f"| {retaining_row(name, model, seeds)} |" in PAGE


def test_the_page_tells_what_is_taken_where_the_target_is_distilled():
    """TL in both seeds, and how far below it the tuned attacker is on RAND and null-space on seed 6."""
    acc_t = [f"{value:.1f}" for value in metric("retain/seed-{}/TL/model.json", "acc_t", (6, 7))]
    assert f"TL has {' and '.join(acc_t)} % of Acc_t" in PAGE
    for data, said in (("tin100-10", "on tin100-10 (one setting: {}, {})"), ("tin20b", "on tin20b ({}, {})")):
        values = [pl for attacker in ATTACKERS for pl in metric(f"retain/seed-{{}}/TL/{data}.json", attacker, (6, 7))]
        assert ("{} and {} % " + said).format(*(f"{pl:.1f}" for pl in values)) in PAGE
    taken = []
    for model in ("null-tgt-kd", "rand-tgt-kd"):
        for data in ("tin100-10", "tin20b"):
            (before,), (after,) = (
                metric(f"retain/seed-{{}}/{one}/{data}.json", ATTACKERS[0], (6,)) for one in ("TL", model)
            )
            taken.append(f"{before - after:.1f}")
    said = "takes {} points from the tuned attacker on the source's own classes, and {} on 20 others; RAND {} and {}."
    assert said.format(*taken) in PAGE
