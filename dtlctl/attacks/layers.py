"""What attackers do to a network's layers before they train: rounded, pruned and low-rank weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from dtlctl.model.networks import Classifier

Weighted = nn.Linear | nn.Conv2d
NORMS = nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm
"""Normalisations with weights of their own."""


def weighted(backbone: nn.Module) -> list[Weighted]:
    """Its convolutions and linear layers, in order."""
    return [layer for layer in backbone.modules() if isinstance(layer, Weighted)]


@torch.no_grad()
def compress(backbone: nn.Module, amount: float) -> None:
    """Round the weights of every convolution and linear layer to `amount` bits (2 or more), or prune a share below 1.

    Rounded: a whole number from -(2^(bits-1) - 1) to 2^(bits-1) - 1 times the output channel's own scale, its largest
    weight's. Pruned: that share of each layer's weights, the smallest, are zero. arXiv:2410.16454: after unlearning,
    less precision can bring back what small changes to the weights only hide.
    """
    for layer in weighted(backbone):
        if amount < 1:
            prune.remove(prune.l1_unstructured(layer, "weight", amount), "weight")
        else:
            rows = layer.weight.flatten(1)
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (int(amount) - 1) - 1)
            layer.weight.copy_(((rows / scale).round() * scale).view_as(layer.weight))


class LowRank(nn.Module):
    """W + up · down, of which W stays as it is (LoRA, arXiv:2106.09685); at first up is zero.

    start: weights of a fresh layer of the same kind; as many of its rows as the rank are what `down` starts from.
    """

    def __init__(self, start: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(start.detach().flatten(1)[:rank].clone())
        self.up = nn.Parameter(start.new_zeros(len(start), len(self.down)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def adapt(model: Classifier, fresh: Classifier, rank: int) -> None:
    """Leave nothing of the backbone to be trained but a low-rank change of each convolution and linear layer."""
    model.backbone.requires_grad_(False)
    for layer, start in zip(weighted(model.backbone), weighted(fresh.backbone), strict=True):
        parametrize.register_parametrization(layer, "weight", LowRank(start.weight, rank))
