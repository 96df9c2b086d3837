"""Per-image gradients of the source cross-entropy, seen through seven statistics (Del Grosso et al., arXiv:2203.09481).

The attacker knows the weights, the image and its true label. On the statistics of the images whose membership he
knows he fits a logistic regression.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dtlctl.attacks.signals import View
from dtlctl.models import Classifier

STATISTICS = ("l1", "l2", "linf", "mean", "skewness", "excess kurtosis", "min")
MEMORY = 512 * 2**20
"""Bytes that the gradients of one chunk may take."""


def weights(view: View) -> dict[str, Tensor]:
    """Grad w: the statistics [n, 7] of the gradient by all parameters that the source head depends on."""
    return {"grad-w": _statistics(view)[0]}


def pixels(view: View) -> dict[str, Tensor]:
    """Grad x: the statistics [n, 7] of the gradient by the image's pixels in [0, 1]."""
    return {"grad-x": _statistics(view)[1]}


def _statistics(view: View) -> tuple[Tensor, Tensor]:
    """Both, from one pass over the images: kept on the view, since both attacks ask for it."""
    if "gradients" not in view.memo:
        parts = [per_image(view.model, batch.x, batch.y) for batch in view.batches]
        view.memo["gradients"] = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return view.memo["gradients"]


def per_image(model: Classifier, x: Tensor, y: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Statistics [B, 7] of each image's gradient by the weights, and by its pixels. x: [B, 3, S, S]; y: [B].

    The model must be in eval mode. The gradients of `chunk` images exist at a time, by default as many as fit into
    512 MiB and at most 64; of the others only the statistics are left.
    """
    assert not model.training
    parameters = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("heads.") or "source" in n}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = chunk or max(1, min(64, MEMORY // (2 * size)))
    function = vmap(grad(partial(_loss, model), argnums=(0, 1)), in_dims=(None, 0, 0))
    rows: list[tuple[Tensor, Tensor]] = []
    for images, labels in zip(x.split(chunk), y.split(chunk), strict=True):
        by_weight, by_pixel = function(parameters, images, labels)
        rows.append((seven(list(by_weight.values())), seven([by_pixel])))
    by_weights, by_pixels = zip(*rows, strict=True)
    return torch.cat(by_weights), torch.cat(by_pixels)


def _loss(model: Classifier, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of one image [3, S, S] and label []."""
    return F.cross_entropy(functional_call(model, parameters, (x[None], "source")), y[None])


def seven(parts: list[Tensor]) -> Tensor:
    """`STATISTICS` [B, 7] in float64 of B vectors, each given as its pieces [B, ...], which are never joined.

    Skewness and excess kurtosis are those of scipy.stats (biased); both are 0 for a constant vector.
    """
    count = sum(part[0].numel() for part in parts)
    sums = torch.zeros(3, len(parts[0]), dtype=torch.float64, device=parts[0].device)
    most, least = torch.zeros_like(sums[0]), torch.full_like(sums[0], torch.inf)
    for values in map(_rows, parts):
        size = values.abs()
        sums += torch.stack([values.sum(1), size.sum(1), values.square().sum(1)])
        most, least = torch.maximum(most, size.amax(1)), torch.minimum(least, size.amin(1))
    mean, l1, l2 = sums[0] / count, sums[1], sums[2].sqrt()
    # Moments about the mean, in a second pass: raw moments lose what is small beside the mean.
    central = torch.zeros_like(sums)
    for values in map(_rows, parts):
        deviation = values - mean[:, None]
        square = deviation.square()
        central += torch.stack([square.sum(1), (square * deviation).sum(1), square.square().sum(1)])
    second, third, fourth = central / count
    flat = second <= 0
    spread = torch.where(flat, torch.ones_like(second), second)
    kurtosis = torch.where(flat, torch.zeros_like(second), fourth / spread**2 - 3)
    return torch.stack([l1, l2, most, mean, third / spread**1.5, kurtosis, least], 1)


def _rows(part: Tensor) -> Tensor:
    """[B, numbers] in float64: fourth powers of small gradients leave the range of float32."""
    return part.flatten(1).double()
