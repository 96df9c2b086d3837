"""From scores to numbers: AUC, balanced accuracy, rates at low FPR, and how often their intervals are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dtlctl.attacks.membership import (
    ATTACKERS_SHARE,
    Curves,
    Guess,
    Known,
    best_threshold,
    grid,
    judge,
    matched,
    single,
    tpr_at,
    trial,
)
from dtlctl.attacks.signals import Observation, blind, logistic

few = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=12).map(np.array)


def verdict(members, others, threshold: float = 0.0, seed: int = 0, rounds: int = 200) -> dict:
    return judge(np.asarray(members, float), np.asarray(others, float), threshold, np.random.default_rng(seed), rounds)


def test_auc_by_hand_with_a_tie():
    """Members 1, 3 against 1, 2: of four duels, 1-1 is half, 1-2 lost, 3-1 and 3-2 won: 2.5 / 4."""
    assert verdict([1, 3], [1, 2])["auc"] == 2.5 / 4


def test_perfect_separation_has_no_spread():
    """The wrong way round, the AUC is 0, and at that threshold every call is wrong."""
    assert [*verdict([2] * 5, [1] * 7, 1.5).values()][:6] == [1] * 6
    assert [*verdict([1] * 5, [2] * 7, 1.5).values()][:6] == [0] * 6


def test_a_constant_score_is_chance():
    assert [*verdict([0] * 6, [0] * 4).values()][:6] == [0.5] * 6


@settings(deadline=None, max_examples=100)
@given(few, few, st.integers(0, 9))
def test_auc_agrees_with_scikit_learn(members, others, seed):
    found = verdict(members, others, seed=seed, rounds=20)
    truth = np.repeat([1, 0], [len(members), len(others)])
    assert found["auc"] == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])))
    assert 0 <= found["auc_low"] <= found["auc_high"] <= 1


@pytest.mark.parametrize(("shift", "auc"), [(0.0, 0.5), (1.0, 0.7602)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(shift, auc):
    """Two unit normals a shift d apart have the AUC Φ(d/√2), 0.7602 for d = 1. 100 intervals of 95 % cover 95 times,
    deviation 2.2; 88 and up is allowed, for bootstrap intervals of 40 scores are a little short.
    """
    rng = np.random.default_rng(0)
    found = [verdict(rng.normal(shift, 1, 40), rng.normal(0, 1, 40), seed=seed) for seed in range(100)]
    assert 88 <= sum(v["auc_low"] <= auc <= v["auc_high"] for v in found) <= 99


def test_the_intervals_are_as_wide_as_theory_says():
    """Hanley and McNeil for two uniform groups: variance 1/12 (1/m + 1/n) about; m = n = 200 gives 0.0289, and 3.92 of
    it is 0.113. Balanced accuracy at the median: variance (1/4)(1/4)(1/m + 1/n), deviation 0.025, width 0.098.
    """
    rng = np.random.default_rng(0)
    found = verdict(rng.random(200), rng.random(200), 0.5, rounds=2000)
    assert found["auc_high"] - found["auc_low"] == pytest.approx(0.113, rel=0.1)
    assert found["balanced_accuracy_high"] - found["balanced_accuracy_low"] == pytest.approx(0.098, rel=0.1)


def test_tpr_at_fpr_by_hand():
    """100 others 0..99 and 1 %: one may be called a member, so the threshold is 98. Of members 98, 98.5, 99.5, 200
    three lie above it, of ties none. Clopper-Pearson for 3 of 4: 0.1941 to 0.9937. With 99 drawn three times the
    threshold is 99, and two lie above it; with the four members drawn 4, 0, 0 and 0 times, none.
    """
    members, others = np.array([98, 98.5, 99.5, 200]), np.arange(100.0)
    once = Curves(members, others)
    assert tpr_at(once, once, 0.01) == pytest.approx((0.75, 0.1941, 0.9937), abs=1e-4)
    thrice = np.concatenate([np.arange(2, 100), [99, 99]])
    drawn = Curves(members, others, [np.array([[0, 1, 2, 3], [0, 0, 0, 0]]), np.array([thrice, thrice])])
    assert drawn.tpr(0.01).tolist() == [0.5, 0]


def test_the_interval_of_the_tpr_counts_the_noise_in_its_threshold():
    """Two unit normals, one apart: 9.2 % of members lie above the upper 1 % of the others, Φ(1 - 2.3263). Of 100
    intervals with 300 images each, Clopper-Pearson's alone, which takes the threshold as given, have it about 60 times.
    """
    rng = np.random.default_rng(0)
    found = [verdict(rng.normal(1, 1, 300), rng.normal(0, 1, 300), seed=seed)["tpr_at_0.01"] for seed in range(100)]
    assert sum(low <= 0.0924 <= high for _, low, high in found) >= 88


def test_a_rate_that_the_others_cannot_resolve_is_none():
    """Below 1/FPR non-members, not one false positive is allowed: there is nothing to measure."""
    for others, rate, resolved in ((99, 0.01, False), (100, 0.01, True), (999, 0.001, False), (1000, 0.001, True)):
        curves = Curves(np.full(50, 1e9), np.arange(float(others)))
        assert (tpr_at(curves, curves, rate) is not None) == resolved


def test_the_roc_curve_meets_its_grid():
    """10 others 0..9, members 0.5..9.5: above all but k of the others lie k + 1 members; at rate 1, everybody."""
    found = verdict(np.arange(10) + 0.5, np.arange(10.0))
    assert grid(10)[0] == 0.1
    assert grid(10)[-1] == 1
    assert found["roc"][0] == pytest.approx(0.2)  # one other may pass: above 8 lie 8.5 and 9.5
    assert found["roc"][-1] == 1
    assert verdict(np.arange(7) + 0.5, np.arange(7.0))["roc"][0] == pytest.approx(2 / 7)  # 1/7 has no end in decimals


def test_the_threshold_maximises_balanced_accuracy():
    """Members 8, 9, others 0, 1: half-way between 1 and 8."""
    assert best_threshold(np.array([8.0, 9]), np.array([0.0, 1])) == 4.5


def test_the_attacker_sees_his_share_and_is_judged_on_the_rest():
    """20 members and 10 others: 8 and 4 are known, 12 and 6 judged, in new splits each time."""
    met = []

    def attacker(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
        met.append((known, seen, seed))
        assert not set(known.seen["id"]) & set(seen["id"])
        return Guess(known.seen["id"], known.member, seen["id"])

    found = trial({"id": np.arange(100.0, 120)}, {"id": np.arange(10.0)}, attacker, 3, 0)
    assert ATTACKERS_SHARE == 0.4
    for known, seen, _ in met:
        assert known.member.sum() == 8
        assert len(known.member) == 12
        assert ((known.seen["id"] >= 100) == known.member).all()
        assert len(seen["id"]) == 18
        assert (seen["id"][:12] >= 100).all()
    assert len({tuple(seen["id"]) for _, seen, _ in met}) == 3
    assert len({seed for _, _, seed in met}) == 3
    assert found["auc"] == found["balanced_accuracy"] == 1
    assert found["repeats"] == 3
    assert found["tpr_at_0.01"] is None


def test_noise_gives_an_accuracy_of_one_half_in_the_mean():
    """400 repeats on 20 against 20, redrawn ten times: a threshold fitted to the judged images would claim well above
    0.6.
    """
    rng = np.random.default_rng(0)
    found = [trial({"s": rng.random(20)}, {"s": rng.random(20)}, single, 40, n)["balanced_accuracy"] for n in range(10)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.05)


def test_the_document_depends_on_the_seed_alone_and_is_json():
    import json

    rng = np.random.default_rng(0)
    groups = {"s": rng.normal(0.5, 1, 300)}, {"s": rng.normal(0, 1, 300)}
    first = trial(*groups, single, 4, 1)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first == trial(*groups, single, 4, 1) != trial(*groups, single, 4, 2)
    assert 0 < first["tpr_at_0.01"]["low"] < first["tpr_at_0.01"]["tpr"] < first["tpr_at_0.01"]["high"] < 1
    assert first["tpr_at_0.001"] is None  # 180 others are judged
    assert len(first["roc"]["fpr"]) == len(first["roc"]["tpr"])


def test_matched_groups_have_as_many_of_every_class():
    """3 of a, 1 of b and 2 of c against 1, 4 and 0 make one pair of a and one of b."""
    members, others = np.array([0, 0, 0, 1, 2, 2]), np.array([1, 1, 0, 1, 1])
    seen = set()
    for seed in range(30):
        ours, theirs = matched(members, others, np.random.default_rng(seed))
        assert sorted(members[ours]) == [0, 1] and (members[ours] == others[theirs]).all()
        seen.add((*sorted(ours), *sorted(theirs)))
    assert len(seen) > 5  # drawn, not the first of each
    assert [len(places) for places in matched(np.array([0]), np.array([1]), np.random.default_rng(0))] == [0, 0]


def test_a_score_that_is_the_class_alone_is_no_membership_once_classes_match():
    """Class 0 scores 1, class 1 scores 0. 90 members and 30 others of class 0, 30 and 90 of class 1.

    AUC = 3/4 · 3/4 + (3/4 · 1/4 + 1/4 · 3/4) / 2 = 0.75; matched by class it is 1/2.
    """
    members, others = np.repeat([0, 1], [90, 30]), np.repeat([0, 1], [30, 90])
    score = np.array([1.0, 0.0])
    rng = np.random.default_rng(0)
    assert judge(score[members], score[others], np.inf, rng)["auc"] == pytest.approx(0.75)
    ours, theirs = matched(members, others, rng)
    assert judge(score[members[ours]], score[others[theirs]], np.inf, rng)["auc"] == pytest.approx(0.5)


def test_the_control_sees_the_classes():
    """The same noise with other shares of two classes: who looks at pixels alone is blind, the control is not."""
    rng = np.random.default_rng(0)

    def seen(labels: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(rng.random((len(labels), 3, 4, 4), np.float32))
        view = Observation(torch.nn.Identity(), [(x, torch.from_numpy(labels))])
        return {"blind": blind(view, 2)["blind"].double().numpy()}

    for shares, least, most in (((270, 30), 0.85, 1), ((150, 150), 0, 0.6)):
        members, others = seen(np.repeat([0, 1], shares)), seen(np.repeat([0, 1], shares[::-1]))
        assert least <= trial(members, others, logistic, 3, seed=0)["auc"] <= most
