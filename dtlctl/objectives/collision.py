"""Gradient collision (GC): the value and the exact gradient of Eq. 8 of Koh et al., ICCV 2023, at linear cost.

This file needs nothing but torch and can be used on its own:

    value, surrogate = collide(loss, parameters, chunks)      # loss(chunk) -> the mean loss of the chunk's images
    surrogate.backward()          # adds the gradient of Eq. 10 to every parameter's .grad

Notation: g_m is the gradient of chunk m's mean loss, H_m its Hessian, G the sum of all g_m over the c chunks of the
*global* batch, C(c,2) = c(c-1)/2 the number of unordered pairs. `batched.py` computes the same faster for some nets.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
AllReduce = Callable[[Tensors], Tensors]


class Collision(NamedTuple):
    """What a collision returns: two scalars, never to be mixed up."""

    value: Tensor
    """L_gc of Eq. 8 (detached): the mean inner product over unordered pairs of chunk gradients."""
    surrogate: Tensor
    """A scalar whose *gradient* is that of L_gc. Its own value means nothing (2 L_gc on one process, or 0)."""


def collide(
    loss: Callable[[Any], Tensor],
    parameters: Iterable[Tensor],
    chunks: Iterable[Any],
    *,
    self_pairs: bool = False,
    recompute: bool = False,
    processes: int = 1,
    all_reduce: AllReduce = list,
) -> Collision:
    """The gradient-collision loss of the chunks and a surrogate to back-propagate (Eq. 8, Eq. 10).

    loss: chunk -> scalar with its graph, the mean loss of the chunk's images; called once a chunk, in order, or with
        `recompute` twice: then it must be a function of chunk and parameters (no dropout, no moving statistics).
    parameters: what is differentiated; one that a loss does not use counts as zero.
    chunks: this process's chunks, of whatever type `loss` takes. All chunks of all processes weigh the same.
    self_pairs: each g_m meets G rather than G - g_m, which is Algorithm 1 of the paper (up to the factor 1 / C(c,2)
        that the paper's listing leaves out).
    recompute: build each chunk's graph twice, hold one at a time.
    processes, all_reduce: of chunks spread over processes, their number and a function that sums tensors over them.
        The *mean* of the surrogate's gradient over processes is the gradient of L_gc.

    L_gc = (|G|^2 - sum_m |g_m|^2) / (c (c-1)); its gradient is sum_m H_m (G - g_m) / C(c,2).
    Cost, in forward passes of the whole batch: 9 (a step of cross-entropy costs 3); with `recompute` 12. Memory: the
    graphs and gradients of this process's chunks; with `recompute` of one chunk, and three times the parameters.
    Raises ValueError for fewer than two chunks: nothing collides; for no parameters, or sharded ones; and for
    attention, torch.compile and SyncBatchNorm as `_ONCE` says. Of other steps that torch cannot differentiate twice,
    such as hardsigmoid, `backward` raises torch's own RuntimeError.
    """
    parameters, chunks = list(parameters), list(chunks)
    pairs = pairs_of(len(chunks) * processes)
    refuse_sharded(parameters)
    if not parameters:
        raise ValueError("collide: there are no parameters to differentiate")
    squares = parameters[0].new_zeros(())
    if not recompute:
        grads = [gradient(loss(chunk), parameters) for chunk in chunks]
        whole = [torch.stack(parts).sum(0) for parts in zip(*grads, strict=True)]
        if not self_pairs:
            squares = torch.stack([dot(chunk, chunk) for chunk in grads]).sum()
        return assemble(whole, squares, pairs, processes, all_reduce)
    total = [torch.zeros_like(p) for p in parameters]
    for chunk in chunks:
        own = torch.autograd.grad(loss(chunk), parameters, materialize_grads=True)
        torch._foreach_add_(total, own)
        squares = squares if self_pairs else squares + dot(own, own)
    *total, squares = all_reduce([*total, squares])
    result = [torch.zeros_like(p) for p in parameters]
    for chunk in chunks:
        parts = gradient(loss(chunk), parameters)
        against = total if self_pairs else torch._foreach_sub(total, [g.detach() for g in parts])
        product = torch.autograd.grad(dot(parts, against), parameters, materialize_grads=True)
        torch._foreach_add_(result, product)
        del parts, against, product  # or the next chunk's graph is built beside this one
    torch._foreach_mul_(result, processes / pairs)
    return Collision((dot(total, total) - squares) / (2 * pairs), KnownGradient.apply(result, *parameters))


def assemble(whole: Tensors, squares: Tensor, pairs: float, processes: int, all_reduce: AllReduce) -> Collision:
    """The collision of gradients that carry their graphs.

    whole: this process's sum of g_m, by parameter; squares: its sum of |g_m|^2, or 0 with self-pairs. The surrogate is
    (<G, stop_grad(G)> - sum_m |g_m|^2 / 2) / C(c,2), with the gradient sum_m H_m (G - g_m) / C(c,2): the derivative
    of |g_m|^2 / 2 is H_m g_m, since the Hessian is symmetric.
    """
    *total, all_squares = all_reduce([g.detach() for g in (*whole, squares)])
    surrogate = dot(whole, total) - (squares + squares.detach()) / 2  # on one process its value is 2 L_gc
    return Collision((dot(total, total) - all_squares) / (2 * pairs), surrogate * (processes / pairs))


class KnownGradient(torch.autograd.Function):
    """A scalar whose gradient is known: zero, with the given gradient for every parameter."""

    @staticmethod
    def forward(ctx: Any, gradient: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradient = gradient
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(g * scales[0] for g in ctx.gradient))


def pairs_of(chunks: int) -> float:
    """C(c,2), the number of unordered pairs. Raises ValueError where there is none."""
    if chunks < 2:
        raise ValueError(f"gradient collision needs at least 2 chunks, got {chunks}")
    return chunks * (chunks - 1) / 2


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d loss / d parameters with its own graph; zeros where the loss does not depend on a parameter."""
    refuse_graph(loss)
    return torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)


def dot(left: Tensors, right: Tensors) -> Tensor:
    """<left, right> over lists of tensors of equal shapes: a scalar."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def refuse_sharded(parameters: Sequence[Tensor]) -> None:
    """Raise ValueError for parameters of which this process holds a part only."""
    for parameter in parameters:
        if {"DTensor", "FlatParameter"} & {type(parameter).__name__, type(parameter.data).__name__}:
            raise ValueError(
                "gradient collision cannot differentiate twice through sharded parameters "
                f"({type(parameter).__name__}, as FSDP makes); give every process the whole model"
            )


_ONCE = {
    "ScaledDotProduct": "fused attention has no second derivative; run the forward pass under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "CompiledFunction": "torch.compile has no double backward; run the forward pass uncompiled",
    "SyncBatchNorm": "SyncBatchNorm has no second derivative; use BatchNorm2d: chunks have their own statistics",
}
"""What can be differentiated once, by how the names of its graph's nodes begin, and what to do."""


def refuse_graph(loss: Tensor) -> None:
    """Raise ValueError where the graph of a loss holds a step that torch cannot differentiate twice."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
        for name, remedy in _ONCE.items():
            if node.name().startswith(name):
                raise ValueError(remedy)
