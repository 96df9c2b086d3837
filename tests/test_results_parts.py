"""The page on what each part of `null-both` takes, and on a network that never saw the source, against its sidecars."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from tests.test_results_both import FREE
from tests.test_results_both import STUDY as BOTH
from tests.test_results_target import DATASETS, SEEDS, interval, pl
from tests.test_results_target import STUDY as TARGET

STUDY = TARGET.with_name("tin100_parts")
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
ATTACKERS = ("tuned", "one setting", "probe", "renorm-probe")
PARTS = {
    "fresh-both": ("fresh-both", STUDY / "fresh-both"),
    "rand-fresh, λ = 0.7": ("rand-fresh", STUDY / "rand-fresh-0.7"),
    "null-both, λ = 0.85": ("null-both", FREE),
    "rand-fresh, λ = 0.8": ("rand-fresh", STUDY / "rand-fresh-0.8"),
    "null-both, λ = 0.9": ("null-both", BOTH),
}
"""By the page's name of a row: the model, and where its sidecars are."""
PAIRS = (("rand-fresh, λ = 0.7", "null-both, λ = 0.85"), ("rand-fresh, λ = 0.8", "null-both, λ = 0.9"))
STRANGERS = {f"TGT, {n} images": ("TGT", STUDY / f"TGT-{n}") for n in (500, 2500)}
TRIED = {
    (variant, one["lambda"]): one
    for name in ("tried.json", "../tin100_both/compare.json", "../tin100_both/tried.json")
    for variant, found in json.loads((STUDY / name).read_text(encoding="utf-8"))["variants"].items()
    for one in found["tried"]
}


def sidecar(model: str, study: Path, seed: int) -> dict:
    stage = "target-only" if model == "TGT" else f"dispose/{model}"
    return json.loads((study / f"matched-{seed}/{stage}/model.json").read_text(encoding="utf-8"))


def acc_t(model: str, study: Path) -> list[float]:
    return [sidecar(model, study, seed)["metrics"]["acc_t"] for seed in SEEDS]


def less(other: list[float], ours: list[float]) -> list[float]:
    return [a - b for a, b in zip(other, ours, strict=True)]


def below(model: str, dataset: str, attacker: str, study: Path) -> list[float]:
    """Points of PL below TL, which is the same model in all of these studies, seed by seed."""
    return less(pl("TL", dataset, attacker), pl(model, dataset, attacker, study))


def test_the_parts_are_disposals_of_the_same_models():
    """They differ in the loss and its weight alone, and in the seed."""
    aside = dict.fromkeys(("unlearn", "lambda"))
    for seed in SEEDS:
        made = [sidecar(model, study, seed) for model, study in PARTS.values()]
        assert len({json.dumps([one["parent"], {**one["settings"], **aside}], sort_keys=True) for one in made}) == 1


@pytest.mark.parametrize("images", [500, 2500])
def test_the_strangers_saw_so_many_images_of_the_target_and_no_others(images: int):
    """Trained as TGT is; tested on the images that TL is tested on."""
    for seed in SEEDS:
        made, ours = sidecar("TGT", STUDY / f"TGT-{images}", seed), sidecar("null-both", BOTH, seed)
        assert [*made["data"]] == ["target"] and made["data"]["target"]["images"] == images and not made["parent"]
        assert made["data"]["target"]["test"] == ours["data"]["target"]["test"]


@pytest.mark.parametrize("row", PARTS)
def test_the_page_shows_what_each_part_costs(row: str):
    model, study = PARTS[row]
    one = TRIED[model, sidecar(model, study, SEEDS[0])["settings"]["lambda"]]
    each = ", ".join(f"{drop:.1f}" for drop in one["drops"])
    assert f"| {row} | {one['drop']:.1f} ({each}) | {interval(acc_t(model, study))} |" in PAGE
    before = [json.loads((BOTH / f"matched-{seed}/finetune/model.json").read_text(encoding="utf-8")) for seed in SEEDS]
    assert f"(`TL`: {interval([one['metrics']['acc_t'] for one in before])})" in PAGE


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_page_shows_what_each_part_takes_by_seed(dataset: str, attacker: str):
    for row, (model, study) in PARTS.items():
        three = below(model, dataset, attacker, study)
        points = " | ".join(f"{one:.1f}" for one in three)
        assert f"| {row} | {dataset} | {attacker} | {points} | {interval(three)} |" in PAGE


def ahead(rand: str, null: str, dataset: str, attacker: str) -> str:
    """How much less an attacker gets from `null-both` than from RAND with the same stages."""
    theirs, ours = (pl(model, dataset, attacker, study) for model, study in (PARTS[rand], PARTS[null]))
    return interval(less(theirs, ours))


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_page_shows_what_null_space_is_ahead_by_at_each_price(dataset: str):
    for rand, null in PAIRS:
        cells = [ahead(rand, null, dataset, attacker) for attacker in (*ATTACKERS, "best of all")]
        assert f"| {null} | {rand} | {dataset} | {' | '.join(cells)} |" in PAGE


def test_null_space_is_ahead_on_every_seed_and_on_others_beyond_the_interval():
    """The page's claim, no less and no more."""
    for rand, null in PAIRS:
        for dataset in DATASETS:
            theirs, ours = (pl(model, dataset, "tuned", study) for model, study in (PARTS[rand], PARTS[null]))
            assert all(a > b for a, b in zip(theirs, ours, strict=True))
            middle, _, half = ahead(rand, null, dataset, "tuned").partition(" ± ")
            assert (float(middle) > float(half)) == (dataset == "tin20b")
    for part in ("at λ = 0.9 by {} points on the source's own classes and {} on others", "cost nothing, by {} and {}."):
        rand, null = PAIRS["0.9" in part]
        assert part.format(*(ahead(rand, null, dataset, "tuned") for dataset in DATASETS)) in PAGE
    with_stages = [interval(below("rand-fresh", d, "tuned", STUDY / "rand-fresh-0.8")) for d in DATASETS]
    without = [interval(below("rand-both", d, "tuned", BOTH)) for d in DATASETS]
    assert (
        "takes {} and {} points for 0.8; with them, at λ = 0.8, {} and {} for 1.7".format(*without, *with_stages)
        in PAGE
    )


LEFT = {
    "TL": ("TL", TARGET),
    "rand-tgt": ("rand-tgt", TARGET),
    "null-both, λ = 0.9": ("null-both", BOTH),
    **STRANGERS,
}


@pytest.mark.parametrize("row", LEFT)
def test_the_page_shows_what_is_left_beside_what_a_stranger_has(row: str):
    model, study = LEFT[row]
    kinds = ("tuned", "one setting", "best of all")
    cells = [interval(pl(model, dataset, kind, study)) for dataset in DATASETS for kind in kinds]
    assert f"| {row} | {' | '.join(cells)} |" in PAGE


def test_the_page_says_what_there_is_to_take():
    """How far a stranger as good on the target is below TL, the share of it that is taken, and what twice would be."""
    stranger = STRANGERS["TGT, 2500 images"]
    assert f"has {interval(acc_t(*stranger))} % on the target" in PAGE
    for dataset, words in zip(DATASETS, ("on the source's own classes", "on 20 others"), strict=True):
        room, taken = below("TGT", dataset, "tuned", stranger[1]), below("null-both", dataset, "tuned", BOTH)
        twice = 2 * max(
            mean(below("rand-tgt", dataset, "tuned", TARGET)), mean(below("rand-both", dataset, "tuned", BOTH))
        )
        assert (
            f"{words} he is {interval(room)} points below `TL`; `null-both` takes {interval(taken)}, "
            f"{100 * mean(taken) / mean(room):.0f} % of that; twice the better baseline would be {twice:.1f}"
        ) in PAGE


def test_the_short_of_it_is_that_of_the_tables():
    _, _, short = PAGE.partition("**In short**: ")
    (rand, fresh), (null, ours) = PARTS["rand-fresh, λ = 0.8"], PARTS["null-both, λ = 0.9"]
    taken = [f"{mean(below(m, d, 'tuned', s)):.1f}" for m, s in ((rand, fresh), (null, ours)) for d in DATASETS]
    first = "takes {} and {} points from the tuned attacker for 1.7 points of target accuracy, `null-both` {} and"
    assert first.format(*taken[:3]) + f" {taken[3]} for 0.8" in short
    models = (STRANGERS["TGT, 2500 images"], (null, ours), ("TL", TARGET))
    left = [f"{mean(pl(m, d, 'tuned', s)):.1f}" for m, s in models for d in DATASETS]
    assert "gives the attacker {} and {} %, `null-both` {} and {}, `TL` {} and {}.".format(*left) in short
    assert [f"{TRIED[key]['drop']:.1f}" for key in (("rand-fresh", 0.8), ("null-both", 0.9))] == ["1.7", "0.8"]


def test_the_readme_says_what_a_stranger_has():
    readme = (TARGET.parents[2] / "README.md").read_text(encoding="utf-8")
    model, study = STRANGERS["TGT, 2500 images"]
    own, others = (interval(pl(model, dataset, "tuned", study)) for dataset in DATASETS)
    assert f"gives him {own} and {others} %" in readme
    both = interval(pl("null-both", "tin20b", "tuned", BOTH)), interval(pl("TL", "tin20b", "tuned"))
    assert "On the others he gets {} %, from `TL` {}.".format(*both) in readme
    model, study = PARTS["rand-fresh, λ = 0.8"]
    taken = " | ".join(interval(below(model, dataset, "tuned", study)) for dataset in DATASETS)
    assert f"| Random labels, fresh stages | both | -1.7 | {taken} |" in readme


def test_the_page_says_what_was_looked_at_on_one_seed():
    """RAND at other λ, and a stranger with other numbers of images."""
    for lam, seed, words in (
        (0.85, 6, "`rand-fresh` at λ = 0.85 costs {:.1f} and takes {} and {}"),
        (0.75, 7, "at 0.75, on seed 7, it costs {:.1f} and takes {} and {}"),
    ):
        tried = TRIED["rand-fresh", lam]
        assert len(tried["drops"]) == len(tried["seeds"]) < 3
        folder = STUDY / f"one_seed/rand-fresh-{lam}/seed-{seed}"
        points = []
        for dataset in DATASETS:
            document = json.loads((folder / f"{dataset}.json").read_text(encoding="utf-8"))
            assert document["seed"] == seed
            before = pl("TL", dataset, "tuned")[SEEDS.index(seed)]
            points.append(f"{before - document['metrics']['acc_pl_worst']:.1f}")
        assert words.format(tried["drops"][tried["seeds"].index(seed)], *points) in PAGE
    more = [json.loads((STUDY / f"one_seed/TGT-5000/{name}.json").read_text()) for name in ("model", *DATASETS)]
    left = [one["metrics"]["acc_pl_worst"] for one in more[1:]]
    assert f"{more[0]['metrics']['acc_t']:.1f} % on the target and gives {left[0]:.1f} and {left[1]:.1f} %" in PAGE
    fewer = json.loads((STUDY / "one_seed/TGT-1750/model.json").read_text())
    assert f"with 1,750 it came to {fewer['metrics']['acc_t']:.1f} % and was not attacked" in PAGE
