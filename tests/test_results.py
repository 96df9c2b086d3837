"""Published tables are what the sidecars in the repository say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import pytest

from dtlctl import bench, bench_train, grids, matching, report, report_audit

ROOT = Path(__file__).parents[1]
STUDIES = sorted({path.parent.parent for path in (ROOT / "docs" / "results").glob("*/*/recipe.json")})


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_a_study_shows_the_table_of_its_sidecars(study: Path):
    runs = sorted(path.parent for path in study.glob("*/recipe.json"))
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    for part in report.markdown(report.summarise(runs)).strip().split("\n\n"):
        assert part in page, f"{study.name}: the page does not show\n{part}"
    for part in (p for run in runs if (audits := report_audit.read(run)) for p in report_audit.tables(audits)):
        assert part in page, f"{study.name}: the page does not show\n{part}"


def test_there_are_studies():
    assert {study.name for study in STUDIES} >= {"quickstart"}


def test_the_readme_shows_one_of_the_runs():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.markdown(report.summarise([ROOT / "docs/results/quickstart/seed-0"])).strip() in page


BENCHES = sorted((ROOT / "docs/results/bench").glob("*.json"))


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_the_page_on_performance_shows_what_was_measured(path: Path):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    _, found, rest = page.partition(f"<!-- bench: {path.stem} -->\n")
    shown, text = (
        rest.partition("<!-- end bench -->")[0],
        (bench_train if path.stem.startswith("train_") else bench).text,
    )
    assert found and shown.strip() == f"```text\n{text(json.loads(path.read_text()))}\n```"


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
    for name in ("quickstart_matched", "tin100_matched"):
        found = json.loads((folder / name / "compare.json").read_text())
        for part in matching._needed(found):
            assert part in (folder / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("document", "label"),
    [
        ("quickstart_matched/compare.json", "{}"),
        ("tin100_matched/compare.json", "{}"),
        ("tin100_matched/first_search.json", "{}, first search"),
    ],
)
def test_a_match_shows_every_value_of_lambda_that_was_tried(document: str, label: str):
    """A row a loss: each λ, the mean of what it cost, and each seed's; in the order in which they were tried."""
    path = ROOT / "docs/results" / document
    page = path.parent.with_suffix(".md").read_text(encoding="utf-8")
    for variant, found in json.loads(path.read_text(encoding="utf-8"))["variants"].items():
        tried = [
            f"{one['lambda']:g}: {one['drop']:.1f} ({', '.join(f'{drop:.1f}' for drop in one['drops'])})"
            for one in found["tried"]
        ]
        assert f"| {label.format(variant)} | {'; '.join(tried)} |" in page


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


def test_the_page_on_photographs_shows_every_trial():
    """A row a trial: its settings, target accuracy on validation and test images, and PL of both attackers."""
    study = ROOT / "docs/results/tin100_c10"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    validation = json.loads((study / "trials/validation.json").read_text(encoding="utf-8"))
    trials = sorted(path.parent for path in study.glob("trials/*/model.json"))
    assert len(trials) >= 15 and {*validation["trials"]} <= {trial.name for trial in trials}
    for trial in trials:
        made = json.loads((trial / "model.json").read_text(encoding="utf-8"))
        settings, acc_v = made["settings"], validation["trials"].get(trial.name)
        cells = [trial.name, settings["unlearn"]["kind"], f"{settings['lambda']:g}", f"{settings['repair']:g}"]
        cells += [str(settings["steps"]), "–" if acc_v is None else f"{acc_v - validation['TL']:+.1f}"]
        cells += [f"{made['metrics']['acc_t']:.1f}"]
        for path in (trial / "tin100-10.json", trial / "tin20b.json"):
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


def test_the_match_on_photographs_shows_attackers_with_other_learning_rates():
    """Of the probe and of full fine-tuning he takes what is best on his own held-out images, seed by seed."""
    study = ROOT / "docs/results/tin100_matched"
    page = study.with_suffix(".md").read_text(encoding="utf-8")
    taken: dict[str, list[list[float]]] = {}
    for model in ("scratch", "TL", "rand", "null"):
        for seed in (6, 7, 8):
            paths = (study / f"matched-{seed}/piggyback/{model}/tin100-10.json", study / f"lr/seed-{seed}/{model}.json")
            probe, full = (json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in paths)
            assert probe["acc_pl"] == full["acc_pl"]  # the same weights
            best = max((one["chosen"][0] for one in (probe, full)), key=lambda one: one["val"])["acc_pl"]
            row = [probe["acc_pl"], probe["acc_pl_worst"], full["acc_pl_worst"], best]
            taken.setdefault(model, []).append(row)
        cells = [_interval(column) for column in zip(*taken[model], strict=True)]
        assert f"| {model} | {' | '.join(cells)} |" in page
    below = [r[3] - n[3] for r, n in zip(taken["rand"], taken["null"], strict=True)]
    assert f"by {', '.join(f'{points:.1f}' for points in below[:2])} and {below[2]:.1f} points: {_interval(below)}" in page
