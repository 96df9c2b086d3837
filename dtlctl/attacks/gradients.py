"""Per-image gradients of the cross-entropy, seen through a few numbers (Del Grosso et al., arXiv:2203.09481).

The attacker knows the weights, the image and its true label. The model is in eval mode: no image's loss depends on
another image, and one backward pass has the gradients of a whole batch.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.attacks.signals import Observation
from dtlctl.console import devices
from dtlctl.model.networks import Classifier
from dtlctl.model.small_maps import unfold, unfoldable
from dtlctl.model.stages import hooked

CHUNK = 64
"""Images whose layers' inputs, a column for each place of a map, exist at a time."""


def grad_x(view: Observation) -> dict[str, Tensor]:
    """Seven statistics [n, 7] of each image's gradient by its pixels in [0, 1]."""
    return {"grad-x": torch.cat([seven(by_pixels(view.module, x, y)) for x, y in view.batches])}


def grad_w(view: Observation) -> dict[str, Tensor]:
    """The norms [n, layers] of each image's gradient by the weights of every convolution and linear layer."""
    parts = (pair for x, y in view.batches for pair in zip(x.split(CHUNK), y.split(CHUNK), strict=True))
    return {"grad-w": torch.cat([by_weights(view.module, x, y) for x, y in parts])}


def by_pixels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's loss by its pixels, of the shape of x: [B, 3, S, S]; y: [B]."""
    if isinstance(model, Classifier):
        model = copy.copy(model)  # of the same tensors
        model.precision = "float32"  # bfloat16 would round what tells images apart
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return found


def by_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms [B, layers] of each image's gradient by the weights of each layer, in the order of calls; no biases."""
    norms: list[Tensor] = []
    images, none = len(x), x.new_zeros(len(x))

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        place, given = len(norms), inputs[0].detach()
        norms.append(none)

        def keep(gradient: Tensor) -> None:
            norms[place] = _squares(layer, given, gradient, images).clamp(min=0).sqrt()

        output.register_hook(keep)  # sees the gradient by this output, also where an activation overwrites it

    with hooked((m for m in model.modules() if isinstance(m, nn.Linear) or unfoldable(m)), watch):
        by_pixels(model, x, y)
    return torch.stack(norms, 1)


def _squares(layer: nn.Module, inputs: Tensor, gradient: Tensor, images: int) -> Tensor:
    """The squared norm [images] of Σ_t g_t ⊗ a_t over places t: a what the layer multiplies, g the gradient there.

    Where places are few that is Σ_{t,u} (g_t · g_u) (a_t · a_u), the product of two Gram matrices, and costs less.
    """
    if isinstance(layer, nn.Conv2d):  # [images * groups, taps, places] and [images * groups, outputs, places]
        a, g = (v.reshape(images * layer.groups, -1, v.shape[-1]) for v in (unfold(layer, inputs), gradient.flatten(2)))
    else:
        a, g = (v.reshape(images, -1, v.shape[-1]).mT for v in (inputs, gradient))
    taps, outputs, places = a.shape[1], g.shape[1], a.shape[2]
    few = places * (taps + outputs) < taps * outputs
    found = (a.mT @ a) * (g.mT @ g) if few else (g @ a.mT).square()
    return found.sum((1, 2)).view(images, -1).sum(1)


def seven(gradient: Tensor) -> Tensor:
    """L1, L2, L∞, mean, skewness, excess kurtosis and least magnitude of each image's numbers: [B, ...] to [B, 7].

    Skewness and excess kurtosis are those of scipy.stats (biased); both are 0 for a constant vector.
    """
    flat = devices.exact(gradient.flatten(1))  # fourth powers of small gradients leave the range of float32
    size, mean = flat.abs(), flat.mean(1)
    second, third, fourth = ((flat - mean[:, None]).pow(power).mean(1) for power in (2, 3, 4))
    spread = torch.where(second > 0, second, 1)
    kurtosis = torch.where(second > 0, fourth / spread**2 - 3, 0)
    norms = size.sum(1), torch.linalg.vector_norm(flat, dim=1), size.amax(1)
    return torch.stack([*norms, mean, third / spread**1.5, kurtosis, size.amin(1)], 1)
