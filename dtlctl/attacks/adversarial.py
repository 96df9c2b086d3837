"""Adversarial distance: a member lies further from the decision boundary (Del Grosso et al., arXiv:2203.09481)."""

import copy
import os
import warnings

import torch
from torch import Tensor, nn

from dtlctl.attacks.signals import Observation


def distance(view: Observation, steps: int) -> dict[str, Tensor]:
    """The norm of the smallest change to each image [n] that changes its class; 0 for a misclassified image.

    The smaller of what FMN for L∞ (Pintor et al., arXiv:2102.12827) and DDN for L2 (Rony et al., arXiv:1811.09600) find
    in `steps` steps each, then by bisection; where they find none, the largest norm that [0, 1] has room for.
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
    own, truth, bounded = x[right], y[right], foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    # foolbox 3.3's own L2FMNAttack never projects: it divides a norm by itself. DDN changes its radius by a fixed
    # factor a step: the fewer steps, the larger, so that it gets from 1 to 1/300 in any case.
    gamma = 1 - 300 ** (-1 / steps)
    attacks = foolbox.attacks.LInfFMNAttack(steps=steps), foolbox.attacks.DDNAttack(steps=steps, gamma=gamma)
    norms = x.new_zeros(2, len(x))
    norms[:, right] = torch.inf
    for attack in attacks if len(right) else ():
        moved = _nearest(model, own, attack.run(bounded, own, foolbox.Misclassification(truth)), truth)
        # Either search may fail where the other does not, and FMN does on the boundary itself: then an image still has
        # its class, foolbox returns it as it came, and what counts is the room that there is.
        with torch.no_grad():
            failed = (model(moved).argmax(1) == truth)[:, None, None, None]
        change = torch.where(failed, torch.maximum(own, 1 - own), moved - own).flatten(1)
        found = torch.stack([torch.linalg.vector_norm(change, p, dim=1) for p in (torch.inf, 2.0)])
        norms[:, right] = torch.minimum(norms[:, right], found)
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
