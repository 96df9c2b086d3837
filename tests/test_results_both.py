"""The page on retaining with both datasets' images: its numbers are those of its sidecars and of tin100_target's."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from tests.test_results_target import DATASETS, SEEDS, drops, interval, pl
from tests.test_results_target import STUDY as TARGET

STUDY = TARGET.with_name("tin100_both")
FREE = STUDY / "free"
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
ATTACKERS = ("tuned", "one setting", "probe", "renorm-probe")
LOSSES = {
    "null-both": ("null-both", STUDY),
    "null-both, λ = 0.85": ("null-both", FREE),
    "rand-both": ("rand-both", STUDY),
    "rand-tgt": ("rand-tgt", TARGET),
    "null-tgt": ("null-tgt", TARGET),
}
"""By the page's name of a row: the model, and where its sidecars are."""
BASELINES = ("rand-both", "rand-tgt")


def taken(row: str, dataset: str, attacker: str) -> list[float]:
    model, study = LOSSES[row]
    return drops(model, dataset, attacker, study)


def left(row: str, dataset: str, attacker: str) -> list[float]:
    model, study = LOSSES[row]
    return pl(model, dataset, attacker, study)


def less(other: str, dataset: str, attacker: str = "tuned") -> str:
    """How much less is got from `null-both` than from another, seed by seed."""
    pairs = zip(left(other, dataset, attacker), left("null-both", dataset, attacker), strict=True)
    return interval([theirs - ours for theirs, ours in pairs])


def ratio(other: str, dataset: str, attacker: str = "tuned") -> str:
    return f"{mean(taken('null-both', dataset, attacker)) / mean(taken(other, dataset, attacker)):.1f}"


def test_all_losses_are_disposals_of_the_same_models_under_the_same_attackers():
    aside = dict.fromkeys(("unlearn", "retain", "lambda", "fresh_stages"))
    for seed in SEEDS:
        made = [
            json.loads((study / f"matched-{seed}/dispose/{model}/model.json").read_text(encoding="utf-8"))
            for model, study in LOSSES.values()
        ]
        assert len({json.dumps([one["parent"], {**one["settings"], **aside}], sort_keys=True) for one in made}) == 1
    for dataset in DATASETS:
        assert pl("TL", dataset, "tuned", STUDY) == pl("TL", dataset, "tuned", FREE) == pl("TL", dataset, "tuned")


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_page_shows_what_each_loss_takes_by_seed(dataset: str, attacker: str):
    """And how many times RAND's drop that of `null-both` is: by seed, and of the means."""
    for row in LOSSES:
        three = taken(row, dataset, attacker)
        points = " | ".join(f"{one:.1f}" for one in three)
        assert f"| {row} | {dataset} | {attacker} | {points} | {interval(three)} |" in PAGE
    for baseline in BASELINES:
        ours, rand = ([*(found := taken(row, dataset, attacker)), mean(found)] for row in ("null-both", baseline))
        times = " | ".join(f"{one / other:.1f}" for one, other in zip(ours, rand, strict=True))
        assert f"| null-both, times {baseline}'s | {dataset} | {attacker} | {times} |" in PAGE


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_page_shows_what_the_best_attacker_takes(dataset: str):
    """The best of all by test accuracy, which nobody can choose, seed by seed."""
    for row, (model, study) in {"TL": ("TL", STUDY), **LOSSES}.items():
        best = pl(model, dataset, "best of all", study)
        assert f"| {row} | {dataset} | {' | '.join(f'{one:.1f}' for one in best)} | {interval(best)} |" in PAGE


def test_the_page_says_how_much_less_an_attacker_gets():
    own, others = DATASETS
    of = "than from `rand-both` on the source's own classes and {} less on 20 others, on every seed: {} and {} times"
    assert of.format(less("rand-both", others), *(ratio("rand-both", d) for d in DATASETS)) in PAGE
    assert f"gets {less('rand-both', own)} points less from it" in PAGE
    of = "from `rand-tgt` he gets {} and {} less, {} and {} times"
    assert of.format(*(less("rand-tgt", d) for d in DATASETS), *(ratio("rand-tgt", d) for d in DATASETS)) in PAGE
    assert "from `null-tgt` {} and {} less".format(*(less("null-tgt", d) for d in DATASETS)) in PAGE
    for dataset in DATASETS:
        for baseline in BASELINES:
            assert all(a < b for a, b in zip(left("null-both", dataset, "tuned"), left(baseline, dataset, "tuned"),
                                             strict=True))  # fmt: skip
    strongest = [max(BASELINES, key=lambda row: mean(taken(row, d, "tuned"))) for d in DATASETS]
    assert strongest == ["rand-tgt", "rand-both"]
    assert {ratio(row, d) for row, d in zip(strongest, DATASETS, strict=True)} == {"1.7"}
    best = [less(row, others, "best of all") for row in BASELINES]
    assert "By the best of all attackers he gets {} and {} points less".format(*best) in PAGE


def test_the_page_says_where_a_baseline_is_level():
    ours, theirs = (
        [interval(taken(row, d, a)) for d, a in (("tin100-10", "one setting"), ("tin100-10", "renorm-probe"),
                                                 ("tin20b", "renorm-probe"))]
        for row in ("rand-tgt", "null-both")
    )  # fmt: skip
    assert "({}, `null-both` {})".format(ours[0], theirs[0]) in PAGE  # noqa: UP032
    assert f"({ours[1]} and {ours[2]}; {theirs[1]} and {theirs[2]})" in PAGE
    more = [
        less("rand-both", dataset, attacker) for dataset in DATASETS for attacker in ("one setting", "renorm-probe")
    ]
    words = (
        "From `rand-both` he gets {} and {} points more by these two on the source's own classes, {} and {} on others"
    )
    assert words.format(*more) in PAGE


def test_the_page_shows_attackers_with_other_learning_rates():
    """By seed, then how much less than from either RAND."""
    found = {
        (row, seed): json.loads((study / f"lr/seed-{seed}/{model}.json").read_text(encoding="utf-8"))
        for row, (model, study) in LOSSES.items()
        if study != FREE
        for seed in SEEDS
    }
    assert len({json.dumps(one["settings"]) for one in found.values()}) == 1
    got = {row: [found[row, seed]["metrics"]["acc_pl_worst"] for seed in SEEDS] for row, _ in found}
    for row, three in got.items():
        assert f"| {row} | {' | '.join(f'{one:.1f}' for one in three)} | {interval(three)} |" in PAGE
    below = [interval([a - b for a, b in zip(got[row], got["null-both"], strict=True)]) for row in BASELINES]
    assert "gets {} and {} points less from `null-both` than from `rand-both` and `rand-tgt`".format(*below) in PAGE


def measured(folder: str, model: str, metric: str) -> list[float]:
    """Of one attack on one model, seed by seed."""
    paths = [STUDY / folder / f"seed-{seed}/{model}.json" for seed in SEEDS]
    return [json.loads(path.read_text(encoding="utf-8"))["metrics"][metric] for path in paths]


def test_the_page_shows_attackers_who_draw_the_last_stage_anew():
    got = {model: measured("last-block", model, "acc_pl_worst") for model in ("null-both", "rand-both")}
    for model, three in got.items():
        assert f"| {model} | {' | '.join(f'{one:.1f}' for one in three)} | {interval(three)} |" in PAGE
    below = [rand - null for null, rand in zip(*got.values(), strict=True)]
    assert f"One who draws the last stage anew** gets {interval(below)} points less" in PAGE


def test_the_page_shows_a_domain_far_away():
    for model in ("TL", "null-both", "rand-both", "rand-tgt", "TGT"):
        cells = [interval(measured("digits", model, metric)) for metric in ("acc_pl", "acc_pl_worst")]
        row = "TGT, 2500 images" if model == "TGT" else model
        assert f"| {row} | {' | '.join(cells)} |" in PAGE


FOUND = (
    ("Gradient collision", "tin100_matched", "gc", "the source"),
    ("Random labels", "tin100_matched", "rand", "the source"),
    ("Uniform", "tin100_matched", "unif", "the source"),
    ("`null-space`", "tin100_matched", "null", "the source"),
    ("`null-space`, fresh stages", "tin100_fresh", "null-fresh", "the source"),
    ("Random labels", "tin100_target", "rand-tgt", "the target"),
    ("`null-space`", "tin100_target", "null-tgt", "the target"),
    ("Random labels", "tin100_both", "rand-both", "both"),
    ("`null-space`, fresh stages", "tin100_both", "null-both", "both"),
)


@pytest.mark.parametrize(("loss", "name", "model", "images"), FOUND)
def test_the_readme_says_what_was_found(loss: str, name: str, model: str, images: str):
    study = TARGET.with_name(name)
    price = -json.loads((study / "compare.json").read_text(encoding="utf-8"))["variants"][model]["drop"]
    taken = " | ".join(interval(drops(model, dataset, "tuned", study)) for dataset in DATASETS)
    readme = (TARGET.parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"| {loss} | {images} | {price:+.1f} | {taken} |" in readme


def test_the_readme_says_what_a_smaller_lambda_takes_and_what_is_left():
    readme = (TARGET.parents[2] / "README.md").read_text(encoding="utf-8")
    free = [interval(taken("null-both, λ = 0.85", dataset, "tuned")) for dataset in DATASETS]
    assert "With a smaller λ it costs nothing and takes {} and {}.".format(*free) in readme
    tl = [json.loads((STUDY / f"matched-{seed}/finetune/model.json").read_text()) for seed in SEEDS]
    before = [interval(pl("TL", dataset, "tuned", STUDY)) for dataset in DATASETS]
    words = "`TL`, which has {} % on the target, a tuned attacker gets {} % on the source's own classes and {} % on 20"
    assert words.format(interval([one["metrics"]["acc_t"] for one in tl]), *before) in readme
    own = [interval(pl(model, "tin100-10", "tuned", STUDY)) for model in ("null-both", "TL")]
    assert "the attacker still gets {} % on the source's own classes: from `TL` {},".format(*own) in readme
    pairs = zip(*(left(row, "tin100-10", "tuned") for row in ("null-both, λ = 0.85", "null-both")), strict=True)
    assert f"{interval([more - ours for more, ours in pairs])} points more than 0.9 does" in PAGE
