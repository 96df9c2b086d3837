"""Where in a network another one still is: the similarity of what their stages say of the same images."""

from __future__ import annotations

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of features [n, p] and [n, q] of the same n images (arXiv:1905.00414).

    |Yᵀ X|² / (|Xᵀ X| |Yᵀ Y|), Frobenius norms of centred features: in [0, 1], 1 for features that differ by a rotation
    and one scale. 0 where either says the same of all images. With n below p + q it is large for unrelated features.
    """
    x, y = (features.astype(np.float64) - features.mean(0, dtype=np.float64) for features in (x, y))
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.square(y.T @ x).sum() / own) if own > 0 else 0.0


def by_stage(found: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """`linear_cka` of each stage with the same one of another network, as `features.read` names them."""
    return {name: linear_cka(values, other[name]) for name, values in found.items()}
