"""Gradient collision of all chunks in one pass, for networks of convolutions, linear layers and batch norms.

Taking each chunk's gradient by itself re-reads and re-writes all weights c times. But the gradient of Eq. 10 is

    sum_m H_m (G - g_m)  =  H G - grad( sum_m |g_m|^2 / 2 ),        H = sum_m H_m,

where H G is one ordinary double backward of the whole batch, and |g_m|^2 needs no gradient the size of the weights: a
linear layer with the chunk's inputs A [rows, K] and output gradients D [rows, O] has g_m = D'A, so

    |g_m|^2  =  <A A', D D'>,        with two matrices of [rows, rows].

A convolution is the same with its unfolded input; its rows are images times places. Where there are too many rows for
that to pay, g_m is formed, with small weights. The result is exact, at a cost that hardly depends on c.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.grad import conv2d_weight

from dtlctl.model.batchnorm import BatchNorm
from dtlctl.model.small_maps import SmallMapConv2d, unfold, unfoldable
from dtlctl.model.stages import hooked
from dtlctl.objectives.collision import AllReduce, Collision, assemble, gradient, pairs_of, refuse_graph

Layer = nn.Conv2d | nn.Linear


class Call(NamedTuple):
    x: Tensor
    """Its input, with its graph: [images, features] or [images, channels, height, width]."""
    edge: GradientEdge
    """Where the gradient of its output is found, also when a later step overwrites the output in place."""
    rows: int
    """Images times positions of the output."""


@dataclass
class Tape:
    """What one forward pass of all chunks left behind, by module."""

    chunks: int
    calls: dict[Layer, list[Call]]
    spread: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(parameter [C], its copy by chunk [c, C], of which the network was computed)."""


def batchable(model: nn.Module) -> bool:
    """Whether every parameter belongs to a layer that `record` knows."""
    has_own = (m for m in model.modules() if isinstance(m, BatchNorm) or [*m.parameters(recurse=False)])
    return all(_known(module) for module in has_own)


def _known(module: nn.Module) -> bool:
    if type(module) is nn.BatchNorm2d:
        return module.affine and module.momentum is not None
    return type(module) is nn.Linear or (type(module) in (nn.Conv2d, SmallMapConv2d) and unfoldable(module))


@contextmanager
def record(model: nn.Module, chunks: int) -> Iterator[Tape]:
    """Within, a model that is `batchable` treats a batch of equal chunks as it would treat them one by one.

    Batch norms in train mode take each chunk's own statistics; their running statistics move once, by the mean over
    chunks of where each chunk alone would have moved them. One forward pass a tape.
    """
    tape = Tape(chunks, {module: [] for module in model.modules() if isinstance(module, Layer)})
    with ExitStack() as stack, hooked(tape.calls, partial(_remember, tape)):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__dict__["forward"] = partial(_batch_norm, module, tape)
                stack.callback(module.__dict__.pop, "forward")
        yield tape


def collide_batched(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    tape: Tape,
    *,
    self_pairs: bool = False,
    processes: int = 1,
    all_reduce: AllReduce = list,
) -> Collision:
    """What `collision.collide` returns or raises, from the chunk losses of one forward pass under `record`.

    losses: this process's mean losses, by chunk, in the order of the batch. parameters: those of the recorded model.
    Cost: about 9 forward passes of the whole batch for any c. Memory: its second-order graph, once.
    """
    pairs = pairs_of(len(losses) * processes)
    total = torch.stack(list(losses)).sum()
    whole: Sequence[Tensor]
    if self_pairs:  # all pairs, own ones too: the whole batch's gradient is enough
        whole, squares = gradient(total, parameters), total.new_zeros(())
    else:
        whole, squares = _differentiate(total, parameters, tape)
    return assemble(whole, squares, pairs, processes, all_reduce)


def _differentiate(total: Tensor, parameters: Sequence[Tensor], tape: Tape) -> tuple[list[Tensor], Tensor]:
    """By parameter the sum of g_m over chunks; and the sum of |g_m|^2 over chunks. Both with their graphs."""
    refuse_graph(total)
    layers = {module: calls for module, calls in tape.calls.items() if calls}
    products = [m.weight for m, calls in layers.items() if _few_rows(m, calls, tape.chunks)]
    wanted: list[Any] = [call.edge for calls in layers.values() for call in calls]
    wanted += [*(copy for _, copy in tape.spread), *products]
    found = iter(torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True))
    outputs = {m: [(call.x, d) for call in calls if (d := next(found)) is not None] for m, calls in layers.items()}
    by_chunk: dict[Tensor, Tensor] = {p: parts for p, _ in tape.spread if (parts := next(found)) is not None}
    whole: dict[Tensor, Tensor] = {weight: g for weight in products if (g := next(found)) is not None}

    squares = [total.new_zeros(())]
    for module, seen in outputs.items():
        if seen and module.weight in whole:
            squares.append(_squares(module, *seen[0], tape.chunks))
        elif seen:
            formed = [_weight_gradients(module, x, d, tape.chunks) for x, d in seen]
            by_chunk[module.weight] = torch.stack(formed).sum(0)
        if seen and module.bias is not None:
            sums = [_rows(d, tape.chunks).sum(1) for _, d in seen]
            by_chunk[module.bias] = torch.stack(sums).sum(0).to(module.bias.dtype)
    for parameter, parts in by_chunk.items():
        whole[parameter] = parts.sum(0)
        squares.append(parts.square().sum())
    return [whole[p] if p in whole else torch.zeros_like(p) for p in parameters], torch.stack(squares).sum()


def _few_rows(module: Layer, calls: Sequence[Call], chunks: int) -> bool:
    """Whether two matrices of [rows, rows] cost less than a chunk's gradient by the weights."""
    outputs, inputs = module.weight.shape[0], module.weight[0].numel()
    rows = calls[0].rows // chunks
    return len(calls) == 1 and getattr(module, "groups", 1) == 1 and rows * (inputs + outputs) < inputs * outputs


def _squares(module: Layer, x: Tensor, d: Tensor, chunks: int) -> Tensor:
    """sum_m |g_m|^2 = sum_m <A_m A_m', D_m D_m'> of a layer's weight, from its input x and output gradient d."""
    if isinstance(module, nn.Conv2d):
        x = unfold(module, x)
    left, right = (_rows(t, chunks).to(module.weight.dtype) for t in (x, d))
    return (torch.bmm(left, left.mT) * torch.bmm(right, right.mT)).sum()


def _weight_gradients(module: Layer, x: Tensor, d: Tensor, chunks: int) -> Tensor:
    """g_m of a layer's weight, formed: [chunks, *weight.shape]."""
    weight = module.weight
    if isinstance(module, nn.Linear):
        return torch.bmm(_rows(d, chunks).mT, _rows(x, chunks)).to(weight.dtype)
    settings = (module.stride, module.padding, module.dilation, module.groups)
    pairs = zip(x.to(weight.dtype).chunk(chunks), d.to(weight.dtype).chunk(chunks), strict=True)
    return torch.stack([conv2d_weight(a, weight.shape, b, *settings) for a, b in pairs])


def _rows(t: Tensor, chunks: int) -> Tensor:
    """[images, F], or [images, F, ...places] -> [chunks, rows of the chunk, F]."""
    rows = t.flatten(2).mT if t.dim() > 2 else t
    return rows.reshape(chunks, -1, t.shape[1])


def _remember(tape: Tape, module: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
    if isinstance(module, nn.Linear) and output.dim() != 2:
        raise ValueError(f"{module} got an input of shape {[*inputs[0].shape]}, not [images, features]; use `collide`")
    tape.calls[module].append(Call(inputs[0], get_gradient_edge(output), output.numel() // module.weight.shape[0]))


def _batch_norm(module: nn.BatchNorm2d, tape: Tape, x: Tensor) -> Tensor:
    """The module's output, with the statistics of each chunk and a copy of weight and bias for each."""
    c, (images, channels, *size) = tape.chunks, x.shape
    if images % c:
        raise ValueError(f"{images} images are not {c} equal chunks (rest {images % c})")
    weight, bias = module.weight.expand(c, channels), module.bias.expand(c, channels)
    tape.spread += [(module.weight, weight), (module.bias, bias)]
    mean, variance = (r if r is None else r.repeat(c) for r in (module.running_mean, module.running_var))
    # A channel of each chunk becomes a channel of its own, so that torch's own kernel does the work.
    beside = x.reshape(c, images // c, channels, *size).transpose(0, 1).reshape(images // c, c * channels, *size)
    trains, momentum = module.training or mean is None, module.momentum or 0.0
    y = F.batch_norm(beside, mean, variance, weight.reshape(-1), bias.reshape(-1), trains, momentum, module.eps)
    if module.training:
        for old, new in ((module.running_mean, mean), (module.running_var, variance)):
            if old is not None and new is not None:
                old.copy_(new.view(c, channels).mean(0))
    return y.reshape(images // c, c, channels, *size).transpose(0, 1).reshape(images, channels, *size)
