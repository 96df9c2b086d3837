"""One step of cross-entropy, or of gradient collision in any of the ways that the benchmark compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.objectives import batched, collision, forward

WAYS = ("ce-chunked", "gc-batched", "gc-keep", "gc-recompute", "gc-pairwise", "gc-forward-over-reverse")
"""Beside "ce", one step of cross-entropy on the whole batch."""
PAIRWISE_MOST = 4
"""Chunks up to which the double loop over pairs is run: its cost grows with their square."""
Step = Callable[[], None]


class Bench:
    """A network and one batch of noise: what the parts of the benchmark share."""

    def __init__(
        self,
        arch: str,
        stem: str,
        size: int,
        batch_size: int,
        precision: networks.Precision,
        device: torch.device,
        channels_last: bool = False,
    ):
        self.device, self.precision = device, precision
        torch.manual_seed(0)
        self.x, self.y = torch.rand(batch_size, 3, size, size), torch.randint(100, (batch_size,))
        self.model = networks.build(arch, {"source": 100, "target": 10}, stem=stem, image_size=size)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(device).to(memory_format=layout).precision = precision
        self.x, self.y = self.x.to(device, memory_format=layout), self.y.to(device)
        self.parameters = list(self.model.parameters())

    def step(self, way: str, chunks: int) -> Step:
        """A function that leaves the gradient of one way in `.grad`."""
        return {
            "ce": self._cross_entropy,
            "ce-chunked": self._cross_entropy,
            "gc-batched": self._batched,
            "gc-keep": self._chunked,
            "gc-recompute": lambda c: self._chunked(c, recompute=True),
            "gc-pairwise": self._pairwise,
            "gc-forward-over-reverse": self._forward_over_reverse,
        }[way](chunks)

    def can(self, way: str, chunks: int) -> bool:
        """Whether the way exists for this network and precision, and ends in reasonable time."""
        if way == "gc-pairwise":
            return chunks <= PAIRWISE_MOST
        if way == "gc-batched":
            return batched.batchable(self.model)
        return way != "gc-forward-over-reverse" or self.precision != "bfloat16"  # torch's jvp knows no autocast

    def reference(self, chunks: int) -> list[Tensor]:
        """The gradient in float64."""
        x, self.x = self.x, self.x.double()
        self.model.precision = "float32"
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.double()
        self._chunked(chunks)()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.model.zero_grad()
        self.model.float().load_state_dict(weights)
        self.x, self.model.precision = x, self.precision
        return grads

    def error(self, reference: Sequence[Tensor]) -> tuple[float, float]:
        """|g - r| / |r| of the gradient that is there, and its cosine to the reference, over all parameters at once."""
        both = zip(self.parameters, reference, strict=True)
        ours = torch.cat([(torch.zeros_like(r) if p.grad is None else p.grad).double().flatten() for p, r in both])
        theirs = torch.cat([r.flatten() for r in reference])
        return float((ours - theirs).norm() / theirs.norm()), float(F.cosine_similarity(ours, theirs, dim=0))

    def _loss(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(pair[0], "source"), pair[1])

    def _pairs(self, chunks: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.chunk(chunks), self.y.chunk(chunks), strict=True))

    def _cross_entropy(self, chunks: int) -> Step:
        def step() -> None:
            for pair in self._pairs(chunks):
                self._loss(pair).backward()

        return step

    def _batched(self, chunks: int) -> Step:
        batch = Batch(self.x, self.y, torch.arange(len(self.y)))

        def step() -> None:
            seen, tape = forward.together(self.model, batch, chunks)
            losses = [F.cross_entropy(chunk.source, chunk.y) for chunk in seen]
            batched.collide_batched(losses, self.parameters, tape).surrogate.backward()

        return step

    def _chunked(self, chunks: int, recompute: bool = False) -> Step:
        def step() -> None:
            pairs = self._pairs(chunks)
            collision.collide(self._loss, self.parameters, pairs, recompute=recompute).surrogate.backward()

        return step

    def _pairwise(self, chunks: int) -> Step:
        def step() -> None:
            grads = [collision.gradient(self._loss(pair), self.parameters) for pair in self._pairs(chunks)]
            products = [collision.dot(g, h) for g, h in combinations(grads, 2)]
            _leave(
                self.parameters, torch.autograd.grad(torch.stack(products).mean(), self.parameters, allow_unused=True)
            )

        return step

    def _forward_over_reverse(self, chunks: int) -> Step:
        names = [name for name, _ in self.model.named_parameters()]

        def gradient_at(pair: tuple[Tensor, Tensor]) -> Callable[..., Any]:
            def loss(weights: dict[str, Tensor]) -> Tensor:
                buffers = {name: b.clone() for name, b in self.model.named_buffers()}
                logits = torch.func.functional_call(self.model, (weights, buffers), (pair[0], "source"))
                return F.cross_entropy(logits, pair[1])

            return torch.func.grad(loss)

        def step() -> None:
            weights = {name: p.detach() for name, p in self.model.named_parameters()}
            grads = [gradient_at(pair)(weights) for pair in self._pairs(chunks)]
            total = {name: torch.stack([g[name] for g in grads]).sum(0) for name in names}
            result = {name: torch.zeros_like(weights[name]) for name in names}
            for pair, own in zip(self._pairs(chunks), grads, strict=True):
                against = {name: total[name] - own[name] for name in names}
                with warnings.catch_warnings():  # torch's own, from its inside
                    warnings.simplefilter("ignore", FutureWarning)
                    product = torch.func.jvp(gradient_at(pair), (weights,), (against,))[1]
                for name in names:
                    result[name] += product[name]
            _leave(self.parameters, [result[name] / collision.pairs_of(chunks) for name in names])

        return step


def _leave(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
