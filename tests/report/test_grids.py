"""What a sweep's table and figures hold: one curve along λ for every loss, one line over γ for every model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from dtlctl.report import figures, grids


def point(values: dict[str, Any], lam: float, gc: dict[str, Any]) -> dict[str, Any]:
    """TL and rand are the same at every point, a tuned attacker gets 5 points more; gc is as given."""
    fixed: list[dict[str, Any]] = [
        {"model": "TL", "acc_t": 70.0, "piggyback": {"letters": 60.0}},
        {"model": "rand", "acc_t": 65.0, "piggyback": {"letters": 50.0}},
    ]
    if "piggyback_worst" in gc:
        for row in fixed:
            row["piggyback_worst"] = {"letters": row["piggyback"]["letters"] + 5}
    kinds = {"rand": "random-labels", "gc": "gradient-collision"}
    dispose = {
        name: {"lambda": lam if name == "gc" else 0.2, "unlearn": {"kind": kind}} for name, kind in kinds.items()
    }
    rows = [*fixed, {"model": "gc", **gc}]
    piggyback = {"choose_on": "own", "attackers": [], "steps": 3, "epochs": None, "lr": 0.05}
    recipe = {"dispose": dispose, "piggyback": piggyback}
    return {"values": values, "table": {"recipe": recipe, "seeds": [0], "rows": rows, "caveats": [],
                                        "verdict": {"sentences": []}}}  # fmt: skip


def captured(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(figures, name, lambda *arguments: calls.append(arguments))
    return calls


def test_curves_go_along_lambda_one_for_every_retaining_loss(monkeypatch: pytest.MonkeyPatch):
    """Fig. 6: [PL, Acc_t] by rising λ, under the tuned attacker where there is one; what has one λ is a star."""
    calls = captured(monkeypatch, "of_curves")
    found = [
        point(
            {"dispose.gc.lambda": lam, "dispose.gc.retain.kind": kind},
            lam,
            {"acc_t": acc_t, "piggyback": {"letters": 0.0}, "piggyback_worst": {"letters": pl}},
        )
        for lam, kind, acc_t, pl in (
            (0.5, "distill", 60.0, 30.0), (0.5, "a-gem", 61.0, 31.0), (0.1, "distill", 68.0, 50.0),
            (0.1, "a-gem", 69.0, 51.0),
        )
    ]  # fmt: skip
    assert list(grids.draw({"points": found})) == ["curve-letters"]
    ((name, kind, curves, stars),) = calls
    assert (name, kind) == ("letters", "piggyback_worst")
    assert stars == {"TL": [65.0, 70.0], "rand": [55.0, 65.0]}
    assert curves == {"gc distill": [[50.0, 68.0], [30.0, 60.0]], "gc a-gem": [[51.0, 69.0], [31.0, 61.0]]}


def test_a_curve_along_the_odds_of_lambda_shows_lambda(monkeypatch: pytest.MonkeyPatch):
    """The factor is swept; the table and the order of the curve are those of the λ that it came to."""
    calls = captured(monkeypatch, "of_curves")
    found = [
        point({"dispose.*.odds": odds}, lam, {"acc_t": acc_t, "piggyback": {"letters": pl}})
        for odds, lam, acc_t, pl in ((2, 0.6, 60.0, 30.0), (0.5, 0.3, 68.0, 50.0))
    ]
    grids.draw({"points": found})
    ((_, _, curves, _),) = calls
    assert curves == {"gc": [[50.0, 68.0], [30.0, 60.0]]}
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in grids.markdown({"points": found}).splitlines()
             if "|" in line]  # fmt: skip
    assert lines[0] == ["Model", "λ"]
    assert lines[2:] == [["TL", "–"], ["rand", "–"], ["gc", "0.6"], ["gc", "0.3"]]


@pytest.mark.parametrize(
    ("key", "headings"),
    [("odds", ["λ gc", "λ rand"]), ("lambda", ["dispose.gc.lambda", 'dispose."rand".lambda'])],
)
def test_a_key_of_each_of_two_variants_has_a_column_and_a_model_one_row_for_its_own(key: str, headings: list[str]):
    """Two values of each are four points; every variant has two values of λ, and so two rows, with its own alone."""
    found = []
    for gc, rand in itertools.product((0.1, 0.25), (0.2, 0.5)):
        swept = {"odds": ({0.1: 1, 0.25: 3}[gc], {0.2: 1, 0.5: 4}[rand]), "lambda": (gc, rand)}[key]
        values = dict(zip((f"dispose.gc.{key}", f'dispose."rand".{key}'), swept, strict=True))
        one = point(values, gc, {"acc_t": 70.0 - 10 * gc, "piggyback": {"letters": 1.0}})
        one["table"]["recipe"]["dispose"]["rand"]["lambda"] = rand
        one["table"]["rows"][1] = {"model": "rand", "acc_t": 60.0 - 10 * rand, "piggyback": {"letters": 2.0}}
        found.append(one)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in grids.markdown({"points": found}).splitlines()
             if "|" in line]  # fmt: skip
    assert lines[0] == ["Model", *headings, "Acc_s", "Acc_t", "PL letters"]
    assert [line[:3] + line[4:5] for line in lines[2:]] == [
        ["TL", "–", "–", "70.0"],
        ["rand", "–", "0.2", "58.0"],
        ["gc", "0.1", "–", "69.0"],
        ["rand", "–", "0.5", "55.0"],
        ["gc", "0.25", "–", "67.5"],
    ]


def test_a_star_is_of_who_unlearns_and_a_key_of_one_variant_draws_no_other_twice(monkeypatch: pytest.MonkeyPatch):
    """TL and distilled have no λ of their own; gc has one curve, whatever the learning rates of rand."""
    found = []
    for lam, lr in itertools.product((0.1, 0.5), (0.01, 0.02)):
        values = {"dispose.*.lambda": lam, "dispose.rand.lr": lr, "audit.images": round(1000 * lr)}
        one = point(values, lam, {"acc_t": 70.0 - 10 * lam, "piggyback": {"letters": 9.0}, "audit_auc": 0.5 + lr})
        one["table"]["recipe"]["dispose"]["rand"]["lambda"] = lam
        one["table"]["recipe"]["dispose"]["distilled"] = {"lambda": 0.0, "unlearn": {"kind": "none"}}
        one["table"]["rows"] += [{"model": "distilled", "acc_t": 50.0, "piggyback": {"letters": 20.0 + lr}}]
        found.append(one)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in grids.markdown({"points": found}).splitlines()
             if "|" in line]  # fmt: skip
    assert lines[0] == ["Model", "dispose.*.lambda", "dispose.rand.lr", "audit.images", "Acc_s", "Acc_t",
                        "PL letters", "MIA AUC"]  # fmt: skip
    assert [line[1:4] + line[-1:] for line in lines if line[0] == "gc"] == [
        ["0.1", "–", "10", "0.510"], ["0.1", "–", "20", "0.520"],
        ["0.5", "–", "10", "0.510"], ["0.5", "–", "20", "0.520"],
    ]  # fmt: skip
    assert {tuple(line[1:3]) for line in lines if line[0] == "distilled"} == {("–", "–")}
    calls = captured(monkeypatch, "of_curves")
    for one in found:
        del one["values"]["audit.images"]
    grids.draw({"points": found})
    ((_, _, curves, _),) = calls
    assert set(curves) == {"gc", "rand 0.01", "rand 0.02"}


@pytest.mark.parametrize("key", ["data.piggyback.letters.fraction", 'data.piggyback."letters".fraction'])
def test_one_swept_number_is_drawn_over_it(monkeypatch: pytest.MonkeyPatch, key: str):
    """Fig. 5: the tuned attacker's Acc_pl, where there is one, over γ, and only of the dataset whose γ it is."""
    calls = captured(monkeypatch, "of_sweep")
    found = [
        point({key: g}, 0.1, {"acc_t": 1.0, "piggyback": {"letters": 1.0}, "piggyback_worst": {"letters": pl}})
        for g, pl in ((0.01, 20.0), (0.1, 40.0))
    ]
    grids.draw({"points": found})
    (called,) = calls
    lines = {"TL": [[0.01, 65.0], [0.1, 65.0]], "rand": [[0.01, 55.0], [0.1, 55.0]], "gc": [[0.01, 20.0], [0.1, 40.0]]}
    assert called == (key, "letters", "piggyback_worst", lines)
    assert list(called[-1]) == ["TL", "rand", "gc"]


def test_a_caveat_of_a_point_stands_below_the_table_with_its_point():
    """Of three points: one sentence of all, once; one of the first and third; one of the second alone."""
    found = [point({"a": a, "b": "x"}, 0.1, {"acc_t": 1.0, "piggyback": {"letters": 1.0}}) for a in (1, 2, 3)]
    for one, caveats in zip(found, (["All.", "Odd."], ["Even.", "All."], ["All.", "Odd."]), strict=True):
        one["table"]["caveats"] = caveats
    _, table, *below = grids.markdown({"points": found}).strip().split("\n\n")
    assert table.startswith("| Model")
    assert below == ["All.", "At a = 1, b = x; a = 3, b = x: Odd.", "At a = 2, b = x: Even."]


def test_a_sweep_says_on_which_images_the_tuned_attackers_chose(tmp_path: Path):
    """The first point has held-out images, the second half of the test images: both are said, above the table too."""
    found = [point({"a": a}, 0.1, {"piggyback": {"letters": 1.0}, "piggyback_worst": {"letters": a}}) for a in (1.5, 2)]
    found[1]["table"]["recipe"]["piggyback"] |= {"choose_on": "test"}
    chosen = "held-out images of his own or half of the test images, and judged by the other half."
    assert grids.markdown({"points": found}).startswith(
        f"Accuracies in %, seed 0. Tuned: by the attacker who is best on {chosen}\n\n| Model |   a | "
    )
    assert "of the tuned attacker" in grids.draw({"points": found})["sweep-letters"][1]
    plain = [point({"a": a}, 0.1, {"piggyback": {"letters": 1.0}}) for a in (1.5, 2)]
    assert "uned" not in grids.markdown({"points": plain}) + grids.draw({"points": plain})["sweep-letters"][1]


def test_files_of_an_earlier_report_are_not_left_beside_a_sweep(tmp_path: Path):
    """Neither the audits of a sweep over seeds nor figures of other keys; what no report draws is not ours."""
    for name in ("table.json", "audit.md", "roc.svg", "roc.png", "curve-letters.svg", "sweep-greek.png", "mine.png"):
        (tmp_path / name).write_text("earlier")
    found = [point({"a": a}, 0.1, {"acc_t": 1.0, "piggyback": {"letters": float(a)}}) for a in (1, 2)]
    grids.write({"points": found, "over": {"a": ["1", "2"]}}, tmp_path, "dtlctl sweep", "name", [])
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.json", "table.md", "report.html", "sweep-letters.svg", "sweep-letters.png", "mine.png"
    }  # fmt: skip
