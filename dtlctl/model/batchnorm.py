"""Batch normalisation over all processes."""

import torch
from torch import Tensor, nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of the global batch; torch's own SyncBatchNorm runs on GPUs only.

    First derivatives only. An input of less precision than float32 is computed with in float32, as torch's own does.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        # One message for both.
        total = _sum_over_processes(torch.cat([x.sum((0, 2, 3)), x.new_full((1,), x.numel() // x.shape[1])]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean[:, None, None]
        variance = _sum_over_processes((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                if running is not None and self.momentum is not None:
                    running.lerp_(now, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(input.dtype)


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
