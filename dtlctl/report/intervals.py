"""Statistics: 95 % intervals over seeds and over test images, differences, and the share that an attacker recovers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from scipy.stats import binomtest, t

from dtlctl.training.price import mean_price, price

Figure = dict[str, float | None]
"""{"value", "low", "high"}: a number and its 95 % interval, whose ends are None where nothing gives one."""


@dataclass(frozen=True)
class Number:
    """One quantity of several seeds."""

    seeds: Sequence[float]
    images: tuple[float, float] | None = None
    """The ends of the interval that the test images give its mean."""

    @property
    def value(self) -> float:
        return mean(self.seeds)

    def figure(self) -> Figure:
        """The mean with the wider of its intervals, end by end: that of the images and, above one seed, over seeds."""
        ends = [self.images] if self.images else []
        if len(self.seeds) > 1:
            half = half_width(self.seeds)
            ends.append((self.value - half, self.value + half))
        low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (None, None)
        return {"value": self.value, "low": low, "high": high}


def accuracy(seeds: Sequence[float], images: Sequence[int | None], repeats: Sequence[Sequence[float]]) -> Number:
    """In %, by seed: the accuracy, how many images judged it (None: not known), and that of every repetition of it.

    A seed has Wilson's interval, or the t interval over repetitions where that is wider. Seeds may share their images:
    the ends are the means of theirs, as if all erred together.
    """
    ends = []
    for percent, count, again in zip(seeds, images, repeats, strict=True):
        if count is None:
            return Number(seeds)
        wilson = binomtest(round(percent / 100 * count), count).proportion_ci(method="wilson")
        low, high = 100 * float(wilson.low), 100 * float(wilson.high)
        if len(again) > 1:
            low, high = min(low, mean(again) - half_width(again)), max(high, mean(again) + half_width(again))
        ends.append((low, high))
    return Number(seeds, (mean(low for low, _ in ends), mean(high for _, high in ends)))


def above(one: Number, other: Number) -> Number:
    """How much one accuracy is above another: of the images Newcombe's interval (1998, Stat. Med. 17, method 10), which
    takes their errors for independent. They judge the same images, so it is rather too wide than too narrow."""
    seeds = [a - b for a, b in zip(one.seeds, other.seeds, strict=True)]
    if not one.images or not other.images:
        return Number(seeds)
    down = math.hypot(one.value - one.images[0], other.images[1] - other.value)
    up = math.hypot(one.images[1] - one.value, other.value - other.images[0])
    return Number(seeds, (one.value - other.value - down, one.value - other.value + up))


def cost(before: Sequence[float], after: Sequence[float], answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> Number:
    """Points of accuracy lost from one model to another, by seed; answers: of both, which images they had right."""
    seeds = [one - two for one, two in zip(before, after, strict=True)]
    if len(answers) < len(seeds):
        return Number(seeds)
    whole = mean_price([price(*pair) for pair in answers])
    return Number(seeds, (whole.low, whole.high))


def share(own: Number, scratch: Number, tl: Number) -> Figure | None:
    """The share of what TL gives away that an attacker still gets, "recovered": R = (own - scratch) / (tl - scratch).

    Its interval is linearised: that of d = own - (1 - R) scratch - R tl, divided by tl - scratch; of the images, where
    the three err independently, or the t interval of d over seeds where that is wider. None where TL is not above
    scratch by more than its interval: the ratio would be that of two accidents.
    """
    whole = above(tl, scratch).figure()
    if whole["low"] is None or whole["low"] <= 0:
        return None
    if own is tl:  # it errs as it does itself
        return {"value": 1.0, "low": 1.0, "high": 1.0}
    gain = tl.value - scratch.value
    ratio, halves = (own.value - scratch.value) / gain, []
    if own.images and scratch.images and tl.images:
        weighted = ((own.images, 1.0), (scratch.images, 1 - ratio), (tl.images, ratio))
        halves.append(math.hypot(*(weight * (high - low) / 2 for (low, high), weight in weighted)))
    if len(own.seeds) > 1:
        by_seed = zip(own.seeds, scratch.seeds, tl.seeds, strict=True)
        halves.append(half_width([o - z - ratio * (f - z) for o, z, f in by_seed]))
    if not halves:
        return None
    half = max(halves) / gain
    return {"value": ratio, "low": ratio - half, "high": ratio + half}


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of the mean of two or more values."""
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
