"""The one training loop, and the only file that knows Accelerate.

Every process keeps the bare module and its share of each global batch; gradients are averaged by one explicit
all-reduce a step. DistributedDataParallel is not used because it does not support `torch.autograd.grad`, on which
second-order objectives rest.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from dtlctl.data.tensors import Batch, Share
from dtlctl.errors import DivergedError
from dtlctl.progress import Progress
from dtlctl.recipe import Training

Model = TypeVar("Model", bound=nn.Module)
Objective = Callable[[int], tuple[Tensor, dict[str, Tensor]]]
"""number of the step -> (scalar to back-propagate, detached scalars to report); means over this process's share."""


@dataclass
class History:
    """What a training run leaves behind besides the weights."""

    rows: list[dict[str, float]] = field(default_factory=list)
    """One a report: the step, means since the report before, and accuracies where they were measured."""
    seconds: float = 0.0
    images_per_second: float = 0.0


class Engine:
    """Device, processes, and the loop that trains everything."""

    def __init__(self) -> None:
        # Without a GPU, Accelerate must be told so, or it looks for a backend that cannot start.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device: torch.device = self.accelerator.device
        self.processes: int = self.accelerator.num_processes
        self.share = Share(self.accelerator.process_index, self.processes)

    def place(self, model: Model, *, global_batch_norm: bool) -> Model:
        """The model on this device; with several processes, batch statistics over all of them or each one's own."""
        if self.processes > 1 and global_batch_norm:
            for module in model.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = GlobalBatchNorm  # same state, same names: only `forward` differs
        return model.to(self.device)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, summed over processes, by one message."""
        tensors = list(tensors)
        if self.processes == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values [n], one after the other; their lengths may differ."""
        return values if self.processes == 1 else torch.cat(gather_object([values]))

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """All processes' lists, one after the other; plain numbers and tuples only."""
        return values if self.processes == 1 else gather_object(values)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over processes, in place."""
        if self.processes > 1:
            for own, total in zip(tensors, self.all_reduce(tensors), strict=True):
                own.copy_(total / self.processes)

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        plan: Training,
        steps: int,
        batch_size: int,
        progress: Progress,
        evaluate: Callable[[int], dict[str, float]],
        reports: int = 8,
    ) -> History:
        """Minimise `objective` over `steps` steps of SGD with momentum, as `plan` says.

        At each of `reports` even intervals and at the end, the means of what the objective reported and what
        `evaluate(steps done)` returns go into the history. Raises DivergedError for a gradient that is not finite: on
        the CPU before it reaches the weights, on an accelerator, where looking costs time, at the next report.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        statistics = [b for b in model.buffers() if b.is_floating_point()]
        optimizer = torch.optim.SGD(parameters, plan.lr, plan.momentum, weight_decay=plan.weight_decay)
        schedule = _scheduler(optimizer, plan, steps)
        history, started = History(), time.perf_counter()
        every = max(1, steps // reports)
        sums: dict[str, Tensor] = {}
        for step in range(steps):
            loss, parts = objective(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = self._share_gradients(parameters, plan.clip)
            if self.device.type == "cpu" and not math.isfinite(norm):
                raise _diverged(step, norm, history)
            optimizer.step()
            schedule.step()
            self.average_(statistics)
            for name, value in {**parts, "gradient_norm": norm}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            if (step + 1) % every == 0 or step + 1 == steps:
                row = self._report(sums, step + 1, every if (step + 1) % every == 0 else steps % every)
                if not all(map(math.isfinite, row.values())):
                    raise _diverged(step, norm, history)
                sums = {}
                history.rows.append({**row, **evaluate(step + 1)})
                progress.show(history.rows[-1])
            progress.advance(1, images=batch_size)
        history.seconds = time.perf_counter() - started
        history.images_per_second = steps * batch_size / max(history.seconds, 1e-9)
        return history

    @torch.no_grad()
    def accuracy(self, model: nn.Module, head: str, batches: Iterable[Batch]) -> float:
        """Test accuracy in %, over all processes' shares; the model is left in the mode it was in."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        training = model.training
        model.eval()
        for batch in batches:
            hits = model(batch.x, head).argmax(1) == batch.y
            counts += torch.stack([hits.sum(), torch.full_like(hits.sum(), len(hits))])
        model.train(training)
        hits, total = self.all_reduce([counts])[0].tolist()
        return 100 * hits / total

    def peak_memory(self) -> int:
        """Bytes: the accelerator's peak where there is one, else this process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

    def _share_gradients(self, parameters: list[nn.Parameter], clip: float | None) -> Tensor:
        """Average gradients over processes, clip them, and return their norm from before clipping."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        self.average_(grads)
        norm = nn.utils.get_total_norm(grads)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return norm

    def _report(self, sums: dict[str, Tensor], step: int, count: int) -> dict[str, float]:
        means = self.all_reduce([torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in sums.values()])])[0]
        return {"step": step} | dict(zip(sums, (means / (count * self.processes)).tolist(), strict=True))


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose training statistics are those of the global batch, on any backend.

    torch's own SyncBatchNorm runs on GPUs only. First derivatives only: collisions use per-chunk statistics instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        count = _sum_over_processes(torch.tensor(float(input.numel() // input.shape[1]), device=input.device))
        mean = _sum_over_processes(input.sum((0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _sum_over_processes((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            for running, now in ((self.running_mean, mean), (self.running_var, variance * count / (count - 1))):
                if running is not None and self.momentum is not None:
                    running.lerp_(now, self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None])


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


def _sum_over_processes(value: Tensor) -> Tensor:
    return _SumOverProcesses.apply(value)


def _scheduler(optimizer: torch.optim.Optimizer, plan: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if plan.schedule == "one-cycle" and steps > 1:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, steps, cycle_momentum=False)
    if plan.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _diverged(step: int, norm: Tensor, history: History) -> DivergedError:
    last = ", ".join(f"{k} {v:.4g}" for k, v in history.rows[-1].items()) if history.rows else "none yet"
    return DivergedError(
        f"training diverged at step {step + 1}: the gradient norm is {float(norm)}; last finite report: {last}\n"
        "nothing was published; try a smaller lr, clip = 1.0, or another lambda"
    )
