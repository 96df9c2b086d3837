"""Batch statistics over processes, of one: torch's own numbers. With real ones: `tests/training/test_processes.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dtlctl.model import batchnorm, networks


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batchnorm, "_sum_over_processes", lambda values: values)


def same_as_torch(norm: nn.Module, *size: int) -> None:
    ours = copy.deepcopy(norm)
    batchnorm.over_processes(ours)
    for training in (True, True, False):
        x, direction = torch.randn(2, *size, dtype=torch.float64)
        found = []
        for one in (norm.train(training), copy.deepcopy(ours.train(training)) if not training else ours):
            own = x.clone().requires_grad_()
            y = one(own)
            gradients = torch.autograd.grad((y * direction).sum(), [own, *one.parameters()])
            found.append([y, *gradients, *one.state_dict().values()])
        for plain, over_all in zip(*found, strict=True):
            torch.testing.assert_close(over_all, plain)


@pytest.mark.parametrize(
    ("norm", "size"),
    [
        (nn.BatchNorm2d(3), (4, 3, 5, 5)),
        (nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
        (nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
        (nn.BatchNorm1d(3), (6, 3)),
        (nn.BatchNorm1d(3), (6, 3, 5)),
    ],
    ids=str,
)
def test_outputs_gradients_and_running_statistics_are_torchs(norm: nn.Module, size: tuple[int, ...]):
    same_as_torch(norm.double(), *size)


def test_a_norm_of_timm_keeps_its_activation():
    layers = pytest.importorskip("timm.layers", reason="the extra timm is not installed")
    same_as_torch(layers.BatchNormAct2d(3, act_layer=nn.SiLU).double(), 4, 3, 5, 5)


def test_a_convolution_is_scale_invariant_where_nothing_passes_its_batch_normalisation_by():
    """By hand: a -> (bn -> b -> bn) + a. A factor of `a` stays in the sum, one of `b` is taken out."""

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
            self.before, self.behind = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            nn.init.zeros_(self.behind.weight)  # as branches begin that are to open later

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.a(x)
            return (self.behind(self.b(self.before(maps).relu())) + maps).mean((2, 3))

    network = networks.Classifier(PreActivation(), 4, {"a": 2})
    assert batchnorm.scale_invariant(network, (3, 6, 6)) == {"b"}
    assert all(p.grad is None for p in network.parameters()) and network.training
