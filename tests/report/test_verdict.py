"""May it be published? The verdict follows from numbers and intervals, by hand here, and says no more than they do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtlctl.errors import EvidenceError
from dtlctl.recipe.settings import Publish
from dtlctl.report import intervals, summary
from dtlctl.report.evidence import evidence
from dtlctl.report.results import unpacked
from dtlctl.report.verdict import Verdict, demand, held, verdict
from dtlctl.run.trainer import packed

IMAGES = 1000


def row(right: int | None, attacked: float | None, *, images: int = IMAGES, tuned: bool = True, **more: Any) -> dict:
    """One model of one seed: it answers the first `right` of the target's images rightly, an attacker gets so much."""
    found: dict[str, Any] = {"piggyback": {}, **more}
    if right is not None:
        found |= {"acc_t": 100 * right / images, "answers": np.arange(images) < right}
    if attacked is not None:
        found |= {"piggyback": {"letters": attacked - 5 * tuned}, "judged": {"letters": {}},
                  "repeats": {"letters": [attacked] if tuned else []}}  # fmt: skip
        found["judged"]["letters"] = {"piggyback": images, "piggyback_worst": images}
        if tuned:
            found |= {"piggyback_worst": {"letters": attacked}, "tuned_by": {"letters": ["probe"]}}
    return found


def models(images: int = IMAGES, tuned: bool = True, **changes: tuple[float | None, float | None]) -> dict[str, dict]:
    """TL is 10 points better than TGT, an attacker gets 60 % from it and 20 % from scratch; gc leaves a quarter."""
    plan = {"scratch": (None, 20.0), "TGT": (60.0, 25.0), "TL": (70.0, 60.0), "gc": (69.5, 30.0), **changes}
    rows = {name: row(None if acc is None else round(acc * images / 100), pl, images=images, tuned=tuned)
            for name, (acc, pl) in plan.items()}  # fmt: skip
    return {name: one for name, one in rows.items() if one != row(None, None)}


def document(*seeds: dict[str, dict], older: tuple[str, ...] = ()) -> dict[str, Any]:
    by_model = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    return {"evidence": evidence(by_model), "seeds": [*range(len(seeds))], "older": list(older)}


def judged(*seeds: dict[str, dict], limits: Publish | None = None, **more: Any) -> Verdict:
    found = verdict(document(*seeds, **more), limits)
    json.dumps(asdict(found), allow_nan=False)
    return found


def test_what_a_sidecar_keeps_of_the_answers_is_what_they_were():
    for count in (1, 7, 8, 9, 20, 1000):
        answers = np.random.default_rng(count).random(count) < 0.6
        assert np.array_equal(unpacked(packed(answers), count), answers)
    assert packed(np.array([1, 0, 0, 0, 0, 0, 0, 1, 1], bool)) == "gYA="  # 0x81 0x80


@pytest.mark.parametrize(("right", "passes", "longer"), [(65.0, 2.0, True), (65.0, 10.0, False), (69.5, 2.0, False)])
def test_who_pays_too_much_for_a_short_disposal_is_told_so(right: float, passes: float, longer: bool):
    """2 points are the yardstick: 5 are lost, or half a point. Of two seeds the shorter disposal counts."""
    seeds = [models(gc=(right, 30.0)) for _ in range(2)]
    for seed, more in zip(seeds, (0.0, 20.0), strict=True):
        seed["gc"]["passes"] = passes + more
    assert ("longer" in " ".join(judged(*seeds).models["gc"]["reasons"])) is longer


def test_the_cheapest_of_several_draws_is_called_so():
    """Of two seeds the one that drew more often counts."""
    seeds = [models() for _ in range(2)]
    once = " ".join(judged(*seeds).sentences)
    for seed, draws in zip(seeds, (1, 3), strict=True):
        seed["gc"] |= {"passes": 10.0, "draws": draws}
    assert ", the cheapest of 3 draws on images held back, over TGT" in " ".join(judged(*seeds).sentences)
    assert "draws" not in once


def test_a_price_is_paired_and_an_accuracy_has_wilsons_interval():
    """5 of 1,000 images lost, none gained: (6 - 1) / 1002 ± 1.96 sqrt((7 / 1002 - (5 / 1002)²) / 1002), in %.

    Wilson (1927) at 30 % of 1,000: z² = 3.8415, (0.3 + 0.0019207) / 1.0038415 ± 1.96 sqrt(0.21 / 1000 +
    3.8415 / 4e6) / 1.0038415 = 30.0765 ± 2.8358. Newcombe against TL (60: 56.93 to 62.99): 30 points less, down by
    sqrt(2.759² + 2.993²), up by sqrt(2.912² + 3.070²).
    """
    gc = evidence({name: [one] for name, one in models().items()})["gc"]
    half = 100 * 1.959964 * np.sqrt((7 / 1002 - (5 / 1002) ** 2) / 1002)
    assert gc["price"] == pytest.approx({"value": 0.5, "low": 500 / 1002 - half, "high": 500 / 1002 + half}, abs=1e-5)
    attack = gc["attacks"]["letters"]
    assert attack["accuracy"] == pytest.approx({"value": 30.0, "low": 27.2407, "high": 32.9123}, abs=1e-3)
    assert attack["above"]["TL"] == pytest.approx({"value": -30.0, "low": -34.071, "high": -25.769}, abs=5e-3)
    assert (attack["attacker"], attack["images"], attack["tuned"]) == ("probe", 1000, True)


def test_a_share_has_the_interval_of_its_images():
    """(30 - 20) / 40 = 1/4; its error is that of 30 - 3/4 · 20 - 1/4 · 60: half widths 2.836, 2.478 and 3.030."""
    share = evidence({name: [one] for name, one in models().items()})["gc"]["attacks"]["letters"]["recovered"]
    half = np.sqrt(2.836**2 + (0.75 * 2.478) ** 2 + (0.25 * 3.030) ** 2) / 40
    assert share == pytest.approx({"value": 0.25, "low": 0.25 - half, "high": 0.25 + half}, abs=1e-4)


def test_over_seeds_the_wider_interval_counts():
    """Over 1, 2 and 6: mean 3, deviation sqrt(7), ± 4.30265 · sqrt(7 / 3) = 6.573."""
    wide = intervals.Number([1.0, 2.0, 6.0], (-1.0, 7.0)).figure()
    assert wide == pytest.approx({"value": 3.0, "low": -3.573, "high": 9.573}, abs=1e-3)
    assert intervals.Number([3.0, 3.0, 3.0], (-1.0, 7.0)).figure() == {"value": 3.0, "low": -1.0, "high": 7.0}
    assert intervals.Number([3.0]).figure() == {"value": 3.0, "low": None, "high": None}


def test_seeds_that_agree_do_not_narrow_a_share_and_seeds_that_disagree_widen_it():
    """30, 20 and 60 on every seed: ± that of the images. gc at 20, 30, 40: d is -10, 0, 10, ± 4.303 · 10 / sqrt(3)."""
    ends = {30.0: (27.2407, 32.9123), 20.0: (17.64, 22.6), 60.0: (56.93, 62.99)}
    once = intervals.share(*(intervals.Number([x], images) for x, images in ends.items()))
    three = [intervals.Number([x] * 3, images) for x, images in ends.items()]
    assert intervals.share(*three) == pytest.approx(once)
    wide = intervals.share(intervals.Number([20.0, 30.0, 40.0], ends[30.0]), *three[1:])
    half = 4.30265 * 10 / 3**0.5 / 40
    assert wide == pytest.approx({"value": 0.25, "low": 0.25 - half, "high": 0.25 + half}, abs=1e-5)


def test_a_difference_over_seeds_is_that_of_its_seeds():
    """50, 60 and 70 against 40, 50 and 60: 10 each time, however much the seeds differ; the images say ± sqrt(8)."""
    one, other = (intervals.Number([x, x + 10, x + 20], (x + 8, x + 12)) for x in (50.0, 40.0))
    found = intervals.above(one, other).figure()
    assert found == pytest.approx({"value": 10.0, "low": 10 - 8**0.5, "high": 10 + 8**0.5})


def test_repetitions_of_an_attack_widen_its_interval():
    """Over 40, 50 and 60 with 24.84 to either side; 1,000 images alone would give 3."""
    found = intervals.accuracy([50.0], [1000], [[40.0, 50.0, 60.0]])
    assert found.figure() == pytest.approx({"value": 50.0, "low": 25.159, "high": 74.841}, abs=1e-3)


def test_a_variant_that_costs_little_and_leaves_little_is_recommended():
    found = judged(models(rand=(69.8, 45.0)))
    assert (found.recommended, found.meets_limits) == ("gc", True)  # rand is cheaper, but leaves more
    assert found.models["gc"]["decision"] == "publish" and not found.models["gc"]["reasons"]
    assert any("One seed" in text for text in found.caveats)


@pytest.mark.parametrize(
    ("changes", "recommended"),
    [
        ({"TL": (61.0, 60.0), "gc": (60.5, 30.0)}, "TGT"),  # TL barely above TGT: 10 images of 1,000, and 5
        ({"gc": (60.2, 30.0)}, "TGT"),  # disposal costs what the source brought
        ({"gc": (69.5, 58.0)}, None),  # an attacker gets hardly less than from TL
        ({"gc": (66.5, 30.0)}, None),  # 3.5 points: dearer than the yardstick, better than TGT
        ({"gc": (74.0, 30.0)}, "gc"),  # better than TL
        ({"gc": (None, None)}, None),  # nothing was disposed of
        ({"gc": (69.5, None)}, None),  # never attacked
        ({"TL": (70.0, 22.0), "gc": (69.5, 15.0)}, None),  # TL barely above scratch: nothing to dispose of
        ({"TL": (60.0, 60.0), "gc": (60.0, 60.0)}, "TGT"),  # TL = TGT
        ({"TGT": (None, None)}, None), ({"TL": (None, None), "gc": (None, None)}, None),
        ({"scratch": (None, None)}, None),
    ],
)  # fmt: skip
def test_one_model_or_none_is_recommended(changes: dict[str, tuple[float | None, float | None]], recommended):
    found = judged(models(**changes))
    assert found.recommended == recommended
    assert (f"Publish {recommended}" in found.sentences[0]) is (recommended is not None)
    assert judged(models(**changes), limits=Publish(price=2.0)).meets_limits is False or recommended


def test_twenty_images_show_nothing():
    """TL 14 of 20, TGT 12 of 20, gc 14: no use of the source is shown, so no variant; no limit is met by one.

    TGT, which holds nothing of the source, is only held to a price that it is shown to exceed.
    """
    found = judged(models(images=20, gc=(70.0, 30.0)), limits=Publish(price=2.0, recovered=0.25))
    assert found.recommended == "TGT"
    assert found.meets_limits
    assert held(found.models, "TGT", Publish(price=2.0))[0][0] == "met"
    assert held(found.models, "gc", Publish(price=2.0))[0][0] == "not resolved"
    sure = judged(models(TGT=(40.0, 5.0), gc=(39.0, 30.0)), limits=Publish(price=2.0))
    assert sure.recommended == "TGT" and not sure.meets_limits


def test_several_seeds_that_disagree_show_nothing():
    """gc against TGT: +1, +9.5 and +9.5 points, by far above it on every seed's images: over seeds 6.7 ± 12."""
    seeds = [models(gc=(acc, 30.0)) for acc in (61.0, 69.5, 69.5)]
    assert judged(*seeds[1:]).recommended == "gc"
    found = judged(*seeds)
    assert found.recommended == "TGT"
    assert not any("One seed" in text for text in found.caveats)


def test_weak_missing_and_old_evidence_is_named():
    found = judged(models(tuned=False, rand=(69.5, None)), older=("piggyback/rand/letters",))
    said = " ".join(found.caveats)
    assert "none tuned: letters" in said and "rand on letters" in said and "piggyback/rand/letters" in said
    assert found.models["rand"]["reasons"] == ["not attacked on letters"]
    assert "none tuned" not in " ".join(judged(models()).caveats)
    for steps, told in ((30, True), (150, False)):
        recipe = {"piggyback": {"steps": 150, "attackers": [{"kind": "probe"}, {"kind": "full", "steps": steps}]}}
        assert (
            "as few as 30 steps" in " ".join(verdict({**document(models()), "recipe": recipe}, None).caveats)
        ) is told
    recipe = {"piggyback": {"steps": None, "epochs": 1, "attackers": []}}  # as long as the history says
    rows = [{"curves": {"letters": [[2, 10.0], [4, 12.0]]}}]
    found = verdict({**document(models()), "recipe": recipe, "rows": rows}, None)
    assert "as few as 4 steps" in " ".join(found.caveats)
    found = verdict({**document(models()), "recipe": recipe, "rows": [{"curves": {"letters": [[1, 10.0]]}}]}, None)
    assert "as few as 1 step:" in " ".join(found.caveats)


def test_the_strongest_attacker_counts_but_not_the_one_whom_nobody_can_choose():
    rows = models()
    rows["gc"]["piggyback"]["letters"] = 55.0  # the one setting, more than the tuned attacker's 30
    rows["gc"]["piggyback_max"] = {"letters": 99.0}
    attack = judged(rows).models["gc"]["attacks"]["letters"]
    assert (attack["accuracy"]["value"], attack["attacker"]) == (55.0, "full, one setting")
    del rows["scratch"]["piggyback_worst"]  # of no use to compare with: then nobody is tuned
    assert judged(rows).models["TL"]["attacks"]["letters"]["accuracy"]["value"] == 55.0


@pytest.mark.parametrize(
    ("price", "recovered", "states"),
    [
        (2.0, 0.4, ["met", "met"]), (0.6, 0.3, ["not resolved", "not resolved"]), (None, 0.1, ["missed"]),
        (1.2, None, ["met"]), (0.0, None, ["not resolved"]), (None, None, []),
    ],
)  # fmt: skip
def test_a_limit_is_met_by_the_whole_interval_or_not_at_all(price: float, recovered: float, states: list[str]):
    """gc costs 0.5 [-0.0, 1.0] and leaves 25 % [16.3, 33.7]."""
    limits = Publish(price=price, recovered=recovered)
    table = document(models())
    said = [text for _, text in held(table["evidence"], "gc", limits)]
    assert [next(s for s in ("not resolved", "met", "missed") if s in text) for text in said] == states
    if set(states) <= {"met"}:
        demand(table, "gc", limits, "mine.toml")
    else:
        with pytest.raises(EvidenceError, match=r"mine.toml: \[publish\] is not met by gc"):
            demand(table, "gc", limits, "mine.toml")
    assert verdict(table, limits).meets_limits is (set(states) <= {"met"})


def test_references_are_held_to_the_limits_too():
    """TL leaves all of it, TGT nothing but costs 10 points; no model, or one that was not made, meets nothing."""
    table, limits = document(models()), Publish(recovered=0.5)
    demand(table, "TGT", limits, "r")
    for model in ("TL", "other", None):
        with pytest.raises(EvidenceError):
            demand(table, model, limits, "r")
    with pytest.raises(EvidenceError, match="missed") as told:
        demand(table, "TGT", Publish(price=5.0), "r")
    enough = int(str(told.value).partition("publish.price=")[2].partition(",")[0])
    assert enough <= 10
    demand(table, "TGT", Publish(price=enough), "r")
    with pytest.raises(EvidenceError):
        demand(document({"pre": row(None, 50.0)}), "gc", limits, "r")
    demand(table, None, Publish(), "r")


def test_what_a_variant_gives_beyond_a_tl_that_gives_nothing_is_not_called_nothing():
    """gc gives 30 % where scratch gives 20 and TL 22: no share of TL's 2 points is known, yet it gives more."""
    found = judged(models(TL=(70.0, 22.0)), limits=Publish(recovered=0.5))
    (gc,) = [text for text in found.sentences if text.startswith("gc: ")]
    assert ", an unknown share recovered, +5.0 points" in gc and "no attack on TL shows anything" in gc
    ((state, told),) = held(found.models, "gc", Publish(recovered=0.5))[:1]
    assert state == "not resolved" and "an unknown share recovered" in told


def test_where_nothing_is_recommended_something_is_said_against_each():
    """Without the answers to single images no difference on the target has an interval: TGT may be the best or not."""
    rows = models()
    for one in rows.values():
        one.pop("answers", None)
    found = judged(rows)
    assert "something speaks against each" in found.sentences[0]
    assert all(one["reasons"] for one in found.models.values())


def test_no_larger_share_is_advised_where_none_was_measured():
    """TL gives no more than scratch: nothing can be said of what is recovered, whatever the limit."""
    table = document(models(TL=(60.0, 10.0)))
    with pytest.raises(EvidenceError, match="no attack gets more from TL than from scratch") as told:
        demand(table, "TL", Publish(recovered=0.5), "r")
    assert "publish.recovered" not in str(told.value) and "lines deleted" in str(told.value)


@pytest.mark.usefixtures("undrawn")
def test_run_and_export_hold_the_limits(finished: Path, call):
    """Everything is done and written, then the exit code is 5; without limits it is 0. A dozen steps show nothing.

    No training follows from another limit, and export holds the one that it is given.
    """
    limits = ("--set", "publish.price=0.5", "--set", "publish.recovered=0.01")
    code, out, said = call("run", finished, "-q", *limits, "--set", 'piggyback.models=["TL", "gc"]')
    report = finished.parent / "runs/tiny/report"
    assert code == 5 and said.count("error: ") == 1 and "[publish]" in said
    found = json.loads((report / "verdict.json").read_text())
    assert found["meets_limits"] is False
    assert out.strip().endswith(found["sentences"][-1])
    code, out, said = call("run", finished, "-q")
    assert code == 0 and "error" not in said
    code, _, said = call("export", finished, "--model", "gc", "--to", "gc.safetensors", *limits)
    assert code == 5 and "not met by gc" in said and not Path("gc.safetensors").exists()
    assert call("export", finished, "--model", "gc", "--to", "gc.safetensors", "-q")[0] == 0


def test_a_run_keeps_which_images_were_answered_rightly(finished: Path):
    """The paired price of the sidecars is the difference of their accuracies; an old attack is named, not used."""
    folder = finished.parent / "runs/tiny"
    table = summary.summarise([folder])
    rows = {one["model"]: one for one in table["rows"]}
    gc = table["evidence"]["gc"]
    assert gc["price"]["value"] == pytest.approx(rows["TL"]["acc_t"] - rows["gc"]["acc_t"])
    assert gc["price"]["low"] < gc["price"]["value"] < gc["price"]["high"] and gc["images"] == 797
    path = folder / "piggyback/gc/again.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "parent": {"gc": "0" * 64}}))
    table = summary.summarise([folder])
    assert table["older"] == ["piggyback/gc/again"]
    assert "piggyback/gc/again" in " ".join(table["verdict"]["sentences"])
