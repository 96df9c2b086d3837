"""What `import dtlctl` gives to a program of the user's own."""

from __future__ import annotations

import pytest
import torch

import dtlctl


def test_the_public_names_are_there():
    assert set(dtlctl.__all__) == {"__version__", "collide", "load"}
    with pytest.raises(AttributeError, match="no attribute 'colide'"):
        dtlctl.colide  # noqa: B018


def test_collide_has_the_value_and_the_gradient_of_a_hand_made_case():
    """loss_m = a_m w^2 / 2 has the gradient a_m w. At w = 3, a = 1, 2, 4 the mean over pairs is 9 (2 + 4 + 8) / 3."""
    w = torch.tensor(3.0, requires_grad=True)
    value, surrogate = dtlctl.collide(lambda a: a * w**2 / 2, [w], [1.0, 2.0, 4.0])
    assert float(value) == pytest.approx(42)
    surrogate.backward()
    assert w.grad is not None and float(w.grad) == pytest.approx(28)  # 2 w (2 + 4 + 8) / 3
