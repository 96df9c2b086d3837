"""Statistics over seeds: 95 % t intervals, paired differences, and the share that an attacker recovers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from scipy.stats import t

MARGIN = 3.0
"""Points: a difference of one seed, which has no interval, counts as none up to here."""


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
