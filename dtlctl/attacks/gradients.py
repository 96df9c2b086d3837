"""Per-image gradients of the cross-entropy, seen through seven statistics (Del Grosso et al., arXiv:2203.09481).

The attacker knows the weights, the image and its true label. On the statistics of the images whose membership he
knows he fits a logistic regression.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, nn
from torch.func import functional_call, grad, vmap

from dtlctl.attacks.signals import Observation
from dtlctl.model.networks import Classifier

MEMORY = 512 * 2**20
"""Bytes that the gradients of one chunk may take."""
BLOCK = 2**18
"""Numbers of all gradients together that are looked at at once: few for a cache, many for the cost of a call."""


def grad_w(view: Observation) -> dict[str, Tensor]:
    """The statistics [n, 7] of each image's gradient by all parameters."""
    return {"grad-w": torch.cat([by_weights(view.module, x, y) for x, y in view.batches])}


def grad_x(view: Observation) -> dict[str, Tensor]:
    """The statistics [n, 7] of each image's gradient by its pixels in [0, 1]."""
    return {"grad-x": torch.cat([by_pixels(view.module, x, y) for x, y in view.batches])}


def by_pixels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Statistics [B, 7] of each image's gradient by its pixels; x: [B, 3, S, S]; y: [B].

    The model must be in eval mode: then no image's loss depends on another image, and one backward pass has all.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(F.cross_entropy(_exact(model)(x), y, reduction="sum"), x)
    return seven([found])


def by_weights(model: nn.Module, x: Tensor, y: Tensor, chunk: int | None = None) -> Tensor:
    """Statistics [B, 7] of each image's gradient by the weights, of a model in eval mode; x and y as above.

    The gradients of `chunk` images exist at a time, by default as many as fit into 512 MiB and at most 64; of the
    others only the statistics are left.
    """
    model = _exact(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = chunk or max(1, min(64, MEMORY // (2 * size)))
    function = vmap(grad(partial(_loss, model)), in_dims=(None, 0, 0))
    found = (function(parameters, *part) for part in zip(x.split(chunk), y.split(chunk), strict=True))
    return torch.cat([seven(list(by_weight.values())) for by_weight in found])


def _exact(model: nn.Module) -> nn.Module:
    """The model, of the same tensors, that computes with no less precision than float32."""
    if isinstance(model, Classifier):
        model = copy.copy(model)
        model.precision = "float32"  # under `vmap`, batch norm takes no bfloat16 beside statistics in float32
    return model


def _loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of one image [3, S, S] and label []."""
    return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])


def seven(parts: list[Tensor]) -> Tensor:
    """L1, L2, L∞, mean, skewness, excess kurtosis and least magnitude of B vectors, [B, 7] in float64.

    Each vector is given as its pieces, [B, ...], which are never joined.
    Skewness and excess kurtosis are those of scipy.stats (biased); both are 0 for a constant vector.
    """
    count = sum(part[0].numel() for part in parts)
    blocks = [block for part in parts for block in part.flatten(1).split(max(1, BLOCK // len(part)), dim=1)]
    total, l1, most, least = (torch.stack(found) for found in zip(*map(_sums, blocks), strict=True))
    mean = total.sum(0) / count
    # Moments about the mean, in a second pass: raw moments lose what is small beside the mean. In float64: fourth
    # powers of small gradients leave the range of float32.
    central = torch.zeros(3, len(mean), dtype=torch.float64, device=mean.device)
    for block in blocks:
        deviation = block.double() - mean[:, None]
        square = deviation.square()
        central += torch.stack([square.sum(1), linalg.vecdot(square, deviation), linalg.vecdot(square, square)])
    second, third, fourth = central / count
    l2 = (central[0] + count * mean.square()).sqrt()
    flat = second <= 0
    spread = torch.where(flat, torch.ones_like(second), second)
    kurtosis = torch.where(flat, torch.zeros_like(second), fourth / spread**2 - 3)
    skewness = third / spread**1.5
    return torch.stack([l1.sum(0), l2, most.amax(0).double(), mean, skewness, kurtosis, least.amin(0).double()], 1)


def _sums(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row of a block: the sum, and of the magnitudes the sum, the largest and the smallest."""
    size = block.abs()
    return block.sum(1, dtype=torch.float64), size.sum(1, dtype=torch.float64), size.amax(1), size.amin(1)
