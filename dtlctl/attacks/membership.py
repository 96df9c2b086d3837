"""Membership inference: was this image in the source training set? A higher score means member."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Verdict(NamedTuple):
    """How well scores tell members from non-members; everything in [0, 1], 0.5 is chance."""

    auc: float
    auc_low: float
    auc_high: float
    """95 % bootstrap interval, resampling members and non-members separately."""
    balanced_accuracy: float
    """At the threshold that is best on the attacker's half, measured on the other half."""


def judge(members: np.ndarray, others: np.ndarray, seed: int, rounds: int = 1000) -> Verdict:
    """Score two groups of images: members [M] and others [N], floats, each with at least 4 entries.

    AUC is the probability that a member scores above a non-member, ties counting half (Mann-Whitney U / MN).
    """
    rng = np.random.default_rng(seed)
    members, others = rng.permutation(members), rng.permutation(others)
    samples = [_auc(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(rounds)]
    low, high = np.quantile(samples, [0.025, 0.975])
    threshold = _best_threshold(members[::2], others[::2])
    accuracy = ((members[1::2] >= threshold).mean() + (others[1::2] < threshold).mean()) / 2
    return Verdict(_auc(members, others), float(low), float(high), float(accuracy))


def _auc(members: np.ndarray, others: np.ndarray) -> float:
    ordered = np.sort(others)
    below, not_above = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + not_above).mean() / 2 / len(others))


def _best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The score at and above which calling an image a member has the best balanced accuracy."""
    scores = np.unique(np.concatenate([members, others]))
    # Half-way between neighbours, so that scores never seen before fall on the nearer side.
    candidates = np.concatenate([scores[:1], (scores[:-1] + scores[1:]) / 2])
    hits = 1 - np.searchsorted(np.sort(members), candidates, "left") / len(members)
    false_alarms = 1 - np.searchsorted(np.sort(others), candidates, "left") / len(others)
    return float(candidates[np.argmax(hits - false_alarms)])
