"""The page on retaining with both datasets' images: its numbers are those of its sidecars and of tin100_target's."""

from __future__ import annotations

import json
from statistics import mean

import pytest
from test_results_target import DATASETS, SEEDS, drops, interval, pl
from test_results_target import STUDY as TARGET

STUDY = TARGET.with_name("tin100_both")
PAGE = STUDY.with_suffix(".md").read_text(encoding="utf-8")
ATTACKERS = ("tuned", "one setting", "probe", "renorm-probe")
OTHERS = ("rand-tgt", "null-tgt")


def test_both_pages_attack_disposals_of_the_same_models():
    for seed in SEEDS:
        ours, theirs = (
            json.loads((study / f"matched-{seed}" / path).read_text(encoding="utf-8"))
            for study, path in ((STUDY, "dispose/null-both/model.json"), (TARGET, "dispose/rand-tgt/model.json"))
        )
        assert ours["parent"] == theirs["parent"]
        assert {**ours["settings"], **dict.fromkeys(("unlearn", "retain", "lambda", "fresh_stages"))} == {
            **theirs["settings"],
            **dict.fromkeys(("unlearn", "retain", "lambda", "fresh_stages")),
        }
    for dataset in DATASETS:
        assert pl("TL", dataset, "tuned", STUDY) == pl("TL", dataset, "tuned")


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("attacker", ATTACKERS)
def test_the_page_shows_what_each_loss_takes_by_seed(dataset: str, attacker: str):
    """And how many times RAND's drop that of `null-both` is: by seed, and of the means."""
    taken = {"null-both": drops("null-both", dataset, attacker, STUDY)}
    taken |= {model: drops(model, dataset, attacker) for model in OTHERS}
    for model, three in taken.items():
        points = " | ".join(f"{one:.1f}" for one in three)
        assert f"| {model} | {dataset} | {attacker} | {points} | {interval(three)} |" in PAGE
    ours, rand = ([*taken[model], mean(taken[model])] for model in ("null-both", "rand-tgt"))
    times = " | ".join(f"{one / other:.1f}" for one, other in zip(ours, rand, strict=True))
    assert f"| times RAND's | {dataset} | {attacker} | {times} |" in PAGE


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_page_shows_what_the_best_attacker_takes(dataset: str):
    """The best of all by test accuracy, which nobody can choose, seed by seed."""
    for model, study in (("TL", TARGET), ("null-both", STUDY), ("rand-tgt", TARGET), ("null-tgt", TARGET)):
        best = pl(model, dataset, "best of all", study)
        assert f"| {model} | {dataset} | {' | '.join(f'{one:.1f}' for one in best)} | {interval(best)} |" in PAGE


def test_the_page_says_how_much_less_an_attacker_gets():
    for other, words in (
        ("rand-tgt", "gets {} points less from it than from RAND on the source's own classes and {} less on 20 others"),
        ("null-tgt", "Than from `null-tgt` he gets {} and {} less"),
    ):
        less = [
            [
                theirs - ours
                for theirs, ours in zip(pl(other, d, "tuned"), pl("null-both", d, "tuned", STUDY), strict=True)
            ]
            for d in DATASETS
        ]
        assert words.format(*map(interval, less)) in PAGE
    ours, rand = (drops("null-both", "tin20b", "probe", STUDY), drops("rand-tgt", "tin20b", "probe"))
    times = f"{mean(ours) / mean(rand):.1f} times"
    assert f"it is {interval(ours)} points against {interval(rand)}, {times}" in PAGE
    best = zip(pl("rand-tgt", "tin20b", "best of all"), pl("null-both", "tin20b", "best of all", STUDY), strict=True)
    assert f"by the best of all attackers he gets {interval([one - other for one, other in best])} points less" in PAGE
    (own, other) = (mean(drops("null-both", d, "tuned", STUDY)) / mean(drops("rand-tgt", d, "tuned")) for d in DATASETS)
    assert f"{own:.1f} and {other:.1f} times RAND's drop" in PAGE


def test_the_page_says_what_a_choice_of_learning_rates_gets_on_one_seed():
    places = ((STUDY, "null-both"), (TARGET, "rand-tgt"), (TARGET, "null-tgt"))
    paths = [study / f"lr/seed-6/{model}.json" for study, model in places]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    assert len({json.dumps(one["settings"]) for one in found}) == 1
    ours, rand, null = (f"{one['metrics']['acc_pl_worst']:.1f}" for one in found)
    assert f"he gets {ours} % from it ([sidecar](tin100_both/lr)), {rand} from RAND and {null} from `null-tgt`" in PAGE


FOUND = (
    ("Gradient collision", "tin100_matched", "gc", "the source"),
    ("Random labels", "tin100_matched", "rand", "the source"),
    ("Uniform", "tin100_matched", "unif", "the source"),
    ("`null-space`", "tin100_matched", "null", "the source"),
    ("`null-space`, fresh stages", "tin100_fresh", "null-fresh", "the source"),
    ("Random labels", "tin100_target", "rand-tgt", "the target"),
    ("`null-space`", "tin100_target", "null-tgt", "the target"),
    ("`null-space`, fresh stages", "tin100_both", "null-both", "both"),
)


@pytest.mark.parametrize(("loss", "name", "model", "images"), FOUND)
def test_the_readme_says_what_was_found(loss: str, name: str, model: str, images: str):
    study = TARGET.with_name(name)
    price = -json.loads((study / "compare.json").read_text(encoding="utf-8"))["variants"][model]["drop"]
    taken = " | ".join(interval(drops(model, dataset, "tuned", study)) for dataset in DATASETS)
    readme = (TARGET.parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"| {loss} | {images} | {price:+.1f} | {taken} |" in readme
