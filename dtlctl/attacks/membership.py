"""Membership inference: from what an attack sees of each image to numbers. A higher score means member."""

from collections.abc import Callable, Sequence
from functools import partial
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


Learner = Callable[[Known, dict[str, np.ndarray], int], Guess]
"""(known images, what he sees of the images to be judged, seed) -> scores; he learns from the known ones alone."""


def single(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
    """He trains nothing: what he sees is the score."""
    (name,) = seen
    return Guess(known.seen[name], known.member, seen[name])


def matched(members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of members and of others in pairs of one class: int64 [P] and [P], as many as there are, in random order.

    members, others: labels [M] and [N]. Without this an attack is credited with how often a class occurs in either
    group, which no model needs to be asked for.
    """
    pairs = []
    for label in np.intersect1d(members, others):
        both = [rng.permutation(np.flatnonzero(labels == label)) for labels in (members, others)]
        count = min(map(len, both))
        pairs.append(np.stack([places[:count] for places in both]))
    chosen = np.concatenate(pairs, 1) if pairs else np.zeros((2, 0), np.int64)
    chosen = chosen[:, rng.permutation(chosen.shape[1])]
    return chosen[0], chosen[1]


def trial(members: dict[str, np.ndarray], others: dict[str, np.ndarray], attacker: Learner, repeats: int, seed: int):
    """Repeat: split both groups at random, let the attacker learn from his part, judge him on the rest.

    members, others: what is seen of M and N images, [M, ...] and [N, ...] under the same names. In the document that
    is returned, numbers and the ends of intervals are means over repeats, `_std` the deviation over repeats. Where
    nothing is learnt, AUC, TPR and ROC are those of all images at once.
    """
    verdicts = []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        orders = [rng.permutation(len(next(iter(group.values())))) for group in (members, others)]
        parts = [np.split(order, [max(1, round(ATTACKERS_SHARE * len(order)))]) for order in orders]
        (known_m, judged_m), (known_n, judged_n) = parts
        known = {name: np.concatenate([members[name][known_m], others[name][known_n]]) for name in members}
        judged = {name: np.concatenate([members[name][judged_m], others[name][judged_n]]) for name in members}
        truth = np.repeat([True, False], [len(known_m), len(known_n)])
        guess = attacker(Known(known, truth), judged, int(rng.integers(2**31)))
        threshold = best_threshold(guess.scores[guess.member], guess.scores[~guess.member])
        ours, theirs = np.split(guess.judged, [len(judged_m)])
        verdicts.append(judge(ours, theirs, threshold, rng))
    document = summarise(verdicts, len(judged_n))
    if attacker is single:  # Nothing is learnt, so nothing need be set aside to rank images.
        (name,) = members
        whole = summarise([judge(members[name], others[name], np.inf, rng)], len(others[name]))
        document |= {key: whole[key] for key in whole if key.startswith(("auc", "tpr", "roc"))}
    return document


class Curves:
    """How many members and how many others score at and above every threshold, in each of R samples of them.

    members, others: scores [M] and [N]; drawn: places of the images of each sample, [R, M] and [R, N]; else R is 1.
    """

    def __init__(self, members: np.ndarray, others: np.ndarray, drawn: Sequence[np.ndarray] | None = None):
        self.m, self.n = len(members), len(others)
        self.scores, places = np.unique(np.concatenate([members, others]), return_inverse=True)
        rows = drawn or (np.arange(self.m)[None], np.arange(self.n)[None])
        shape = len(rows[0]), len(self.scores) + 1  # the last one: above all
        starts, counts = shape[1] * np.arange(shape[0])[:, None], list[np.ndarray]()
        for own, drawn_places in zip((places[: self.m], places[self.m :]), rows, strict=True):
            found = np.bincount((own[drawn_places] + starts).ravel(), minlength=shape[0] * shape[1])
            counts.append(found.reshape(shape)[:, ::-1].cumsum(1)[:, ::-1])
        self.caught, self.alarms = counts

    def auc(self) -> np.ndarray:
        """[R]: the chance that a member scores above a non-member, ties counting half."""
        from scipy.integrate import trapezoid

        return -trapezoid(self.caught, self.alarms, axis=1) / (self.m * self.n)

    def tpr(self, rate: float) -> np.ndarray:
        """[R]: the largest share of members above a threshold that no more than this share of the others reaches."""
        allowed = int(rate * self.n + 1e-9)  # 1/N is one of them, although it has no end in binary
        return (self.caught * (self.alarms <= allowed)).max(1) / self.m

    def balanced_accuracy(self, at: float) -> np.ndarray:
        """[R]: the mean of both groups' shares of right answers; at and above this is called a member."""
        place = np.searchsorted(self.scores, at)
        return (1 + self.caught[:, place] / self.m - self.alarms[:, place] / self.n) / 2


def judge(
    members: np.ndarray, others: np.ndarray, threshold: float, rng: np.random.Generator, rounds: int = 200
) -> dict[str, Any]:
    """How well scores tell members [M] from others [N], everything in [0, 1].

    `auc`; `balanced_accuracy`, at a threshold that comes from elsewhere; either's `_low` and `_high`, a 95 % bootstrap
    interval that resamples members and others separately; `tpr_at_RATE`; `roc`, true positive rates at `grid(others)`.
    """
    curves, found = Curves(members, others), dict[str, Any]()
    drawn = Curves(members, others, [rng.integers(len(g), size=(rounds, len(g))) for g in (members, others)])
    for name, number in (("auc", Curves.auc), ("balanced_accuracy", partial(Curves.balanced_accuracy, at=threshold))):
        low, high = np.quantile(number(drawn), [0.025, 0.975])
        found |= {name: float(number(curves)[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    found |= {f"tpr_at_{rate:g}": tpr_at(curves, drawn, rate) for rate in RATES}
    return found | {"roc": [float(curves.tpr(rate)[0]) for rate in grid(len(others))]}


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member scores above a non-member, ties counting half (Mann-Whitney U / MN)."""
    return float(Curves(members, others).auc()[0])


def tpr_at(curves: Curves, drawn: Curves, rate: float) -> tuple[float, float, float] | None:
    """The share of members above all but `rate` of the others, and a 95 % interval; drawn: of bootstrap samples.

    None where `rate` · N is below one non-member. The threshold is a point of the judged images' own ROC curve and
    hangs on the few highest of the others, so Clopper-Pearson's interval, which takes it as given, is too narrow; the
    interval is the wider, at either end, of that one and the bootstrap's.
    """
    from scipy.stats import binomtest

    if rate * curves.n + 1e-9 < 1:
        return None
    share = float(curves.tpr(rate)[0])
    given = binomtest(round(share * curves.m), curves.m).proportion_ci(0.95, "exact")
    low, high = np.quantile(drawn.tpr(rate), [0.025, 0.975])
    return share, float(min(given.low, low)), float(max(given.high, high))


def grid(others: int, points: int = 16) -> list[float]:
    """False positive rates that so many non-members resolve, evenly spaced on a logarithmic axis from 1/N to 1."""
    return np.geomspace(1 / others, 1, points).tolist()


def summarise(verdicts: Sequence[dict[str, Any]], others: int) -> dict[str, Any]:
    """Means and deviations over what was judged in repeats, on `others` non-members in each."""
    document: dict[str, Any] = {"repeats": len(verdicts)}
    for name in verdicts[0]:
        values = [verdict[name] for verdict in verdicts]
        mean = None if None in values else np.mean(values, axis=0).tolist()
        document[name] = mean and dict(zip(("tpr", "low", "high"), mean, strict=True)) if "tpr" in name else mean
        if name in ("auc", "balanced_accuracy"):
            document[f"{name}_std"] = float(np.std(values))
    document["roc"] = {"fpr": np.round(grid(others), 6).tolist(), "tpr": np.round(document["roc"], 4).tolist()}
    return document


def best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The score at and above which calling an image a member has the best balanced accuracy."""
    curves = Curves(members, others)
    place = int(np.argmax(curves.caught[0, :-1] / curves.m - curves.alarms[0, :-1] / curves.n))
    # Half-way to the neighbour below, so that scores never seen before fall on the nearer side.
    return float(curves.scores[max(0, place - 1) : place + 1].mean())
