"""What a change of a model costs: accuracy lost on the same images, with the interval that so many images give it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean

import numpy as np

Z = NormalDist().inv_cdf(0.975)
"""Half widths of 95 % intervals are so many standard errors: 1.96."""
LEAST = 1e-6
"""Points: for a smaller difference the images are counted as for this one, or their number would overflow."""
EXPECTED = 0.2
"""The share of images that one of TL and a variant alone answers rightly, where none was measured yet."""


@dataclass(frozen=True)
class Price:
    """Points of accuracy lost from one model to another, with their 95 % interval."""

    points: float
    """Above 0 where the second model is worse."""
    low: float
    high: float
    images: int
    disagreement: float
    """Share of the images that one of the two models alone answers rightly."""

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def price(before: np.ndarray, after: np.ndarray) -> Price:
    """The price of going from one model to another: bool [n] each, whether it answers image i rightly.

    The interval is the adjusted Wald interval for paired proportions (Bonett and Price 2012, J. Educ. Behav. Stat.
    37(4)): one more image is taken to be lost and one to be gained, so that it has a width where no image changed.
    It is about where other images of this kind would put these two models, not about models of other seeds.
    """
    images, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    p, q = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (images + 2))
    low, high = 100 * (p - q - half), 100 * (p - q + half)
    return Price(100 * (lost - gained) / images, low, high, images, (lost + gained) / images)


def price_apart(before: np.ndarray, after: np.ndarray) -> Price:
    """The price where the two models answered different images: bool [m] and [n].

    The interval is that of Agresti and Caffo (2000, The American Statistician 54(4)) for independent proportions: one
    more image of each is taken to be right and one wrong. `disagreement` is that of two models that err independently.
    """
    p, q = ((answers.sum() + 1) / (len(answers) + 2) for answers in (before, after))
    half = Z * math.sqrt(p * (1 - p) / (len(before) + 2) + q * (1 - q) / (len(after) + 2))
    points = 100 * (before.mean() - after.mean())
    low, high = 100 * (p - q - half), 100 * (p - q + half)
    return Price(float(points), float(low), float(high), len(after), float(p * (1 - q) + q * (1 - p)))


def mean_price(prices: Sequence[Price]) -> Price:
    """The mean of the prices of several seeds, which may share images or not; `images` is that of the fewest.

    The ends of its interval are the means of theirs: as wide as if all seeds erred together, and so wide enough.
    """
    ends = {name: mean(getattr(one, name) for one in prices) for name in ("points", "low", "high", "disagreement")}
    return Price(**ends, images=min(one.images for one in prices))


def resolution(images: int, disagreement: float) -> float:
    """Half width, in points, of the 95 % interval of a price near 0 on so many images."""
    return 100 * Z * math.sqrt(disagreement / images)


def images_for(points: float, disagreement: float) -> int:
    """The fewest images whose `resolution` is so many points or better."""
    return math.ceil(disagreement * (100 * Z / max(points, LEAST)) ** 2)


def images_to_tell(cost: Price, allowed: float) -> int | None:
    """About how many images of this kind would tell such a price from an allowed one, of which it is not told; more
    than these. None where both are the same."""
    apart = abs(allowed - cost.points)
    more = math.ceil(cost.images * (cost.half_width / max(apart, LEAST)) ** 2)
    return max(cost.images + 1, more) if apart else None
