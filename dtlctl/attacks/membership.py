"""Membership inference: was this image in the source training set? A higher score means member.

This file turns what an attack sees of each image into the numbers that are reported; `registry.py` names the attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

ATTACKERS_SHARE = 0.4
"""Of the images of either group, those whose membership the attacker knows: 4,000 of 10,000 in arXiv:2203.09481."""
RATES = (0.01, 0.001)
"""False positive rates at which true positive rates are told (arXiv:2112.03570)."""


class Known(NamedTuple):
    """What the attacker has: what he sees of m images, any [m, ...] under a name, and who of them is a member [m]."""

    seen: dict[str, np.ndarray]
    member: np.ndarray


class Guess(NamedTuple):
    """An attacker's answer: scores to fit the threshold on, whose they are, and the scores that are judged."""

    scores: np.ndarray
    member: np.ndarray
    judged: np.ndarray


Attacker = Callable[[Known, dict[str, np.ndarray], int], Guess]
"""(known images, what he sees of the images to be judged, seed) -> scores; he learns from the known ones alone."""


class Verdict(NamedTuple):
    """How well scores tell members from non-members; everything in [0, 1], 0.5 is chance for the first six."""

    auc: float
    auc_low: float
    auc_high: float
    """95 % bootstrap interval, resampling members and non-members separately."""
    balanced_accuracy: float
    """Mean of both groups' shares of right answers at a threshold that comes from elsewhere."""
    balanced_accuracy_low: float
    balanced_accuracy_high: float
    tpr: tuple[tuple[float, float, float] | None, ...]
    """At each of `RATES`: the true positive rate and its 95 % Clopper-Pearson interval, or None where the
    non-members are too few to resolve the rate."""
    roc: tuple[float, ...]
    """True positive rates at `grid(others)`."""


def single(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
    """The attacker of an attack that needs no training: what he sees is the score."""
    (name,) = seen
    return Guess(known.seen[name], known.member, seen[name])


def matched(members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of members and of others in pairs of one class: int64 [P] and [P], in random order.

    members, others: labels [M] and [N]. Of a class there are as many pairs as the group has that has fewer. Without
    this an attack is credited with how often a class occurs in either group, which no model needs to be asked for.
    """
    pairs = []
    for label in np.intersect1d(members, others):
        both = [rng.permutation(np.flatnonzero(labels == label)) for labels in (members, others)]
        count = min(map(len, both))
        pairs.append(np.stack([places[:count] for places in both]))
    chosen = np.concatenate(pairs, 1) if pairs else np.zeros((2, 0), np.int64)
    chosen = chosen[:, rng.permutation(chosen.shape[1])]
    return chosen[0], chosen[1]


def trial(members: dict[str, np.ndarray], others: dict[str, np.ndarray], attacker: Attacker, repeats: int, seed: int):
    """Repeat: split both groups at random, let the attacker learn from his part, judge him on the rest.

    members, others: what is seen of M and N images, [M, ...] and [N, ...] under the same names. Of each group 40 %
    are known to the attacker. Numbers are means over repeats, `_std` the deviation over repeats; the ends of an
    interval are means of the repeats' ends. Where nothing is learnt, AUC, TPR and ROC are those of all images at once.
    Returns a document for the sidecar.
    """
    verdicts = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        halves = (_split(len(next(iter(group.values()))), rng) for group in (members, others))
        (known_m, judged_m), (known_n, judged_n) = halves
        known = {name: np.concatenate([members[name][known_m], others[name][known_n]]) for name in members}
        judged = {name: np.concatenate([members[name][judged_m], others[name][judged_n]]) for name in members}
        truth = np.repeat([True, False], [len(known_m), len(known_n)])
        guess = attacker(Known(known, truth), judged, int(rng.integers(2**31)))
        threshold = best_threshold(guess.scores[guess.member], guess.scores[~guess.member])
        count = len(judged_m)
        verdicts.append(judge(guess.judged[:count], guess.judged[count:], threshold, rng))
    document = summarise(verdicts, len(judged_n))
    if attacker is single:  # Nothing is learnt, so nothing need be set aside to rank images.
        (name,) = members
        whole = summarise([judge(members[name], others[name], np.inf, rng)], len(others[name]))
        document |= {key: whole[key] for key in whole if key.startswith(("auc", "tpr", "roc"))}
    return document


def judge(
    members: np.ndarray, others: np.ndarray, threshold: float, rng: np.random.Generator, rounds: int = 200
) -> Verdict:
    """Compare the scores of members [M] with those of others [N]; at and above the threshold is called a member.

    AUC is the probability that a member scores above a non-member, ties counting half (Mann-Whitney U / MN).
    """
    weights = _resample(len(members), rounds, rng), _resample(len(others), rounds, rng)
    hits, misses = members >= threshold, others < threshold
    aucs = _weighted_auc(members, others, *weights)
    accuracies = (weights[0] @ hits / len(members) + weights[1] @ misses / len(others)) / 2
    low, high = np.quantile(np.stack([aucs, accuracies]), [0.025, 0.975], axis=1)
    return Verdict(
        auc(members, others),
        float(low[0]),
        float(high[0]),
        float((hits.mean() + misses.mean()) / 2),
        float(low[1]),
        float(high[1]),
        tuple(tpr_at(members, others, rate, weights) for rate in RATES),
        tuple(float(_caught(members, others, int(rate * len(others) + 1e-9)).mean()) for rate in grid(len(others))),
    )


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member scores above a non-member, ties counting half."""
    ordered = np.sort(others)
    below, not_above = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + not_above).mean() / 2 / len(others))


def tpr_at(
    members: np.ndarray, others: np.ndarray, rate: float, weights: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float, float] | None:
    """The share of members [M] above all but `rate` of the others [N], and a 95 % interval.

    None where `rate` · N is below one non-member. The threshold is a point of the judged images' own ROC curve: it
    says what the ranking would allow, not what an attacker would choose. It hangs on the few highest of the others, so
    Clopper-Pearson's interval, which takes it as given, is too narrow; the interval is the wider, at either end, of
    that one and the bootstrap's. weights: how often each member and each other is drawn, [R, M] and [R, N].
    """
    from scipy.stats import binomtest

    allowed = int(rate * len(others) + 1e-9)
    if not allowed:
        return None
    caught = _caught(members, others, allowed)
    given = binomtest(int(caught.sum()), len(caught)).proportion_ci(0.95, "exact")
    drawn = np.quantile(_weighted_tpr(members, others, allowed, *weights), [0.025, 0.975])
    return float(caught.mean()), float(min(given.low, drawn[0])), float(max(given.high, drawn[1]))


def grid(others: int, points: int = 16) -> list[float]:
    """False positive rates that so many non-members resolve, evenly spaced on a logarithmic axis from 1/N to 1."""
    return np.geomspace(1 / others, 1, points).tolist()


def summarise(verdicts: Sequence[Verdict], others: int) -> dict[str, Any]:
    """Means and deviations over the verdicts of repeats; `others` non-members were judged in each."""
    document: dict[str, Any] = {"repeats": len(verdicts)}
    for name in Verdict._fields[:6]:
        values = [getattr(verdict, name) for verdict in verdicts]
        document[name] = float(np.mean(values))
        if not name.endswith(("low", "high")):
            document[f"{name}_std"] = float(np.std(values))
    for place, rate in enumerate(RATES):
        points = [verdict.tpr[place] for verdict in verdicts]
        mean = None if None in points else np.mean(np.array(points), axis=0).tolist()
        document[f"tpr_at_{rate:g}"] = mean and dict(zip(("tpr", "low", "high"), mean, strict=True))
    curve = np.mean([verdict.roc for verdict in verdicts], axis=0)
    document["roc"] = {
        "fpr": [round(rate, 6) for rate in grid(others)],
        "tpr": [round(float(value), 4) for value in curve],
    }
    return document


def best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The score at and above which calling an image a member has the best balanced accuracy."""
    scores = np.unique(np.concatenate([members, others]))
    # Half-way between neighbours, so that scores never seen before fall on the nearer side.
    candidates = np.concatenate([scores[:1], (scores[:-1] + scores[1:]) / 2])
    hits = 1 - np.searchsorted(np.sort(members), candidates, "left") / len(members)
    false_alarms = 1 - np.searchsorted(np.sort(others), candidates, "left") / len(others)
    return float(candidates[np.argmax(hits - false_alarms)])


def _split(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(count)
    known = max(1, round(ATTACKERS_SHARE * count))
    return order[:known], order[known:]


def _caught(members: np.ndarray, others: np.ndarray, allowed: int) -> np.ndarray:
    """Members above a threshold that at most `allowed` of the others reach."""
    if allowed >= len(others):
        return np.ones(len(members), bool)
    return members > np.sort(others)[len(others) - 1 - allowed]


def _resample(count: int, rounds: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of `count` images is drawn in each bootstrap sample: [rounds, count]."""
    drawn = rng.integers(count, size=(rounds, count)) + count * np.arange(rounds)[:, None]
    return np.bincount(drawn.ravel(), minlength=rounds * count).reshape(rounds, count).astype(np.float64)


def _weighted_auc(
    members: np.ndarray, others: np.ndarray, weights: np.ndarray, other_weights: np.ndarray
) -> np.ndarray:
    """The AUC of every bootstrap sample: members [M] and others [N] drawn `weights` [R, M] and [R, N] times."""
    order = np.argsort(others)
    ordered, below = others[order], np.zeros((len(weights), len(others) + 1))
    np.cumsum(other_weights[:, order], axis=1, out=below[:, 1:])
    left, right = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    wins = (below[:, left] + below[:, right]) / 2
    return (weights * wins).sum(1) / (len(members) * len(others))


def _weighted_tpr(
    members: np.ndarray, others: np.ndarray, allowed: int, weights: np.ndarray, other_weights: np.ndarray
) -> np.ndarray:
    """The share of members above all but `allowed` of the others in every bootstrap sample, drawn as above: [R]."""
    order = np.argsort(-others)
    passed = np.cumsum(other_weights[:, order], axis=1) > allowed
    thresholds = others[order][passed.argmax(1)]
    return (weights * (members > thresholds[:, None])).sum(1) / len(members)
