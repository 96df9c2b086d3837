"""Reprobe: give the attacker a working source head, so that a destroyed one does not pass for privacy.

Disposal may ruin the source head and leave the features as they were. Every attack that looks through the head then
sees noise, and an AUC of 0.5 shows a broken head and no more. In reprobe mode the head is replaced by a linear one that
the attacker fits himself, on the frozen features.

What he fits it on must not tell him who is a member. So he uses images of his own only: as many members as
non-members, all of known membership, none of which is attacked or judged afterwards. The new head has seen neither
the images whose membership is asked for nor those that thresholds and classifiers are fitted on, and members are
no likelier than others to agree with it, unless the *features* hold the difference. That is what is measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.model.networks import Classifier


def refit(model: Classifier, features: Tensor, labels: Tensor, classes: int, strength: float = 1.0) -> None:
    """Replace the model's source head by a multinomial logistic regression, fitted by L-BFGS.

    features: [n, features] of the attacker's own images; labels: int64 [n] in [0, classes). Minimised is the mean
    cross-entropy plus ‖W‖² / (2 strength n) over standardised features, which is scikit-learn's with C = strength;
    the head that is attached takes the features as they are.
    """
    features = features.detach()
    centre, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    inputs = (features - centre) / spread
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * strength * len(inputs))
        value = F.cross_entropy(inputs @ weight.T + bias, labels) + penalty
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    model.add_head("source", classes)
    head = model.heads["source"]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(weight / spread)
        head.bias.copy_(bias - weight @ (centre / spread))
    model.requires_grad_(False)
