"""Statistics: 95 % intervals over seeds and over test images, differences, and the share that an attacker recovers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, t

from dtlctl.training.price import mean_price, price

MARGIN = 3.0
"""Points: a difference of one seed, which has no interval, counts as none up to here."""


class Number(NamedTuple):
    """A mean over seeds with the wider of its 95 % intervals: that of the test images, that over seeds."""

    value: float
    low: float | None = None
    """None, as `high`, where neither the images nor several seeds give an interval."""
    high: float | None = None
    seeds: tuple[float, ...] = ()
    """The value of each seed."""


def number(seeds: Sequence[float], low: float | None = None, high: float | None = None) -> Number:
    """low, high: the ends that the images give. Above one seed the interval over seeds is looked at too."""
    value = mean(seeds)
    if len(seeds) > 1:
        half = half_width(seeds)
        low, high = min(value - half, value if low is None else low), max(value + half, value if high is None else high)
    return Number(value, low, high, tuple(seeds))


def accuracy(seeds: Sequence[float], images: Sequence[int], repeats: Sequence[Sequence[float]]) -> Number:
    """Of an attacker, in %. By seed: the accuracy, how many images judged it, and that of every repetition of it.

    The interval of a seed is Wilson's for so many images, or the t interval over the repetitions where that is wider.
    Several seeds may share their images: the ends are the means of theirs, as if all erred together.
    """
    ends = [_wilson(*pair) for pair in zip(seeds, images, strict=True)]
    for place, each in enumerate(repeats):
        if len(each) > 1:
            middle, half = mean(each), half_width(each)
            ends[place] = min(ends[place][0], middle - half), max(ends[place][1], middle + half)
    return number(seeds, mean(low for low, _ in ends), mean(high for _, high in ends))


def _wilson(percent: float, images: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in %."""
    low, high = binomtest(round(percent / 100 * images), images).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def above(one: Number, other: Number) -> Number:
    """How much one attacker's accuracy is above another's: Newcombe's interval (1998, Stat. Med. 17, method 10).

    It takes their errors for independent. They judge the same images, so it is rather too wide than too narrow.
    """
    points = one.value - other.value
    ends = (one.low, one.high, other.low, other.high)
    seeds = [a - b for a, b in zip(one.seeds, other.seeds, strict=True)]
    if any(end is None for end in ends):
        return number(seeds)
    low, high, least, most = (float(end or 0) for end in ends)
    down, up = math.hypot(one.value - low, most - other.value), math.hypot(high - one.value, other.value - least)
    return number(seeds, points - down, points + up)


def cost(before: Sequence[float], after: Sequence[float], answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> Number:
    """Points of accuracy lost from one model to another, by seed; answers: of both, which images they had right."""
    seeds = [one - two for one, two in zip(before, after, strict=True)]
    if len(answers) < len(seeds):
        return number(seeds)
    whole = mean_price([price(*pair) for pair in answers])
    return number(seeds, whole.low, whole.high)


def share(own: Number, scratch: Number, tl: Number) -> Number | None:
    """The share of what TL gives away that an attacker still gets: `recovered`, with the interval of the images too.

    That is of R = (own - scratch) / (tl - scratch), linearised: the error of own - (1 - R) scratch - R tl over
    tl - scratch, the three erring independently. None where TL is not above scratch by more than its interval.
    """
    whole, ends = above(tl, scratch), []
    if whole.low is None or whole.low <= 0:
        return None
    ratio = (own.value - scratch.value) / whole.value
    for one, weight in ((own, 1.0), (scratch, 1 - ratio), (tl, ratio)):
        if one.low is None or one.high is None:
            return None
        ends.append(weight * (one.high - one.low) / 2)
    half = math.hypot(*ends) / whole.value
    by_seed = zip(own.seeds, scratch.seeds, tl.seeds, strict=True)
    if len(own.seeds) > 1:
        half = max(half, half_width([o - z - ratio * (f - z) for o, z, f in by_seed]) / whole.value)
    return Number(ratio, ratio - half, ratio + half)


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of the mean of two or more values."""
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def difference(model: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean difference of the accuracies of two models on the same seeds, and its half width or `MARGIN`."""
    each = [one - two for one, two in zip(model, other, strict=True)]
    return mean(each), half_width(each) if len(each) > 1 else MARGIN


def recovered(own: Sequence[float], scratch: Sequence[float], tl: Sequence[float]) -> dict[str, float | None] | None:
    """The share of what TL gives away that an attacker still gets, (PL - scratch) / (TL - scratch).

    The arguments are accuracies of the same seeds. Returns {"share", "low", "high"}: the ratio of mean differences and
    its 95 % t interval (None for one seed). With R the ratio and d = (own - scratch) - R (tl - scratch) of a seed, the
    half width is that of the mean of d, divided by the mean of tl - scratch (the ratio, linearised). None where TL is
    not above scratch by more than `difference`'s half width: the ratio would be that of two accidents.
    """
    whole, least = difference(tl, scratch)
    if whole <= least:
        return None
    taken = [one - zero for one, zero in zip(own, scratch, strict=True)]
    share = mean(taken) / whole
    if len(taken) == 1:
        return {"share": share, "low": None, "high": None}
    half = half_width([one - share * (full - zero) for one, full, zero in zip(taken, tl, scratch, strict=True)]) / whole
    return {"share": share, "low": share - half, "high": share + half}
