"""Gradient collision (GC): the value and the exact gradient of Eq. 8 of Koh et al., ICCV 2023, at linear cost.

This file needs nothing but torch and can be used on its own:

    value, surrogate = collide([loss(chunk) for chunk in chunks], parameters)
    surrogate.backward()          # adds the gradient of Eq. 10 to every parameter's .grad

Notation: g_m is the gradient of chunk m's mean loss, H_m its Hessian, G the sum of all g_m over the c chunks of the
*global* batch, C(c,2) = c(c-1)/2 the number of unordered pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class Collision(NamedTuple):
    """What `collide` returns: two scalars, never to be mixed up."""

    value: Tensor
    """L_gc of Eq. 8 (detached): the mean inner product over unordered pairs of chunk gradients."""
    surrogate: Tensor
    """A scalar whose *gradient* is that of L_gc; its own value is 2 L_gc."""


def collide(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    self_pairs: bool = False,
    processes: int = 1,
    all_reduce: Callable[[Tensors], Tensors] | None = None,
) -> Collision:
    """The gradient-collision loss of the chunks and a surrogate to back-propagate (Eq. 8, Eq. 10).

    losses: this process's chunk losses, each a scalar with its graph (the mean loss of the chunk's images).
    parameters: what is differentiated; one that a loss does not use counts as zero.
    self_pairs: also collide every chunk with itself: each g_m meets G rather than G - g_m, which is Algorithm 1 of
        the paper (up to the factor 1 / C(c,2) that the paper's listing leaves out).
    processes, all_reduce: with chunks spread over processes, their number and a function that sums tensors over them.
        The surrogate is scaled so that the *mean* of its gradient over processes is the gradient of L_gc.

    L_gc = (|G|^2 - sum_m |g_m|^2) / (c (c-1)). The surrogate is sum_m <g_m, stop_grad(G - g_m)> / C(c,2), whose
    gradient is sum_m H_m (G - g_m) / C(c,2) exactly, since the Hessian is symmetric and each unordered pair appears
    from both sides. Cost: c gradients and c Hessian-vector products; memory: the graphs of this process's chunks.

    Raises ValueError for fewer than two chunks: nothing collides.
    """
    c = len(losses) * processes
    if c < 2:
        raise ValueError(f"gradient collision needs at least 2 chunks, got {c}")
    pairs = c * (c - 1) / 2
    grads = [gradient(loss, parameters) for loss in losses]
    detached = [[g.detach() for g in chunk] for chunk in grads]

    total = [torch.stack(parts).sum(0) for parts in zip(*detached, strict=True)]
    squares = torch.stack([dot(chunk, chunk) for chunk in detached]).sum()
    if all_reduce is not None:
        *total, squares = all_reduce([*total, squares])

    surrogate = losses[0].new_zeros(())
    for chunk, own in zip(grads, detached, strict=True):
        against = total if self_pairs else torch._foreach_sub(total, own)
        surrogate = surrogate + dot(chunk, against)
    norm = dot(total, total)
    value = (norm if self_pairs else norm - squares) / (2 * pairs)
    return Collision(value, surrogate * (processes / pairs))


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d loss / d parameters with its own graph; zeros where the loss does not depend on a parameter."""
    return torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)


def dot(left: Tensors, right: Tensors) -> Tensor:
    """<left, right> over lists of tensors of equal shapes: a scalar."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
