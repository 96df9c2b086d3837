"""Linear CKA by hand, and what it says of networks that share a stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dtlctl.attacks.features import linear_cka, pooled


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


def test_means_are_over_places_and_leave_the_channels():
    """Square maps tell where channels are, but as many channels as rows do not; timm's networks then say so."""
    plain: Any = torch.nn.Identity()
    last: Any = SimpleNamespace(output_fmt="NHWC")
    for channels in (3, 4, 5):
        of_channels = torch.rand(2, channels)
        maps = of_channels[:, :, None, None].expand(-1, -1, 4, 4)
        assert torch.allclose(pooled(maps, plain), of_channels)
        assert torch.allclose(pooled(maps.permute(0, 2, 3, 1), last), of_channels)
        assert channels == 4 or torch.allclose(pooled(maps.permute(0, 2, 3, 1), plain), of_channels)
