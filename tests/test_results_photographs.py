"""The pages on photographs: what they say of trials, prices and differences is what the sidecars say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_on_photographs_shows_the_paths_that_collisions_took():
    """A row a report: step, source loss, gradient norm, weight norm, and accuracies where they were measured."""
    study = ROOT / "docs/results/tin100_c10"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    paths = sorted((study / "paths").glob("*.json"))
    assert len(paths) == 2
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["history"]:
            accuracies = [f"{row[k]:.1f}" if k in row else "–" for k in ("acc_s", "acc_t")]
            norms = [f"{row[k]:.1f}" for k in ("gradient_norm", "weight_norm")]
            assert f"| {row['step']} | {row['source_loss']:.2f} | {' | '.join([*norms, *accuracies])} |" in page
        attacks = [
            json.loads((study / f"paths/piggyback/{path.stem}-{name}.json").read_text(encoding="utf-8"))["metrics"]
            for name in ("tin100-10", "tin20b")
        ]
        cells = [f"{attack[key]:.1f}" for attack in attacks for key in ("acc_pl", "acc_pl_worst")]
        assert f"| {path.stem.removeprefix('gc-lr-')} | {row['acc_t']:.1f} | {' | '.join(cells)} |" in page


def _repair(settings: dict[str, Any]) -> list[str]:
    return [f"{settings['repair']:g}"]


def _start(settings: dict[str, Any]) -> list[str]:
    """How many stages started anew (the key's name was another then), and the temperature."""
    anew = "all" if settings["init"] == "fresh" else str(settings["reset"])
    return [anew, f"{settings['retain']['temperature']:g}"]


@pytest.mark.parametrize(
    ("name", "own", "datasets"),
    [("tin100_c10", _repair, ("tin100-10", "tin20b")), ("tin100_fresh", _start, ("tin100-10",))],
)
def test_the_pages_on_photographs_show_every_trial(
    name: str, own: Callable[[dict[str, Any]], list[str]], datasets: Sequence[str]
):
    """A row a trial: its settings, target accuracy on validation and test images, and PL of both attackers."""
    study = ROOT / "docs/results" / name
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    validation = json.loads((study / "trials/validation.json").read_text(encoding="utf-8"))
    trials = sorted(path.parent for path in study.glob("trials/*/model.json"))
    assert len(trials) >= 15 and {*validation["trials"]} <= {trial.name for trial in trials}
    for trial in trials:
        made = json.loads((trial / "model.json").read_text(encoding="utf-8"))
        settings, acc_v = made["settings"], validation["trials"].get(trial.name)
        cells = [trial.name, settings["unlearn"]["kind"], f"{settings['lambda']:g}", *own(settings)]
        cells += [str(settings["steps"]), "–" if acc_v is None else f"{acc_v - validation['TL']:+.1f}"]
        cells += [f"{made['metrics']['acc_t']:.1f}"]
        for path in (trial / f"{dataset}.json" for dataset in datasets):
            attack = json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}
            cells += [f"{attack[key]:.1f}" if key in attack else "–" for key in ("acc_pl", "acc_pl_worst")]
        assert f"| {' | '.join(cells)} |" in page


def _below(runs: Sequence[Path], baseline: str, dataset: str, metric: str = "acc_pl_worst") -> tuple[list[str], str]:
    """How far an attacker's PL on null-space is below that on a baseline: by seed, and the mean's interval."""
    tuned = {
        model: [json.loads((run / f"piggyback/{model}/{dataset}.json").read_text())["metrics"][metric] for run in runs]
        for model in (baseline, "null")
    }
    below = [other - null for other, null in zip(tuned[baseline], tuned["null"], strict=True)]
    assert len(below) == 3
    return [f"{points:.1f}" for points in below], _interval(below)


def _interval(three: Sequence[float]) -> str:
    """Mean ± half width of the 95 % t interval of three seeds."""
    return f"{mean(three):.1f} ± {4.3027 * stdev(three) / 3**0.5:.1f}"  # t(0.975, 2)


def test_the_page_on_photographs_says_how_far_null_space_is_below_rand_by_seed():
    study = ROOT / "docs/results/tin100_c10"
    runs = [study / f"seed-{seed}" for seed in (0, 1, 2)]
    first, total = _below(runs, "rand", "tin100-10")
    second, other = _below(runs, "rand", "tin20b")
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    assert f"its PL is {first[0]}, {first[1]} and {first[2]} points below RAND's on tin100-10 (mean {total})" in page
    assert f"and {second[0]}, {second[1]} and {second[2]} on tin20b ({other})" in page


def test_the_second_page_on_photographs_shows_prices_and_how_far_null_space_is_below_both_baselines():
    study = ROOT / "docs/results/tin100_again"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    validation = json.loads((study / "validation.json").read_text(encoding="utf-8"))
    for model in ("rand", "neg", "null"):
        prices = [validation[f"{seed}/{model}"] - validation[f"{seed}/TL"] for seed in (3, 4, 5)]
        assert f"| {model} | {' | '.join(f'{price:+.1f}' for price in prices)} | {mean(prices):+.1f} |" in page
    for baseline in ("rand", "neg"):
        for dataset in ("tin100-10", "tin20b"):
            points, total = _below([study / f"seed-{seed}" for seed in (3, 4, 5)], baseline, dataset)
            assert f"| {baseline} | {dataset} | {' | '.join(points)} | {total} |" in page


def test_the_second_page_on_photographs_shows_the_one_trial_of_uniform():
    study = ROOT / "docs/results/tin100_again"
    made, *attacks = (
        json.loads((study / f"unif-0.9/{name}.json").read_text(encoding="utf-8"))
        for name in ("model", "tin100-10", "tin20b")
    )
    validation = json.loads((study / "validation.json").read_text(encoding="utf-8"))
    assert (made["settings"]["unlearn"]["kind"], made["settings"]["lambda"], made["seed"]) == ("uniform", 0.9, 3)
    cells = [f"{validation['3/unif90'] - validation['3/TL']:+.1f}", f"{made['metrics']['acc_t']:.1f}"]
    cells += [f"{attack['metrics'][key]:.1f}" for attack in attacks for key in ("acc_pl", "acc_pl_worst")]
    assert f"| {' | '.join(cells)} |" in study.with_suffix(".md").read_text(encoding="utf-8")


def test_the_match_on_photographs_shows_how_far_null_space_is_below_every_other_loss():
    """By both attackers, on all three datasets, seed by seed."""
    study = ROOT / "docs/results/tin100_matched"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    runs = [study / f"matched-{seed}" for seed in (6, 7, 8)]
    for baseline in ("rand", "unif", "neg", "gc"):
        for dataset in ("tin100-10", "tin20b", "digits"):
            for attacker, metric in (("tuned", "acc_pl_worst"), ("one setting", "acc_pl")):
                points, total = _below(runs, baseline, dataset, metric)
                assert f"| {baseline} | {dataset} | {attacker} | {' | '.join(points)} | {total} |" in page


def _pl(model: str, seed: int, dataset: str, attacker: str) -> float:
    """PL of the one setting, of the probe, of full fine-tuning, or of what held-out images choose of the last two."""
    study = (
        ROOT / "docs/results" / ("tin100_fresh" if model in ("null-fresh", "rand-t4", "null-t4") else "tin100_matched")
    )
    probe = json.loads((study / f"matched-{seed}/piggyback/{model}/{dataset}.json").read_text())["metrics"]
    if attacker in ("one setting", "probe"):
        return probe["acc_pl" if attacker == "one setting" else "acc_pl_worst"]
    full = json.loads((study / f"lr/seed-{seed}/{model}.json").read_text())["metrics"]
    assert probe["acc_pl"] == full["acc_pl"]  # the same weights
    if attacker == "lr":
        return full["acc_pl_worst"]
    return max((one["chosen"][0] for one in (probe, full)), key=lambda one: one["val"])["acc_pl"]


ATTACKERS = ("one setting", "probe", "lr", "best of both")


def test_the_match_on_photographs_shows_attackers_with_other_learning_rates():
    page = (ROOT / "docs/results/tin100_matched.md").read_text(encoding="utf-8")
    for model in ("scratch", "TL", "rand", "null"):
        taken = [[_pl(model, seed, "tin100-10", attacker) for seed in (6, 7, 8)] for attacker in ATTACKERS]
        assert f"| {model} | {' | '.join(map(_interval, taken))} |" in page
    below = [
        _pl("rand", n, "tin100-10", "best of both") - _pl("null", n, "tin100-10", "best of both") for n in (6, 7, 8)
    ]
    first, second, third = (f"{points:.1f}" for points in below)
    assert f"by {first}, {second} and {third} points: {_interval(below)}" in page


def test_the_page_on_fresh_stages_shows_every_attacker_beside_every_other_loss():
    """PL by model and attacker, and how far `null-fresh` is below the others, seed by seed."""
    page = (ROOT / "docs/results/tin100_fresh.md").read_text(encoding="utf-8")
    models = ("scratch", "TL", "rand", "null", "rand-t4", "null-t4", "null-fresh")
    for model in models:
        taken = [[_pl(model, seed, "tin100-10", attacker) for seed in (6, 7, 8)] for attacker in ATTACKERS]
        assert f"| {model} | {' | '.join(map(_interval, taken))} |" in page
    for beside in ("rand", "unif", "neg", "gc", "null", "rand-t4", "null-t4"):
        many = () if beside in ("unif", "neg", "gc") else ("best of both",)
        for dataset, attackers in (
            ("tin100-10", ("one setting", "probe", *many)),
            ("tin20b", ("one setting", "probe")),
        ):
            for attacker in attackers:
                below = [_pl(beside, n, dataset, attacker) - _pl("null-fresh", n, dataset, attacker) for n in (6, 7, 8)]
                points = " | ".join(f"{one:.1f}" for one in below)
                assert f"| {beside} | {dataset} | {attacker} | {points} | {_interval(below)} |" in page


def _times(beside: str, dataset: str, attacker: str) -> list[str]:
    """How many times the other's drop in PL below TL `null-fresh` has: by seed, and of the means."""
    ours, theirs = (
        [_pl("TL", seed, dataset, attacker) - _pl(model, seed, dataset, attacker) for seed in (6, 7, 8)]
        for model in ("null-fresh", beside)
    )
    return [f"{one / other:.1f}" for one, other in zip([*ours, mean(ours)], [*theirs, mean(theirs)], strict=True)]


def test_the_page_on_fresh_stages_shows_how_many_times_the_baselines_drop_it_is():
    page = (ROOT / "docs/results/tin100_fresh.md").read_text(encoding="utf-8")
    shown = [(model, name, attacker) for model in ("rand", "unif", "rand-t4") for name in ("tin100-10", "tin20b")
             for attacker in ("one setting", "probe")]  # fmt: skip
    for case in [*shown, ("rand", "tin100-10", "best of both"), ("rand-t4", "tin100-10", "best of both")]:
        assert f"| {' | '.join([*case, *_times(*case)])} |" in page


def test_the_page_on_fresh_stages_shows_an_attacker_who_draws_the_last_stage_anew():
    study = ROOT / "docs/results/tin100_fresh"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    for model in ("rand", "null-fresh"):
        metrics = [json.loads((study / f"last-block/seed-{n}/{model}.json").read_text())["metrics"] for n in (6, 7, 8)]
        assert {one["chosen"][0]["kind"] for one in metrics} == {"last-block"}
        assert [one["acc_pl"] for one in metrics] == [_pl(model, n, "tin100-10", "one setting") for n in (6, 7, 8)]
        found = [one["acc_pl_worst"] for one in metrics]
        assert f"| {model} | {' | '.join(f'{one:.1f}' for one in found)} | {_interval(found)} |" in page
