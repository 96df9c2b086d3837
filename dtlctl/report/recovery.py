"""The share of what TL gives away that an attacker still gets: (PL - scratch) / (TL - scratch)."""

from __future__ import annotations

import numpy as np


def recovered(own: list[float], scratch: list[float], tl: list[float]) -> dict[str, float | None] | None:
    """{"share", "low", "high"}: the ratio of mean differences over seeds, and its 95 % t interval.

    The lists are accuracies of the same seeds. With R the ratio and d = (own - scratch) - R (tl - scratch) of a seed,
    the half width is that of the mean of d, divided by the mean of tl - scratch (the ratio, linearised). None where TL
    is not above scratch: there is nothing to recover. low and high are None for a single seed.
    """
    from scipy.stats import t

    taken, whole = np.array(own) - np.array(scratch), np.array(tl) - np.array(scratch)
    seeds, everything = len(whole), whole.mean()
    if everything <= 0:
        return None
    share = float(taken.mean() / everything)
    if seeds == 1:
        return {"share": share, "low": None, "high": None}
    half = float(t.ppf(0.975, seeds - 1) * np.std(taken - share * whole, ddof=1) / seeds**0.5 / everything)
    return {"share": share, "low": share - half, "high": share + half}
