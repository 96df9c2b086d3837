"""A price is a paired difference on the same images, with the interval that they give it: numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dtlctl.training.price import Price, images_for, images_to_tell, mean_price, price, price_apart, resolution


def answers(lost: int, gained: int, both: int, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(before, after): so many images right before alone, after alone, both times and never."""
    counts = (lost, gained, both, neither)
    return np.repeat([True, False, True, False], counts), np.repeat([False, True, True, False], counts)


def test_a_price_and_its_interval_by_hand():
    """12 lost and 8 gained of 100: 4 points. p = 13/102 = 0.12745, q = 9/102 = 0.08824, p - q = 0.03922.

    p + q - (p - q)^2 = 0.21415; / 102 = 0.0020995, whose root is 0.04582; 1.96 of them are 0.08981.
    """
    found = price(*answers(12, 8, 60, 20))
    assert (found.points, found.images, found.disagreement) == (4.0, 100, 0.2)
    assert (found.low, found.high) == pytest.approx((-5.059, 12.902), abs=2e-3)
    assert found.half_width == pytest.approx(8.981, abs=1e-3)
    back = price(*reversed(answers(12, 8, 60, 20)))
    assert (back.points, back.low, back.high) == pytest.approx((-4, -found.high, -found.low))


def test_the_pairing_counts_and_not_the_two_accuracies():
    """70 % and 66 % both times: with 4 images changed the price is known far better than with 64 changed."""
    near, far = price(*answers(4, 0, 66, 30)), price(*answers(34, 30, 36, 0))
    assert near.points == far.points == 4
    assert near.half_width < 5
    assert far.half_width > 15


def test_no_change_has_a_width():
    """p = q = 1/102: the root of (2/102)/102 is sqrt(2)/102 = 0.013865; 1.96 of them are 2.72 points."""
    found = price(*answers(0, 0, 70, 30))
    assert (found.points, found.disagreement) == (0, 0)
    assert (found.low, found.high) == pytest.approx((-2.717, 2.717), abs=1e-3)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """A tenth of the images lost and a twentieth gained: 5 points. 2,000 draws of 300 images; 95 % give or take 1."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(300, (0.10, 0.05, 0.60, 0.25), size=2000)
    found = [price(*answers(*draw)) for draw in draws]
    assert 0.94 < np.mean([one.low <= 5 <= one.high for one in found]) < 0.965


def test_a_price_on_different_images_by_hand():
    """60 of 100 and 30 of 80: 60 - 37.5 points. p = 61/102 = 0.59804, q = 31/82 = 0.37805, p - q = 0.21999.

    0.59804 * 0.40196 / 102 = 0.0023567; 0.37805 * 0.62195 / 82 = 0.0028674; the root of their sum is 0.07228, and 1.96
    of them 0.14167. Independent, one alone is right for 0.59804 * 0.62195 + 0.37805 * 0.40196 = 0.52391.
    """
    found = price_apart(np.arange(100) < 60, np.arange(80) < 30)
    assert (found.points, found.images) == (pytest.approx(22.5), 80)
    assert (found.low, found.high) == pytest.approx((7.832, 36.166), abs=2e-3)
    assert found.disagreement == pytest.approx(0.52391, abs=1e-5)


def test_several_seeds_are_no_more_images():
    """The same images and answers three times are known as well as once; the ends are means of the seeds'."""
    one = price(*answers(12, 8, 60, 20))
    thrice = mean_price([one, one, one])
    assert (thrice.images, thrice.half_width) == (100, pytest.approx(one.half_width))
    assert mean_price([Price(1, -1, 3, 100, 0.1), Price(4, 0, 8, 90, 0.3)]) == Price(2.5, -0.5, 5.5, 90, 0.2)


def test_how_many_images_resolve_a_price():
    """100 images and 20 %: sqrt(0.2 / 100) = 4.47 points, 1.96 of them 8.77. Half a point: 0.2 (1.96 / 0.005)^2."""
    assert resolution(100, 0.2) == pytest.approx(8.765, abs=1e-3)
    assert images_for(0.5, 0.2) == 30_732
    for points in (0.5, 1.3, 8.8):
        enough = images_for(points, 0.2)
        assert resolution(enough, 0.2) <= points < resolution(enough - 1, 0.2)


@pytest.mark.parametrize(("counts", "allowed", "enough"), [
    # 100 images, 4 +- 8.981 points: 3 points away is told by 100 (8.981 / 3)^2 = 896.2; 0.5 points by 32,261.
    ((12, 8, 60, 20), 1.0, 897), ((12, 8, 60, 20), 3.5, 32_261),
    # Nothing changed on one image: 0 +- 92.394 points, from the width of two more; from 1 by 92.394^2 = 8,536.6.
    ((0, 0, 1, 0), 1.0, 8_537), ((12, 8, 60, 20), 4.0, None)])  # fmt: skip
def test_how_many_images_would_tell_a_price_from_the_allowed_one(
    counts: tuple[int, int, int, int], allowed: float, enough: int | None
):
    assert images_to_tell(price(*answers(*counts)), allowed) == enough


def test_what_has_not_told_is_not_enough():
    """0.9 points of 2,000 images, 1 % of which changed: 0.44 would resolve 1, but not tell it from 0.9."""
    found = price(*answers(19, 1, 1500, 480))
    assert found.low <= 1.0 < found.high and images_for(1.0, found.disagreement) < 2000
    enough = images_to_tell(found, 1.0)
    assert enough is not None and enough > 20_000


@pytest.mark.parametrize("points", [1e-7, 1e-200, 1e-320])
def test_a_price_that_no_images_could_resolve_is_counted_all_the_same(points: float):
    """A recipe may allow any price above 0; 1.96² · 0.2 / 1e-8² = 7.68e15 images are for the least that is counted."""
    assert images_for(points, 0.2) == images_for(1e-6, 0.2) == pytest.approx(7.683e15, rel=1e-3)
    assert images_to_tell(price(*answers(10, 10, 80)), points) > 1e12
