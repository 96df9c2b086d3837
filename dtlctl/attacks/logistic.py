"""Logistic regression: the one fit behind probes, heads fitted anew, and attackers who learn membership."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from dtlctl.model.networks import Classifier

ITERATIONS = 300
"""Of L-BFGS, at most; a fit that would need more is judged like any other."""
UNSEEN = 16.0
"""How far the logit of a class without an image lies below the lowest bias: its probability is about 1e-7."""


class Logistic:
    """A multinomial logistic regression, fitted by scikit-learn: logits = `weight` · scaled features + `bias`.

    features: float64 [N, F], finite; labels: integers or booleans [N]; C: inverse strength of the L2 term. Features
    are scaled to mean 0 and deviation 1 on these N, unless `standardise` is false.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, C: float = 1.0, *, standardise: bool = True):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        # For all threads at once, since `catch_warnings` would not be: one image a class is few, and known to be.
        warnings.filterwarnings("ignore", message="The number of unique classes", module="sklearn")
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        width = features.shape[1]
        self.mean = features.mean(0) if standardise else np.zeros(width)
        self.scale = features.std(0) + 1e-6 if standardise else np.ones(width)
        self.classes = np.unique(labels)
        self.weight, self.bias = np.zeros((len(self.classes), width)), np.zeros(len(self.classes))
        if len(self.classes) == 1:
            return  # there is nothing to tell apart
        fitted = LogisticRegression(C=C, max_iter=ITERATIONS).fit((features - self.mean) / self.scale, labels)
        self.weight, self.bias = fitted.coef_, fitted.intercept_
        if len(self.classes) == 2:  # one row, of the second class against the first
            self.weight, self.bias = (np.concatenate([-half, half]) / 2 for half in (self.weight, self.bias))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n, classes that were seen], in the order of `classes`."""
        return (features - self.mean) / self.scale @ self.weight.T + self.bias


def refit(model: Classifier, head: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """Replace a head by a logistic regression (C = 1) on frozen features [n, features], labels [n] < classes.

    A destroyed head must not pass for privacy: attacks that look through it see noise, whatever the features hold. What
    the attacker fits a new one on must not tell him who is a member, so these are images of his own, as many members as
    others, which are neither attacked nor judged: only a difference in the *features* is then measured.
    """
    fitted = Logistic(features.detach().double().cpu().numpy(), labels.cpu().numpy())
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, fitted.bias.min() - UNSEEN)
    weight[fitted.classes] = fitted.weight / fitted.scale
    bias[fitted.classes] = fitted.bias - weight[fitted.classes] @ fitted.mean
    model.add_head(head, classes)
    layer = model.heads[head]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    model.requires_grad_(False)
