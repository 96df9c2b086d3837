"""Batch normalisation: over all processes, and which convolutions are scale-invariant by it."""

import copy
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BatchNorm: Any = nn.modules.batchnorm._BatchNorm
"""The base of every batch normalisation: torch's own, of maps and of vectors, and timm's, some of which do more."""


@lru_cache(maxsize=2)  # an attacker asks before each of his trials
@torch.enable_grad()
def scale_invariant(network: nn.Module, size: tuple[int, ...]) -> set[str]:
    """Names of a backbone's convolutions whose weights, all times one factor, give the same answers in train mode.

    Batch normalisation takes the factor out again, and their gradients are orthogonal to their weights
    (arXiv:1706.05350); not so in squeeze-and-excitation, or where a shortcut begins before the normalisation.
    network: a new one, whose weights are sane; size: [3, H, W] of an image.
    """
    seen: Any = copy.deepcopy(network).cpu().double().eval().requires_grad_(True)
    for norm in (module for module in seen.modules() if isinstance(module, BatchNorm)):
        norm.train().eps = 1e-20
        if norm.weight is not None:  # which begins as zero where a branch is to open later
            nn.init.ones_(norm.weight)
    seen.precision, random = "float32", torch.Generator().manual_seed(0)
    noise = torch.rand(8, *size, generator=random, dtype=torch.float64)
    answers = seen.embed(noise)
    (answers * torch.randn(answers.shape, generator=random, dtype=torch.float64)).sum().backward()
    weights = {name: module.weight for name, module in seen.backbone.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name
        for name, weight in weights.items()
        if weight.grad is not None and (weight * weight.grad).sum().abs() < 1e-4 * weight.norm() * weight.grad.norm()
    }


def over_processes(norm: nn.Module) -> None:
    """Let a batch normalisation take the statistics of the global batch in train mode; first derivatives only.

    Same state, same names: only `forward` differs. torch's own SyncBatchNorm runs on GPUs only.
    """
    kind: Any = type(norm)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with _GlobalStatistics() if self.training else nullcontext():
            return kind.forward(self, x)

    norm.__class__ = type(f"Global{kind.__name__}", (kind,), {"forward": forward})


class _GlobalStatistics(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if function is F.batch_norm else function)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """torch's function in train mode, of [B, C, ...]; less precision than float32 is computed with in float32."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    places, beside = (0, *range(2, x.dim())), (-1, *(1,) * (x.dim() - 2))
    # One message for both.
    total = _sum_over_processes(torch.cat([x.sum(places), x.new_full((1,), x.numel() // x.shape[1])]))
    count = total[-1].detach()
    mean = total[:-1] / count
    centred = x - mean.view(beside)
    variance = _sum_over_processes((centred**2).sum(places)) / count
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, variance * count / (count - 1))):
            if running is not None:
                running.lerp_(now, momentum)
    scale = (variance + eps).rsqrt()
    if weight is None or bias is None:
        return (centred * scale.view(beside)).to(input.dtype)
    return torch.addcmul(bias.view(beside), centred, (weight * scale).view(beside)).to(input.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose derivative is all-reduce: every process's sum feeds every process's loss."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)


_sum_over_processes = _SumOverProcesses.apply
