"""The matched comparison: λ is found on validation images, and its price has the interval that they give it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtlctl.errors import DivergedError, RecipeError
from dtlctl.many import compare as comparison
from dtlctl.recipe import network_demands
from dtlctl.recipe.loading import load
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Compare
from dtlctl.report import summary
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint
from dtlctl.training.price import Price


def priced(*points: float, half: float = 0.1) -> list[Price]:
    """A price for each seed, give or take `half`."""
    return [Price(one, one - half, one + half, 1000, 0.25) for one in points]


@pytest.mark.parametrize(("wanted", "reached"), [(2.0, "yes"), (60.0, "no")])
def test_the_search_finds_the_matching_lambda(wanted: float, reached: str):
    """A drop of 50 λ points meets 2 at λ = 0.04; 60 is out of reach below λ = 1, so the largest tried is returned."""
    calls: list[float] = []

    def prices(lam: float) -> list[Price]:
        calls.append(lam)
        return priced(50 * lam - 1, 50 * lam + 1)

    found = comparison.search(prices, 0.5, Compare(target_drop=wanted, tolerance=0.2, rounds=8))
    assert found["reached"] == reached
    assert [one["lambda"] for one in found["tried"]] == calls
    first = found["tried"][0]
    assert (first["lambda"], first["drop"], first["drops"]) == (0.5, 25.0, [24.0, 26.0])
    assert (first["low"], first["high"], first["images"], first["disagreement"]) == (24.9, 25.1, 1000, 0.25)
    assert [(one["low"], one["high"]) for one in first["by_seed"]] == [(23.9, 24.1), (25.9, 26.1)]
    assert found["lambda"] == (pytest.approx(0.04, abs=0.004) if reached == "yes" else max(calls))
    assert found["high"] - found["low"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("points", "half", "reached"),
    [(2.4, 0.5, "yes"), (2.4, 0.51, "not resolved"), (2.6, 0.5, "no"), (2.6, 9.0, "no"), (1.5, 0.4, "yes")],
)
def test_a_price_that_its_images_cannot_resolve_is_not_reached(points: float, half: float, reached: str):
    """2 ± 0.5 are wanted: near enough, and known as well as that."""
    settings = Compare(target_drop=2, tolerance=0.5, rounds=1)
    assert comparison.search(lambda _: priced(points, half=half), 0.5, settings)["reached"] == reached


def test_the_search_steps_out_until_the_price_is_passed_then_halves():
    """In log-odds: from 0 by 1 to -1, by 2 to -3, by 4 to -7 (mirrored too); then half-way between -7 and -3: -5.

    Less where the price is near: a drop of 7 for 5 asks for ln(7/5) = 0.336 in the place of 1, and twice that after.
    """

    five = {"target_drop": 5, "tolerance": 0.5}

    def wanted(drop_of: Callable[[float], float]) -> list[float]:
        found = comparison.search(lambda lam: priced(drop_of(comparison.logit(lam))), 0.5, Compare(**five, rounds=5))
        return [comparison.logit(one["lambda"]) for one in found["tried"]]

    assert wanted(lambda odds: 20.0 if odds > -4 else 1.0) == pytest.approx([0, -1, -3, -7, -5], abs=0.01)
    assert wanted(lambda odds: 1.0 if odds < 4 else 20.0) == pytest.approx([0, 1, 3, 7, 5], abs=0.1)  # 4 digits of λ
    outside = wanted(lambda odds: 20.0)  # next would be -15, but the range ends at λ = 0.0005: nothing is done twice
    assert outside[3:] == pytest.approx([-7, comparison.logit(comparison.LOW)], abs=0.01)
    assert len(comparison.search(lambda lam: priced(20.0), 0.5, Compare(**five, rounds=30))["tried"]) == 5
    assert wanted(lambda odds: 7.0 if odds > -1 else 1.0)[:4] == pytest.approx([0, -0.336, -1.009, -0.673], abs=0.01)
    assert wanted(lambda odds: -1.0 if odds < 2 else 5.0) == pytest.approx([0, 1, 3], abs=0.01)  # no drop, no ratio
    assert comparison.logit(0.5) == 0
    assert comparison.following([(0.2, 1.0), (0.5, 9.0)], 5.0) == pytest.approx(1 / 3)  # odds 1/4 and 1: 1/2


def test_a_lambda_that_diverges_is_too_dear():
    """1 point up to λ = 0.5, 12.5 from there; above 0.6 everything diverges.

    In log-odds from 0.2 (-1.39) by 1 to 0.4046, by 2 to 0.8339 (1.61), which diverges; half-way 0.6488, which does
    too; half-way again 0.5284, for 12.5 points. Were they not too dear, the search would go on upwards.
    """

    def prices(lam: float) -> list[Price]:
        if lam > 0.6:
            raise DivergedError(f"diverged at {lam:g}")
        return priced(1.0 if lam < 0.5 else 12.5)

    found = comparison.search(prices, 0.2, Compare(target_drop=12.5, tolerance=1.0, rounds=6))
    assert [one["lambda"] for one in found["tried"]] == [0.2, 0.4046, 0.8339, 0.6488, 0.5284]
    assert found["tried"][2:4] == [{"lambda": lam, "drop": None, "drops": None} for lam in (0.8339, 0.6488)]
    assert (found["lambda"], found["reached"]) == (0.5284, "yes")
    best = comparison.search(prices, 0.5, Compare(target_drop=90, rounds=2))
    assert (best["lambda"], best["drop"], best["reached"]) == (0.5, 12.5, "no")
    with pytest.raises(DivergedError, match=r"every λ that was tried diverged \(0.9, 0.768\); the last: .* at 0.768"):
        comparison.search(prices, 0.9, Compare(target_drop=12.5, rounds=2))


def answers(percent: float) -> np.ndarray:
    """Of 980 images: so many percent are answered rightly, the first ones."""
    return np.arange(980) < round(9.8 * percent)


def test_compare_goes_on_past_a_lambda_that_diverges(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """gc and rand lose 1 point at 0.1, too little; 1 and then 1/2 further in log-odds, 0.232 and 0.1548, diverge."""
    largest = 0.15

    def perform(experiments: list[Experiment], stages: tuple[str, ...], *_: object) -> None:
        lambdas = [one.lam for experiment in experiments for one in experiment.recipe.dispose.values()]
        if "dispose" in stages and max(lambdas) > largest:
            raise DivergedError("training diverged at step 3")

    monkeypatch.setattr(comparison, "perform", perform)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    monkeypatch.setattr(comparison, "answers", lambda _, name, **_more: answers(70.0 if name == "TL" else 69.0))
    monkeypatch.setattr(summary, "summarise", lambda _: {})
    change = "compare={target_drop=4.1, rounds=3, tolerance=3.0}"
    document, _ = comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)
    document = json.loads(checkpoint.dump(document))  # which refuses NaN
    for name in ("gc", "rand"):
        found = document["variants"][name]
        drops = [(one["lambda"], one["drop"] and round(one["drop"], 1)) for one in found["tried"]]
        assert drops == [(0.1, 1.0), (0.232, None), (0.1548, None)]
        assert (found["lambda"], found["reached"]) == (0.1, "no")
    rows = comparison._needed(document).rows
    assert [(row[0], row[1], row[-1]) for row in rows] == [(name, "0.1", "3, 2 diverged") for name in ("gc", "rand")]
    largest = 0.0
    with pytest.raises(DivergedError, match=r"\(0.1, 0.03927, 0.005501\); the last: dispose.gc-0.005501: .*at step 3"):
        comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)


def test_a_price_is_what_validation_loses_against_tl_of_the_same_seed(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """TL has 70 and 80, gc 68 and 79 at λ = 0.1: 20 and 10 images lost of 980, 2.0 and 1.0 points.

    gc: p = 21/982 and q = 1/982, p + q - (p - q)^2 = 0.021989, / 982 = 2.239e-5, whose root is 0.004732; 1.96 of them
    are 0.93 points. Of 10 lost the same is 0.69; the mean 0.81. rand has 30 and 80: 40 and 0, so it is out of reach.
    """
    scores = {"TL": (70.0, 80.0), "gc": (68.0, 79.0), "rand": (30.0, 80.0)}

    def validation(experiment: Experiment, name: str, **_more: bool) -> np.ndarray:
        return answers(scores[name.partition("-")[0]][experiment.recipe.seed - 5])

    monkeypatch.setattr(comparison, "perform", lambda *_: None)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    monkeypatch.setattr(comparison, "answers", validation)
    monkeypatch.setattr(summary, "summarise", lambda runs: [run.name for run in runs])
    change = "compare={target_drop=1.5, rounds=1, tolerance=2.8, seeds=[5, 6]}"
    dear = "dispose.rand.price=0.1"  # its interval is of no account where λ is given
    document, _ = comparison.compare(recipe_file, [change, dear], recipe_file.parent, command="x")
    assert (document["table"], document["images"]) == (["matched-5", "matched-6"], 980)
    gc, rand = document["variants"]["gc"], document["variants"]["rand"]
    assert gc["tried"][0]["drops"] == pytest.approx([2.04, 1.02], abs=0.01)
    assert (gc["drop"], (gc["high"] - gc["low"]) / 2) == pytest.approx((1.53, 0.81), abs=0.01)
    assert (gc["reached"], rand["reached"], rand["drop"]) == ("yes", "no", 20.0)
    said = capsys.readouterr().err.splitlines()
    assert not [line for line in said if "lambda is kept lower" in line]
    assert "gc-0.1: 2.0 ± 0.9, 1.0 ± 0.7 points below TL, by seed" in said
    assert "gc: λ = 0.1, 1.5 ± 0.8 points below TL; reached: yes" in said
    table = comparison._needed(document)
    assert "980 target images held back" in table.note and "over seeds the mean of their half widths" in table.note
    assert table.rows[0] == ["gc", "0.1", "1.5 ± 0.8", "yes", "1"]


def test_a_tl_from_outside_answers_the_test_images(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """It may have learned what is held back: 100 % there were a price of 40 points. On the test images it has 62."""
    monkeypatch.setattr(comparison, "perform", lambda *_: None)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    right = {True: answers(62.0)[::2], False: answers(60.0)}
    monkeypatch.setattr(comparison, "answers", lambda _, name, tested=False: right[tested])
    monkeypatch.setattr(summary, "summarise", lambda _: {})
    monkeypatch.setattr(network_demands, "check", lambda *_: None)
    file = recipe_file.parent / "tl.safetensors"
    changes = [f"finetune={{weights='{file}'}}", "target-only={steps=2}", "pretrain={steps=2}"]
    changes += ["compare={target_drop=2.0, rounds=1, tolerance=9.0}"]
    document, _ = comparison.compare(recipe_file, changes, recipe_file.parent, command="x", quiet=True)
    gc = document["variants"]["gc"]
    assert gc["drop"] == pytest.approx(2, abs=0.1)
    assert gc["high"] - gc["low"] > 2 * 5  # 490 and 980 images: 196 sqrt(0.24 / 490 + 0.24 / 980) = 5.3 points


@pytest.mark.usefixtures("undrawn")
def test_compare_matches_on_held_back_images_and_reports(recipe_file: Path, call):
    change = "compare={target_drop=1.0, rounds=2, tolerance=3.0, seeds=[0, 1]}"
    code, shown, said = call("compare", recipe_file, "--set", change, "--json", "--quiet")
    assert code == 0, said
    document = json.loads(shown)
    assert list(document["variants"]) == ["gc", "rand"]
    assert document["table"]["seeds"] == [0, 1]
    out = recipe_file.parent / "runs"
    for name, found in document["variants"].items():
        assert 1 <= len(found["tried"]) <= 2
        assert found["tried"][0]["lambda"] == 0.1  # the recipe's own comes first
        assert document["table"]["recipe"]["dispose"][name]["lambda"] == found["lambda"]
        assert len(found["tried"][0]["drops"]) == 2
    page = (out / "tiny-compare/report/report.html").read_text()
    assert "Who needed which λ" in page
    for found in document["variants"].values():
        assert found["low"] < found["drop"] < found["high"]
        assert f"{found['drop']:.1f} ± {(found['high'] - found['low']) / 2:.1f}" in page
    weights = [path.stat().st_mtime_ns for path in sorted(out.rglob("model.safetensors"))]
    again, _ = comparison.compare(recipe_file, [change], out, command="x", quiet=True)
    assert again == document
    assert weights == [path.stat().st_mtime_ns for path in sorted(out.rglob("model.safetensors"))]
    found = (f"dispose.{name}.lambda={one['lambda']}" for name, one in document["variants"].items())
    words = [word for text in ("seed=1", *found) for word in ("--set", text)]
    code, _, said = call("run", recipe_file, *words)  # what was found, put into the recipe
    assert code == 0, said
    for name in document["variants"]:
        assert f"dispose/{name}: taken over from runs/tiny-compare/" in said


def test_a_variant_with_a_long_name_is_compared_like_any_other(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """64 characters leave no room for a λ; two names that differ in the last one stay two."""
    seen: list[str] = []
    long = ["v" * 63 + "a", "v" * 63 + "b"]
    variants = [f"dispose.{name}={{steps=1, batch_size=8, unlearn={{kind='uniform'}}}}" for name in long]

    def perform(experiments: list[Experiment], *_: object) -> None:
        for one in experiments:
            assert Recipe.model_validate(one.recipe.resolved()) == one.recipe
            seen.extend(name for name in one.recipe.dispose if one.recipe.name.startswith("search"))

    monkeypatch.setattr(comparison, "perform", perform)
    monkeypatch.setattr(comparison, "write", lambda *_: None)
    monkeypatch.setattr(comparison, "answers", lambda *_, **_more: answers(70))
    monkeypatch.setattr(summary, "summarise", lambda _: {})
    change = "compare={target_drop=1, tolerance=3, rounds=1}"
    document, _ = comparison.compare(recipe_file, [*variants, change], recipe_file.parent, command="x", quiet=True)
    assert {*long} <= set(document["variants"])
    assert len(seen) == len(set(seen)) == 4 and max(map(len, seen)) <= 64


def test_the_final_model_keeps_every_change_but_those_of_lambda():
    """A limit of [publish] is no price of a disposal."""
    document = {"variants": {"gc": {"reached": "yes", "lambda": 0.2}}}
    changes = ["publish.price=2.0", "dispose.gc.price=1.0", "dispose.*.odds=2", "dispose.rand.lambda =0.1", "seed=3"]
    (said,) = comparison.advice(document, Path("r.toml"), changes, Path("runs"), written=True)
    _, *words = shlex.split(said.partition(": ")[2])
    kept = ["publish.price=2.0", "seed=3", "dispose.gc.lambda=0.2", "data.target.fraction=1", "name=final"]
    assert [word for word in words if "=" in word] == kept


def test_the_recipes_of_a_comparison_are_validated(recipe_file: Path):
    base = load(recipe_file)
    made = comparison._changed(base, "r.toml", "search-7", 7, {"gc-0.2": base.dispose["gc"]})
    assert (made.name, made.seed, [*made.dispose]) == ("search-7", 7, ["gc-0.2"])
    assert (made.piggyback.models, made.audit.models) == (["scratch", "TL"], None)
    assert comparison._changed(base, "r.toml", "tiny", 0, base.dispose) == base
    for name, variant, message in (
        ("x/../../y", "gc", "r.toml: name: a name is"),
        ("x", "../y", r"r.toml: dispose.*a name is"),
        ("x", "v" * 65, r"r.toml: dispose.*a name is"),
        ("x", "tl", "dispose.tl: the name belongs to a reference model"),
    ):
        with pytest.raises(RecipeError, match=message):
            comparison._changed(base, "r.toml", name, 0, {variant: base.dispose["gc"]})


def test_validation_images_are_neither_trained_on_nor_tested_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """1,000 training digits less the 20 of the subset; answers are asked for exactly these rows of the train split."""
    experiment = Experiment(load(recipe_file), recipe_file.parent, quiet=True)
    seen = []
    monkeypatch.setattr(experiment.trainer, "load_model", lambda name: None)
    monkeypatch.setattr(experiment.trainer, "split", lambda role, split, rows: seen.append((role, split, rows)))
    monkeypatch.setattr(type(experiment.engine), "correct", lambda *_: answers(50))
    assert comparison.answers(experiment, "TL").sum() == 490
    ((role, split, rows),) = seen
    assert (role, split, len(rows)) == ("target", "train", 980)
    assert len(np.intersect1d(rows, experiment.data.index("target"))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.target.fraction=1.0", "fraction = 1 leaves no target images to validate"),
        # 199.6 of the 200 images of every class, rounded: all of them
        ("data.target={path='builtin:greek', fraction=0.998}", "fraction = 0.998 leaves no target images to validate"),
        ('dispose.*.unlearn.kind="none"', r"needs a \[dispose.NAME\] table"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(recipe_file: Path, change: str, message: str):
    with pytest.raises(RecipeError, match=message):
        comparison.compare(recipe_file, [change], recipe_file.parent, command="x", quiet=True)
    assert [path.name for path in recipe_file.parent.iterdir()] == [recipe_file.name]


def test_a_tolerance_that_the_images_cannot_resolve_is_refused_with_how_many_would(recipe_file: Path, call):
    """90 % of 1,000 digits train, 100 are held back: 1.96 sqrt(0.2 / 100) are 8.77 points; 0.5 needs 30,732 images.

    At 5 % the 100 resolve 4.38 points. 980 images and 20 %: 2.80 points.
    """
    hundred = ("data.target.fraction=0.9",)
    for changes, words in (
        ((*hundred, "compare.tolerance=0.5"), ("compare.tolerance = 0.5: on 100 target images", "8.8 points",
                                               "30,732 images", "compare.tolerance = 8.8 or more")),
        ((*hundred, "compare.tolerance=8.7"), ("on 100 target images", "8.8 points", "102 images")),
        ((*hundred, "compare.disagreement=0.05"), ("tolerance = 1.5", "4.4 points", "on 5% of them", "854 images")),
        ((), ("compare.tolerance = 1.5: on 980 target images", "2.8 points", "3,415 images")),
    ):  # fmt: skip
        code, shown, said = call("compare", recipe_file, *(word for text in changes for word in ("--set", text)))
        assert (code, shown, len(said.strip().splitlines())) == (2, "", 2)
        assert said.startswith("error: ") and all(word in said for word in words), said
    assert not (recipe_file.parent / "runs").exists()


def test_compare_is_one_process(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="compare: start it as one process"):
        comparison.compare(recipe_file, [], recipe_file.parent, command="x", quiet=True)


def test_what_was_found_is_written_and_what_was_not_is_told_what_to_do(recipe_file: Path, call, monkeypatch):
    """gc was matched at 0.25, the others nowhere: one line of the file changes. Without one to change nothing trains.

    2 ± 1.5 points are wanted: 0.1 is too cheap and 0.5 too dear, or it diverges; both are too dear; or too cheap.
    """
    found = {
        "drop": 4.0,
        "low": 3.0,
        "high": 5.0,
        "tried": [{"lambda": 0.1, "drop": 0.1}, {"lambda": 0.5, "drop": None}],
    }
    dear, cheap = ([{"lambda": lam, "drop": drop} for lam in (0.1, 0.5)] for drop in (9.0, -1.0))
    document = {
        "compare": Compare().model_dump(), "images": 980, "seeds": [0], "table": {"recipe": {"name": "matched-0"}},
        "variants": {"gc": {**found, "lambda": 0.25, "reached": "yes"},
                     "rand": {**found, "lambda": 0.1, "reached": "no"},
                     "dear": {**found, "lambda": 0.1, "reached": "no", "tried": dear},
                     "cheap": {**found, "lambda": 0.1, "reached": "no", "tried": cheap},
                     "unif": {**found, "lambda": 0.1, "low": 0.0, "high": 4.1, "reached": "not resolved"}},
    }  # fmt: skip
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: (document, recipe_file.parent))
    text = recipe_file.read_text()
    recipe_file.write_text(text.replace("lambda = 0.1\n", "").replace("repair = 0.5\n", ""))
    code, _, said = call("compare", recipe_file, "--write", "--json")
    assert code == 2 and "[dispose.gc] has no lambda" in said
    recipe_file.write_text(text := text.replace("lambda = 0.1", "lambda = 0.5"))
    code, _, said = call("compare", recipe_file, "--json")
    assert code == 0 and recipe_file.read_text() == text and "dispose.gc.lambda=0.25" in said
    code, _, said = call("compare", recipe_file, "--write", "--json")
    assert recipe_file.read_text() == text.replace("lambda = 0.5", "lambda = 0.25  # was 0.5", 1)
    assert "compare.tolerance = 2.1" in said and "dispose.gc.lambda" not in said.partition("final model")[2]
    for variant, word in (
        ("rand", "compare.rounds"),
        ("dear", "smaller dispose.dear"),
        ("cheap", "larger dispose.cheap"),
    ):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{variant}: ")]
        assert word in line


def test_the_final_model_is_trained_as_compare_says_and_what_it_shares_is_taken_over(recipe_file: Path, call):
    """By its own line: λ as found, although the call had set another; all 1,000 digits; no second pre-training."""
    changes = ("dispose.gc.lambda=0.3", "compare={target_drop=1, tolerance=90, rounds=1}", "piggyback.models=['TL']")
    words = [word for change in changes for word in ("--set", change)]
    code, _, said = call("compare", recipe_file, *words, "--write")
    assert code == 0, said
    assert load(recipe_file).dispose["gc"].lam == 0.3 and "lambda = 0.3  # was 0.1" in recipe_file.read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("the final model")]
    code, _, said = call(*shlex.split(line.partition(": ")[2])[1:], "--set", "dispose.*.steps=2")
    assert code == 0 and "pretrain: taken over from" in said, said
    made = json.loads((recipe_file.parent / "runs/tiny-compare/final/recipe.json").read_text())
    assert made["data"]["target"]["fraction"] == 1 and made["dispose"]["gc"]["lambda"] == 0.3
