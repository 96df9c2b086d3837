"""λ from a price: a disposal that may cost so many points of target accuracy finds its λ as it runs.

What a λ does depends on how steep the two losses are, which differs by factors of ten and changes as a network forms.
So λ follows from a ratio r of what the two terms of Eq. 1 weigh in a step, λ |∇unlearn| = r (1 - λ) |∇retain|, and r
follows from the price so far: it goes up where that is below the allowed one, and down where it is above what a network
on its way may still lack. The price is that of the mean of the last weights, `AVERAGED`: a network at a high learning
rate lacks several points that annealing gives back, which are not λ's to save (arXiv:1803.05407).
"""

import math
from collections.abc import Mapping, Sequence

START = 1.0
"""The first ratio: both terms weigh the same."""
CHECKS, APART = 40, 10
"""How often a run looks at its price and gradients, and how many steps lie between at least: a look costs a few.
It looks at each report of the history too."""
LATE, ON_ALL = 0.8, 0.7
"""Shares of the steps after which the price should be the allowed one, and is measured on all images."""
AVERAGED = 0.05
"""The share of the steps over which weights are averaged, with exponential weights, for their price."""
GAIN, FULL = 0.5, 1.5
"""A check changes log r by at most GAIN, where the price is FULL points or more away from where it may be."""
LEAST_RATIO, MOST_RATIO = 0.01, 10.0
"""The ratio stays between these: where the price cannot follow, it must not go so far that it takes long to return."""
SMOOTH = 0.5
"""The share that a check has in log-odds of λ: a norm on one batch is noisy."""
LEAST, MOST, SPARE = 1e-4, 0.9, 0.97
"""λ stays between the first two: 1 - λ is part of how far a step goes for the target. Where an unlearning loss has what
it wants its gradient vanishes, and an equal weight for it would leave the target none: a new network never forms. Once
the price leaves room, and so the ratio is above START, the odds of MOST rise with it, up to SPARE."""


def aim(allowed: float, half_width: float) -> float:
    """The price to steer at, in points: the allowed one, or less by what the images cannot resolve of it."""
    return min(allowed, 2 * allowed - half_width)


def ratio(rows: Sequence[Mapping[str, float]], share: float, price: float, wanted: float, whole: float) -> float:
    """The ratio after a check at this share of the run. rows: the history so far; the others in points.

    whole: what there is to lose. A network on its way may lack what a cosine leaves of it, from all down to `wanted`.
    """
    last = next((row["ratio"] for row in reversed(rows) if "ratio" in row), START)
    most = wanted + (whole - wanted) * (1 + math.cos(math.pi * min(1.0, share / LATE))) / 2
    away = max(0.0, price - most) + min(0.0, price - wanted)
    return min(MOST_RATIO, max(LEAST_RATIO, last * math.exp(-GAIN * min(1.0, max(-1.0, away / FULL)))))


def lam(rows: Sequence[Mapping[str, float]], ratio: float, retain: float, unlearn: float) -> float:
    """λ for a ratio and the norms of the two gradients, smoothed over the checks of the history."""
    log_odds = math.log(ratio) + math.log(max(retain, 1e-12)) - math.log(max(unlearn, 1e-12))
    log_odds = min(20.0, max(-20.0, log_odds))  # norms that are no numbers make λ as small as it gets
    if last := next((row["lambda"] for row in reversed(rows) if "lambda" in row), None):
        log_odds = (1 - SMOOTH) * math.log(last / (1 - last)) + SMOOTH * log_odds
    odds = MOST / (1 - MOST) * max(1.0, ratio / START)
    return min(SPARE, odds / (1 + odds), max(LEAST, 1 / (1 + math.exp(-log_odds))))
