"""What an attacker sees of each image with one forward pass, and the attacker that learns by logistic regression."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.attacks import features
from dtlctl.attacks.membership import Guess, Known, auc
from dtlctl.console import devices


class Observation:
    """A model, images with their true labels, and the forward pass that many attacks share.

    model: a function of images [B, 3, S, S] in [0, 1] to logits [B, K], nothing of which is random. batches: pairs of
    images and labels (int64 [B]), read more than once, so that no more than a batch of them is held.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]):
        if isinstance(batches, Iterator):
            raise TypeError("batches are read more than once: give a list or a DataLoader, not a generator")
        self.model, self.batches = model, batches

    @property
    def module(self) -> nn.Module:
        """The model for attacks that look inside. Raises TypeError unless it is a module in eval mode."""
        if not isinstance(self.model, nn.Module) or self.model.training:
            raise TypeError("this attack needs the model as a torch.nn.Module in eval mode")
        return self.model

    @cached_property
    def _answers(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits, labels = zip(*((self.model(x), y) for x, y in self.batches), strict=True)
        return torch.cat(logits), torch.cat(labels)

    @property
    def logits(self) -> Tensor:
        """[n, K]"""
        return self._answers[0]

    @property
    def labels(self) -> Tensor:
        """int64 [n]"""
        return self._answers[1]


def loss(view: Observation) -> dict[str, Tensor]:
    """Minus the cross-entropy of the true label (Yeom et al., arXiv:1709.01604)."""
    return {"loss": -F.cross_entropy(view.logits, view.labels, reduction="none")}


def entropy(view: Observation) -> dict[str, Tensor]:
    """Minus the entropy of the predicted distribution, in nats (Salem et al., arXiv:1806.01246); needs no label."""
    log_p = view.logits.log_softmax(1)
    return {"entropy": (log_p.exp() * log_p).sum(1)}


def max_softmax(view: Observation) -> dict[str, Tensor]:
    """The largest predicted probability (Salem et al., arXiv:1806.01246); needs no label."""
    return {"max-softmax": view.logits.softmax(1).amax(1)}


def modified_entropy(view: Observation) -> dict[str, Tensor]:
    """Minus Mentr = -(1 - p_y) log p_y - Σ_{i≠y} p_i log(1 - p_i) (Song and Mittal, arXiv:2003.10595, Eq. 8).

    Unlike the entropy it tells a confident right answer (0) from a confident wrong one (large).
    """
    log_p = devices.exact(view.logits).log_softmax(1)
    p = log_p.exp()
    log_rest = torch.log1p(-p.clamp(max=1 - 1e-12))  # log(1 - p_i)
    own = F.one_hot(view.labels.to(p.device), p.shape[1]).bool()
    return {"modified-entropy": torch.where(own, (1 - p) * log_p, p * log_rest).sum(1)}


OFFLINE = 0.3
"""The a of RMIA's paper: Pr(x) ≈ ½ ((1 + a) Pr_out(x) + 1 - a) stands in for models that have seen x."""


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the true class's probability, log p / (1 - p), float64 [n], of logits [n, K]: about Gaussian."""
    logits = devices.exact(logits)
    own = F.one_hot(labels.to(logits.device), logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(1)


def rmia(view: Observation, out: Tensor, a: float = OFFLINE) -> dict[str, Tensor]:
    """RMIA, offline (Zarifzadeh et al., arXiv:2312.03262): Pr(x | model) / Pr(x) of each image.

    out: `scaled` answers of reference models that never saw the image, [n, R]. The paper's score is the share of other
    images z whose ratio is at most that of x, over γ: an increasing function of this ratio, with the same ranks.
    """
    own = scaled(view.logits, view.labels)
    return {"rmia": _ratio(own, out.to(own.device), a)}


def _ratio(own: Tensor, out: Tensor, a: float) -> Tensor:
    # At a = 1 the ratio of an image that all of them are sure not to be of its class would be 1 / 0.
    p = ((1 + a) * out.sigmoid().mean(1) + 1 - a) / 2
    return own.sigmoid() / p.clamp(min=torch.finfo(p.dtype).tiny)


def offline_a(own: Tensor, out: Tensor, member: np.ndarray) -> float:
    """The a of RMIA, of 0, 0.1 ... 1, with which it finds a reference model's own members best, by the AUC.

    own, out: `scaled` answers of that model to N images, [N], and of others that never saw them, [N, R]. member: which
    of them it was trained on, [N].
    """
    grid = [round(0.1 * step, 1) for step in range(11)]
    scores = [_ratio(own, out, a).numpy() for a in grid]
    return max(zip(grid, scores, strict=True), key=lambda pair: auc(pair[1][member], pair[1][~member]))[0]


def lira(view: Observation, out: Tensor, variance: float | None = None) -> dict[str, Tensor]:
    """LiRA, offline (Carlini et al., arXiv:2112.03570): how far above the answers of strangers is the model's?

    out: as for `rmia`. In deviations of the Gaussian of the image's own R answers, or with this variance of all images,
    members or not. It ranks as the paper's 1 - Pr(Z > own) does, which would round to 1.
    """
    own = scaled(view.logits, view.labels)
    out = out.to(own.device)
    deviation = out.std(1, unbiased=False) if variance is None else out.new_tensor(variance).sqrt()
    return {"lira": (own - out.mean(1)) / deviation.clamp(min=1e-6)}


def blind(view: Observation, classes: int) -> dict[str, Tensor]:
    """Channel means, deviations, sharpness, colourfulness, and the label of one of so many classes as zeros and a one.

    No attack, but its control (arXiv:2406.16201): whoever can tell members from non-members in this way compares sets
    of images that were differently prepared or hold other classes, and every attack would be credited with that.
    """
    rows = []
    for x, y in view.batches:
        edges = [(x.diff(dim=d).abs()).mean((1, 2, 3))[:, None] for d in (2, 3)]
        colour = (x.amax(1) - x.amin(1)).mean((1, 2))[:, None]
        label = F.one_hot(y, classes).to(x.dtype)
        rows.append(torch.cat([x.mean((2, 3)), x.std((2, 3)), *edges, colour, label], 1))
    return {"blind": torch.cat(rows)}


def logistic(known: Known, seen: dict[str, np.ndarray], seed: int) -> Guess:
    """He fits a logistic regression (L2, C = 1) to the one array [m, features] that he knows, scaled to [0, 1]."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, MinMaxScaler

    (name,) = seen
    # Images that the attacker never saw can lie far outside of his range.
    scaler = make_pipeline(MinMaxScaler(), FunctionTransformer(np.clip, kw_args={"a_min": -10, "a_max": 10}))
    score = features.logistic(known.seen[name], known.member, scaler=scaler).decision_function
    return Guess(score(known.seen[name]), known.member, score(seen[name]))
