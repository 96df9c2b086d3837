"""Adversarial distance: a member lies further from the decision boundary (Del Grosso et al., arXiv:2203.09481).

The attacker knows the weights, the image and its true label; nothing is trained.
"""

from __future__ import annotations

import copy
import os
import warnings

import torch
from torch import Tensor, nn

from dtlctl.attacks.signals import Observation


def distance(view: Observation, steps: int) -> dict[str, Tensor]:
    """The norm of the smallest change to each image [n] that changes its class; 0 for a misclassified image.

    The smaller of what FMN for L∞ (Pintor et al., arXiv:2102.12827) and DDN for L2 (Rony et al., arXiv:1811.09600) find
    in `steps` steps each, then by bisection towards the image. An image that no change within [0, 1] was found for gets
    the largest norm that there is room for.
    """
    model = copy.deepcopy(view.module).requires_grad_(False)  # foolbox back-propagates into all that asks for it
    parts = [minimal(model, x, y, steps) for x, y in view.batches]
    linf, l2 = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"adv-dist": linf, "adv-dist-l2": l2}


def minimal(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The L∞ and L2 norms [B], of images x [B, 3, S, S] in [0, 1] with true labels y [B]; in the weights' type."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # its model zoo wants git when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it asks scipy for old names
        import foolbox
    x = x.to(next((p.dtype for p in model.parameters()), x.dtype))
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero()[:, 0]
    norms = [x.new_zeros(len(x)) for _ in range(2)]
    if len(right):
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        # foolbox 3.3's own L2FMNAttack never projects: it divides a norm by itself. DDN changes its radius by a
        # fixed factor a step: the fewer steps, the larger, so that it gets from 1 to 1/300 in any case.
        attacks = (
            foolbox.attacks.LInfFMNAttack(steps=steps),
            foolbox.attacks.DDNAttack(steps=steps, gamma=1 - 300 ** (-1 / steps)),
        )
        truth = y[right]
        found = [attack.run(bounded, x[right], foolbox.Misclassification(truth)) for attack in attacks]
        moved = [_nearest(model, x[right], candidate, truth) for candidate in found]
        # Either search may fail where the other does not, and FMN does on the boundary itself.
        for norm, p in zip(norms, (float("inf"), 2.0), strict=True):
            norm[right] = torch.stack([_norms(model, x[right], m, truth, p) for m in moved]).amin(0)
    return norms[0], norms[1]


@torch.no_grad()
def _nearest(model: nn.Module, x: Tensor, moved: Tensor, y: Tensor, halvings: int = 8) -> Tensor:
    """The point of the segment from x to moved, both [B, 3, S, S], from which on the class is another: bisection."""
    low, high = torch.zeros(len(x), 1, 1, 1, device=x.device), torch.ones(len(x), 1, 1, 1, device=x.device)
    for _ in range(halvings):
        middle = (low + high) / 2
        changed = (model(x + middle * (moved - x)).argmax(1) != y)[:, None, None, None]
        low, high = torch.where(changed, low, middle), torch.where(changed, middle, high)
    return x + high * (moved - x)


@torch.no_grad()
def _norms(model: nn.Module, x: Tensor, moved: Tensor, y: Tensor, p: float) -> Tensor:
    # An image that still has its class was not moved at all: foolbox returns it as it came.
    found = model(moved).argmax(1) != y
    norm = torch.linalg.vector_norm((moved - x).flatten(1), p, dim=1)
    return torch.where(found, norm, torch.linalg.vector_norm(torch.maximum(x, 1 - x).flatten(1), p, dim=1))
