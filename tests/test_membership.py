import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dtlctl.attacks.membership import judge

few = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=12).map(np.array)


def test_auc_by_hand_with_a_tie():
    """Members 1, 3 against 1, 2: of four duels, 1-1 is half, 1-2 lost, 3-1 and 3-2 won: 2.5 / 4. Twice each is the
    same.
    """
    assert judge(np.array([1.0, 3.0] * 2), np.array([1.0, 2.0] * 2), 0).auc == 2.5 / 4


def test_perfect_separation_has_no_spread():
    """The wrong way round, the AUC is 0, and the best that an attacker can do is to call everybody a member."""
    high, low = np.full(5, 2.0), np.full(7, 1.0)
    assert judge(high, low, 0) == (1, 1, 1, 1)
    assert judge(low, high, 0) == (0, 0, 0, 0.5)
    assert judge(np.arange(5.0, 10), np.arange(-5.0, 0), 0)[:3] == (1, 1, 1)


def test_a_constant_score_is_chance():
    assert judge(np.zeros(6), np.zeros(4), 0) == (0.5, 0.5, 0.5, 0.5)


@settings(deadline=None, max_examples=100)
@given(few, few, st.integers(0, 9))
def test_auc_agrees_with_scikit_learn(members, others, seed):
    verdict = judge(members, others, seed, rounds=10)
    truth = np.repeat([1, 0], [len(members), len(others)])
    assert verdict.auc == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])))
    assert 0 <= verdict.auc_low <= verdict.auc_high <= 1 and 0 <= verdict.balanced_accuracy <= 1


def test_swapping_the_groups_mirrors_the_auc():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.3, 1, 50), rng.normal(0, 1, 40)
    assert judge(members, others, 0).auc == pytest.approx(1 - judge(others, members, 0).auc)


@pytest.mark.parametrize(("shift", "auc"), [(0.0, 0.5), (1.0, 0.7602)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(shift, auc):
    """Two unit normals a shift d apart have the AUC Φ(d/√2), 0.7602 for d = 1. 100 intervals of 95 % cover 95 times,
    deviation 2.2; 88 and up is allowed, for bootstrap intervals of 40 scores are a little short.
    """
    rng = np.random.default_rng(0)
    verdicts = [judge(rng.normal(shift, 1, 40), rng.normal(0, 1, 40), seed, rounds=200) for seed in range(100)]
    assert 88 <= sum(v.auc_low <= auc <= v.auc_high for v in verdicts) <= 99


def test_the_interval_is_the_quantiles_of_the_bootstrap():
    """Hanley and McNeil: var = (A(1-A) + (m-1)(Q1-A²) + (n-1)(Q2-A²)) / mn; of two uniform groups, 1/12 (1/m + 1/n)
    about. With m = n = 200 that is a deviation of 0.0289, and 2 · 1.96 of it is 0.113 wide.
    """
    rng = np.random.default_rng(0)
    verdict = judge(rng.random(200), rng.random(200), 0)
    assert verdict.auc_low < verdict.auc < verdict.auc_high
    assert verdict.auc_high - verdict.auc_low == pytest.approx(0.113, rel=0.1)


def test_the_verdict_depends_on_the_seed_alone():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 30), rng.normal(0, 1, 30)
    assert judge(members, others, 1) == judge(members, others, 1) != judge(members, others, 2)


def test_the_threshold_comes_from_the_attackers_half():
    """After the shuffle, even places are the attacker's half and odd ones are judged.

    Attacker: members 8, 9, others 0, 1: the best threshold is 8. Judged: members 4, 9, others 0, 3: at 8 one member of
    two and both others are right, 3/4. Their own best threshold, 4, would have claimed 1.
    """
    order = np.random.default_rng(5)
    groups = []
    for shuffled in ([8.0, 4, 9, 9], [0.0, 0, 1, 3]):
        group = np.empty(4)
        group[order.permutation(4)] = shuffled
        groups.append(group)
    assert judge(*groups, seed=5).balanced_accuracy == 0.75


def test_noise_gives_an_accuracy_of_one_half_in_the_mean():
    """400 rounds of 8 against 8: four scores a group judge, deviation about 0.17 / sqrt(400) = 0.009. A threshold
    fitted to the judged half would claim well above 0.6.
    """
    rng = np.random.default_rng(0)
    accuracies = [judge(rng.random(8), rng.random(8), seed, rounds=1).balanced_accuracy for seed in range(400)]
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.035)
