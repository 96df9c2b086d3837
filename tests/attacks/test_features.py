"""Linear CKA by hand, and what it says of networks that share a stage."""

from __future__ import annotations

import numpy as np
import pytest

from dtlctl.attacks.features import linear_cka


def test_cka_by_hand():
    """x = (1, -1, 0, 0), y = (1, 0, -1, 0): yᵀx = 1, xᵀx = yᵀy = 2, so 1 / 4. Means do not matter.

    Of z with the columns x and 3 y: |zᵀx|² = |(2, 3)|² = 13, zᵀz = [[2, 3], [3, 18]] with a norm of √346.
    """
    x, y = np.array([[1.0], [-1], [0], [0]]), np.array([[1.0], [0], [-1], [0]])
    assert linear_cka(x, y) == linear_cka(x + 5, y - 7) == pytest.approx(1 / 4)
    z = np.concatenate([x, 3 * y], 1)
    assert linear_cka(x, z) == linear_cka(z, x) == pytest.approx(13 / (2 * 346**0.5))


def test_cka_is_one_for_a_rotation_small_for_strangers_and_nothing_for_a_constant():
    rng = np.random.default_rng(0)
    x, turn = rng.normal(size=(4000, 8)), np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(4000, 8))) < 0.01
    assert linear_cka(x, np.ones((4000, 2))) == 0
