"""What a network computes on the way to its answer; classifiers of it; and how like another network's it is."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from dtlctl.model import networks

EMBEDDING = "embedding"
"""The name of what the heads see."""
UNSEEN = 16.0
"""How far the logit of a class without an image lies below the lowest bias: its probability is about 1e-7."""


@torch.no_grad()
def read(model: networks.Classifier, images: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """The mean [N, C] of every known stage by its name, first stage first, and the embedding, of a model in eval mode.

    images: in parts [n, 3, S, S].
    """
    names = [*(stage.name for stage in networks.stages(model.backbone)), EMBEDDING]
    found: list[list[np.ndarray]] = []
    with networks.watched(model.backbone) as seen:
        for x in images:
            seen.clear()
            embedding = model.embed(x)
            means = [pooled(output.to(embedding.dtype), model.backbone) for output in seen]
            found.append([part.cpu().numpy() for part in (*means, embedding)])
    return {name: np.concatenate(parts) for name, *parts in zip(names, *found, strict=True)}


def distinct(found: dict[str, np.ndarray]) -> list[str]:
    """The names of what `read` found, without a last stage whose mean is the embedding: a probe would be made twice."""
    *names, last = found
    same = names and found[names[-1]].shape == found[last].shape
    if same and np.allclose(found[names[-1]], found[last], rtol=1e-3, atol=1e-6, equal_nan=True):
        names.pop()
    return [*names, last]


def pooled(output: Tensor, backbone: nn.Module) -> Tensor:
    """[B, C] of square maps [B, C, S, S] (of Swin transformers, and others, [B, S, S, C]) or of tokens [B, T, C]."""
    if output.ndim == 4:
        one, two, three = output.shape[1:]
        last = isinstance(backbone, SwinTransformer) or getattr(backbone, "output_fmt", "") == "NHWC"
        return output.mean((1, 2) if one == two and (two != three or last) else (2, 3))
    return output.mean(1) if output.ndim == 3 else output


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of features [n, p] and [n, q] of the same n images (arXiv:1905.00414).

    |Yᵀ X|² / (|Xᵀ X| |Yᵀ Y|), Frobenius norms of centred features, in [0, 1]; 0 where either says the same of all
    images. With n below p + q it is large for unrelated features.
    """
    x, y = (features.astype(np.float64) - features.mean(0, dtype=np.float64) for features in (x, y))
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.square(y.T @ x).sum() / own) if own > 0 else 0.0


def logistic(features: np.ndarray, labels: np.ndarray, C: float = 1.0, scaler: Any = None) -> Any:
    """scikit-learn's multinomial logistic regression: at most 300 steps of L-BFGS; C: inverse strength of the L2 term.

    features: float64 [N, F], finite, which are scaled to mean 0 and deviation 1, or by another scaler; labels: [N].
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # For all threads at once, since `catch_warnings` would not be: one image a class is few, and known to be.
    warnings.filterwarnings("ignore", message="The number of unique classes", module="sklearn")
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    alone = len(np.unique(labels)) == 1  # then there is nothing to tell apart, which is refused
    model = DummyClassifier() if alone else LogisticRegression(C=C, max_iter=300)
    return make_pipeline(scaler or StandardScaler(), model).fit(features, labels)


def least_squares(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in % on half of the images of a ridge regression on the others; 0 where a feature is not finite.

    features: [N, F], scaled as above; labels: [N].
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = features[order].astype(np.float64), labels[order]
    if not np.isfinite(features).all() or len(np.unique(labels[::2])) < 2:
        return 0.0
    fitted = make_pipeline(StandardScaler(), RidgeClassifier(alpha=features.shape[1] / 10))
    return 100 * float(fitted.fit(features[::2], labels[::2]).score(features[1::2], labels[1::2]))


def refit(model: networks.Classifier, head: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """Replace a head by a logistic regression (C = 1) on frozen features [n, features], labels [n] < classes.

    A destroyed head must not pass for privacy: attacks that look through it see noise, whatever the features hold. What
    the attacker fits a new one on must not tell him who is a member, so these are images of his own, as many members as
    others, which are neither attacked nor judged: only a difference in the *features* is then measured.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):  # with more, they and the threads of scikit-learn's loss wait for each other
        scaler, fitted = logistic(features.detach().cpu().double().numpy(), labels.cpu().numpy())
    found = getattr(fitted, "coef_", np.zeros((1, features.shape[1]))) / scaler.scale_
    offset = getattr(fitted, "intercept_", np.zeros(1)) - found @ scaler.mean_
    if len(fitted.classes_) == 2:  # one row, of the second class against the first
        found, offset = (np.concatenate([-half, half]) / 2 for half in (found, offset))
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, offset.min() - UNSEEN)
    weight[fitted.classes_], bias[fitted.classes_] = found, offset
    model.add_head(head, classes, (torch.from_numpy(weight), torch.from_numpy(bias)))
    model.heads[head].requires_grad_(False)
