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


def test_the_price_does_not_steer_while_the_network_forms():
    assert balance.ratio([{"ratio": 0.8}], balance.FORMED - 0.01, price=60.0, wanted=1.0) == 0.8
    assert balance.ratio([], 0.1, price=60.0, wanted=1.0) == balance.START


def test_the_ratio_falls_where_the_price_is_above_and_rises_where_it_is_below():
    """1.5 points of FULL = 3 are half of GAIN: a factor of e^(1/4); 30 points are as much as 3: e^(1/2)."""
    assert balance.ratio([{"ratio": 2.0}], 0.9, price=2.5, wanted=1.0) == pytest.approx(2 * math.exp(-0.25))
    assert balance.ratio([{"ratio": 2.0}], 0.9, price=-0.5, wanted=1.0) == pytest.approx(2 * math.exp(0.25))
    assert balance.ratio([{"ratio": 2.0}], 0.9, price=31.0, wanted=1.0) == pytest.approx(2 * math.exp(-0.5))


def test_images_that_cannot_resolve_a_price_lower_what_is_aimed_at():
    """Of ± 0.4 nothing is lacking; ± 3 are 2 more than the price of 1: aimed at 1 − 2."""
    assert balance.aim(1.0, 0.4) == 1.0
    assert balance.aim(1.0, 3.0) == -1.0


def test_a_run_under_control_ends_at_its_price():
    """A plant whose price goes with the log of the ratio, 1 point at r = 1/4: there from 1, within the steering."""
    rows: list[dict[str, float]] = []
    for check in range(1, balance.CHECKS + 1):
        at = rows[-1]["ratio"] if rows else balance.START
        price = 1 + 3 * (math.log(at) - math.log(0.25))
        rows.append({"ratio": balance.ratio(rows, check / balance.CHECKS, price, wanted=1.0)})
    assert rows[-1]["ratio"] == pytest.approx(0.25, rel=0.05)
