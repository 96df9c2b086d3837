"""The share of what TL gives away that an attacker still gets: (PL - scratch) / (TL - scratch)."""

from __future__ import annotations

import warnings

import numpy as np


def recovered(own: list[float], scratch: list[float], tl: list[float]) -> dict[str, float | None] | None:
    """{"share", "low", "high"}: the ratio of mean differences over seeds, and its 95 % bootstrap interval.

    The lists are accuracies of the same seeds, which are resampled together (scipy.stats.bootstrap, percentile). None
    where TL is not above scratch: there is nothing to recover. low and high are None for a single seed, and where some
    resample has TL not above scratch.
    """
    from scipy.stats import bootstrap

    a, b, c = (np.array(values, dtype=float) for values in (own, scratch, tl))

    def share(a: np.ndarray, b: np.ndarray, c: np.ndarray, axis: int = -1) -> np.ndarray:
        nothing, everything = b.mean(axis), c.mean(axis)
        with np.errstate(all="ignore"):
            return np.where(everything > nothing, (a.mean(axis) - nothing) / (everything - nothing), np.nan)

    value = float(share(a, b, c))
    if not np.isfinite(value):
        return None
    low = high = float("nan")
    if len(a) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of resamples that are all alike
            interval = bootstrap(
                (a, b, c), share, paired=True, vectorized=True, method="percentile", rng=np.random.default_rng(0)
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    finite = np.isfinite([low, high]).all()
    return {"share": value, "low": low if finite else None, "high": high if finite else None}
