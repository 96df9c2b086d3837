"""Diverged training ends before anything of it is applied or kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtlctl.console.progress import Progress
from dtlctl.errors import DivergedError
from dtlctl.recipe.settings import Training
from dtlctl.training import engine as engine_module
from dtlctl.training.engine import Engine
from dtlctl.training.failures import check_reports
from dtlctl.training.resume import State


def train(slopes: list[float], lr: float) -> nn.Linear:
    """One weight that starts at 1, and the loss slope * weight: plain SGD subtracts lr * slope at every step."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    plan = Training(steps=len(slopes), batch_size=2, lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant")

    def objective(step: int):
        loss = slopes[step] * model.weight.sum()
        return loss, {"loss": loss.detach()}

    bar = Progress("train", len(slopes), enabled=False)
    Engine().train(model, objective, plan, len(slopes), 2, bar, lambda _: {}, reports=1)
    return model


def test_a_gradient_that_is_not_finite_is_not_applied_even_where_nobody_looks(monkeypatch):
    """As on a GPU between two reports: 1 - 0.5 * 1 - 0.5 * 0.5 = 0.25 without the infinite step in between."""
    monkeypatch.setattr(engine_module, "check_reports", lambda *_: None)
    assert train([1.0, float("inf"), 0.5], lr=0.5).weight.item() == 0.25


def test_what_is_not_finite_is_named():
    """The gradient may well be finite where a loss that is only reported is not."""
    with pytest.raises(DivergedError, match="at step 2: loss and gradient_norm not finite; last finite report: none"):
        train([1.0, float("inf")], lr=0.5)
    state = State(sums={"gradient_norm": torch.tensor(1.0), "source_loss": torch.tensor(torch.nan)})
    with pytest.raises(DivergedError, match="at step 7: source_loss not finite"):
        check_reports(state, 7)


def test_weights_that_the_last_step_made_infinite_are_refused():
    """The gradient, 1e38, is finite; 1 - 10 * 1e38 is not, in float32."""
    with pytest.raises(DivergedError, match=r"at step 1, the last: weight is not finite"):
        train([1e38], lr=10.0)
    assert torch.isfinite(train([1e38], lr=1.0).weight).all()
