"""Learning from labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtlctl.data.tensors import Batch, Share
from dtlctl.objectives.supervised import cross_entropy


class Answers(nn.Module):
    def forward(self, x: Tensor, head: str) -> Tensor:
        return x


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_smoothed_labels_by_hand(smoothing: float):
    """Log probabilities of (0.5, 0.3, 0.2), label 0: -(1 - s) log 0.5 - s/3 (log 0.5 + log 0.3 + log 0.2)."""
    logs = torch.tensor([0.5, 0.3, 0.2]).log()
    batch = Batch(logs.repeat(4, 1), torch.zeros(4, dtype=torch.long), torch.arange(4))
    batches: Any = type("Batches", (), {"__getitem__": lambda self, step: batch, "share": Share(), "batch_size": 4})()
    model: Any = Answers()
    loss, _ = cross_entropy(model, "source", batches, smoothing)(0)
    assert float(loss) == pytest.approx(float(-(1 - smoothing) * logs[0] - smoothing / 3 * logs.sum()), abs=1e-6)
