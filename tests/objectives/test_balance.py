"""λ from a price: numbers by hand."""

from __future__ import annotations

import math

import pytest

from dtlctl.objectives import balance


def test_lambda_gives_both_terms_the_weights_that_the_ratio_says():
    """λ |∇unlearn| = r (1 − λ) |∇retain| with r = 2, norms 3 and 12: odds 2 · 3 / 12 = 1/2, λ = 1/3."""
    lam = balance.lam([], 2.0, retain=3.0, unlearn=12.0)
    assert lam == pytest.approx(1 / 3)
    assert lam * 12 == pytest.approx(2 * (1 - lam) * 3)


def test_lambda_is_smoothed_over_checks():
    """Half-way in log-odds between odds 1/9 (λ = 0.1) and 1 (λ = 0.5): odds 1/3, λ = 1/4; rows in between have none."""
    rows = [{"step": 1, "lambda": 0.1}, {"step": 2}]
    assert balance.lam(rows, 1.0, retain=5.0, unlearn=5.0) == pytest.approx(0.25)


@pytest.mark.parametrize(("retain", "unlearn", "lam"), [
    (0.0, 1e9, balance.LEAST), (1e9, 0.0, balance.MOST), (1.0, math.inf, balance.LEAST), (1.0, math.nan, balance.LEAST),
    (math.inf, math.inf, balance.LEAST), (1e300, 1e-300, balance.MOST)])  # fmt: skip
def test_lambda_stays_between_its_bounds_where_a_gradient_vanishes_or_bursts(retain: float, unlearn: float, lam: float):
    assert balance.lam([], 1.0, retain, unlearn) == pytest.approx(lam)


def test_lambda_may_go_further_where_the_price_leaves_room():
    """The odds of 0.9 are 9: twice that at r = 2, 18 / 19; at r = 10 it would be 90 / 91, which is above 0.97."""
    found = [balance.lam([], r, retain=1e9, unlearn=1e-9) for r in (0.5, 1.0, 2.0, 10.0)]
    assert found == pytest.approx([0.9, 0.9, 18 / 19, 0.97])


def after(price: float, share: float, last: float = 2.0) -> float:
    """The ratio after a check, by how much: of 61 points there are to lose 1 may be lost at the end."""
    return balance.ratio([{"ratio": last}], share, price, wanted=1.0, whole=61.0) / last


def test_a_network_on_its_way_may_lack_what_a_cosine_leaves():
    """Half-way to LATE it may lack 1 + 60/2 = 31 points, at two thirds 1 + 60/4 = 16, at first all, from LATE on 1."""
    assert balance.ratio([], 0.0, 61.0, wanted=1.0, whole=61.0) == balance.START
    assert [after(price, balance.LATE / 2) for price in (31.0, 1.0)] == pytest.approx([1, 1])
    assert [after(price, balance.LATE * 2 / 3) for price in (16.0, 1.0)] == pytest.approx([1, 1])
    assert [after(1.0, share) for share in (balance.LATE, 1.0)] == pytest.approx([1, 1])


def test_the_ratio_falls_where_the_price_is_above_and_rises_where_it_is_below():
    """0.75 points of FULL = 1.5 are half of GAIN: a factor of e^(1/4); 30 points are as much as 1.5: e^(1/2)."""
    assert [after(31.75, balance.LATE / 2), after(1.75, 1.0)] == pytest.approx([math.exp(-0.25)] * 2)
    assert [after(0.25, 0.1), after(0.25, 1.0)] == pytest.approx([math.exp(0.25)] * 2)
    assert after(61.0, balance.LATE / 2) == pytest.approx(math.exp(-0.5))


def test_a_price_that_cannot_follow_does_not_wind_the_ratio_up():
    assert after(-9.0, 0.5, last=balance.MOST_RATIO) == 1
    assert after(61.0, 1.0, last=balance.LEAST_RATIO) == 1


def test_images_that_cannot_resolve_a_price_lower_what_is_aimed_at():
    """Of ± 0.4 nothing is lacking; ± 3 are 2 more than the price of 1: aimed at 1 − 2."""
    assert balance.aim(1.0, 0.4) == 1.0
    assert balance.aim(1.0, 3.0) == -1.0


def test_a_run_under_control_ends_at_its_price():
    """A plant whose price goes with the log of the ratio, 1 point at r = 1/4: from 1 to there, give or take 0.3."""
    rows: list[dict[str, float]] = []
    for check in range(1, balance.CHECKS + 1):
        at = rows[-1]["ratio"] if rows else balance.START
        price = 1 + 3 * (math.log(at) - math.log(0.25))
        rows.append({"ratio": balance.ratio(rows, check / balance.CHECKS, price, wanted=1.0, whole=61.0)})
    assert 1 + 3 * (math.log(rows[-1]["ratio"]) - math.log(0.25)) == pytest.approx(1, abs=0.3)
