"""What an attacker sees of each image with one forward pass, and the attackers that learn by logistic regression.

The attacker knows the model with its source head, the image and its true label. The cheap signals train nothing:
each is a number an image, the higher the likelier a member.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dtlctl.attacks.membership import Guess, Known
from dtlctl.data.tensors import Batch
from dtlctl.model.networks import Classifier


class Observation:
    """A model in eval mode and some images, with the forward pass that many attacks share."""

    def __init__(self, model: Classifier, batches: Iterable[Batch], known: dict[str, Tensor] | None = None):
        """known: what else the attacker knows of each image, [n, ...] by name."""
        self.model, self.batches, self.known = model, list(batches), known or {}
        self.memo: dict[str, Any] = {}
        """What several attacks would otherwise compute anew."""

    @cached_property
    def logits(self) -> Tensor:
        """[n, source classes]"""
        with torch.no_grad():
            return torch.cat([self.model(batch.x, "source") for batch in self.batches])

    @cached_property
    def labels(self) -> Tensor:
        """int64 [n]"""
        return torch.cat([batch.y for batch in self.batches])


def loss(view: Observation) -> dict[str, Tensor]:
    """Minus the cross-entropy of the true label (Yeom et al., arXiv:1709.01604)."""
    return {"loss": -F.cross_entropy(view.logits, view.labels, reduction="none")}


def entropy(view: Observation) -> dict[str, Tensor]:
    """Minus the entropy of the predicted distribution, in nats (Salem et al., arXiv:1806.01246); needs no label."""
    return {"entropy": -_entropy(view.logits)}


def max_softmax(view: Observation) -> dict[str, Tensor]:
    """The largest predicted probability (Salem et al., arXiv:1806.01246); needs no label."""
    return {"max-softmax": view.logits.softmax(1).amax(1)}


def modified_entropy(view: Observation) -> dict[str, Tensor]:
    """Minus Mentr = -(1 - p_y) log p_y - Σ_{i≠y} p_i log(1 - p_i) (Song and Mittal, arXiv:2003.10595, Eq. 8).

    Unlike the entropy it tells a confident right answer (0) from a confident wrong one (large).
    """
    log_p = view.logits.double().log_softmax(1)
    p = log_p.exp()
    log_rest = torch.log1p(-p.clamp(max=1 - 1e-12))  # log(1 - p_i)
    own = F.one_hot(view.labels, p.shape[1]).bool()
    return {"modified-entropy": torch.where(own, (1 - p) * log_p, p * log_rest).sum(1)}


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def blind(view: Observation, classes: int) -> dict[str, Tensor]:
    """Nine plain statistics of the pixels, and the label of one of so many classes as zeros and a one.

    The statistics are channel means, deviations, sharpness, colourfulness. No attack, but its control
    (arXiv:2406.16201): it never asks the model. Whoever can tell members from non-members in this way compares sets of
    images that were differently prepared or hold other classes, and every attack would be credited with that.
    """
    rows = []
    for batch in view.batches:
        x = batch.x
        edges = [(x.diff(dim=d).abs()).mean((1, 2, 3))[:, None] for d in (2, 3)]
        colour = (x.amax(1) - x.amin(1)).mean((1, 2))[:, None]
        label = F.one_hot(batch.y, classes).to(x.dtype)
        rows.append(torch.cat([x.mean((2, 3)), x.std((2, 3)), *edges, colour, label], 1))
    return {"blind": torch.cat(rows)}


def logistic(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
    """An attacker who fits a logistic regression (L2, C = 1) to what he knows, scaled to [0, 1] on it.

    What is seen: one array [m, features]. lbfgs finds the same optimum as the saga of the paper's code.
    """
    from sklearn.linear_model import LogisticRegression

    (name,) = seen
    low, high = known.seen[name].min(0), known.seen[name].max(0)
    span = np.where(high > low, high - low, 1.0)
    scaled, judged = ((values - low) / span for values in (known.seen[name], seen[name]))
    model = LogisticRegression(C=1.0, max_iter=1000).fit(scaled, known.member)
    # Images that the attacker never saw can lie far outside of his range.
    return Guess(model.decision_function(scaled), known.member, model.decision_function(np.clip(judged, -10, 10)))
