"""Seconds and bytes of a step of training on several processes: as the engine does it, and by torch's DDP.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 tests/training/gradients_in_processes.py

The engine sums all gradients after the backward pass, by one message; DDP by buckets, while the pass still runs. Both
train ResNet-18 (32 pixels) on the same noise, in turns. Bytes are what a process sends over the loopback device.
"""

import copy
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.parallel import DistributedDataParallel

from dtlctl.console.progress import Progress
from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.settings import Training
from dtlctl.training.engine import Engine

BATCH, STEPS, TURNS = 128, 4, 7


class Ready:
    """This process's share of one global batch of noise, whatever the step."""

    batch_size = BATCH

    def __init__(self, engine: Engine):
        torch.manual_seed(1)
        x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))
        self.share = engine.share
        self.batch = Batch(*map(self.share.of, (x, y, torch.arange(BATCH))))

    def __getitem__(self, step: int) -> Batch:
        return self.batch


class ByBuckets(Engine):
    """Nothing is averaged after the backward pass: DDP has done it, and batch statistics are global."""

    def average_(self, tensors) -> None:
        pass


def sent() -> int:
    """Bytes over the loopback device since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def main() -> None:
    torch.manual_seed(0)
    start = networks.build("resnet18", {"source": 100}, stem="imagenet", image_size=32)
    plan = Training(steps=STEPS, batch_size=BATCH, lr=0.01, schedule="constant")
    ways = {}
    for name, engine in (("engine", Engine()), ("DDP", ByBuckets())):
        model = engine.place(copy.deepcopy(start), global_batch_norm=True)
        seen = model
        if name == "DDP":
            seen = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        ways[name] = engine, model, cross_entropy(seen, "source", Ready(engine))
    seconds, sizes = {name: [] for name in ways}, {name: [] for name in ways}
    for turn in range(TURNS + 1):
        for name, (engine, model, objective) in ways.items():
            torch.distributed.barrier()
            before, began = sent(), time.perf_counter()
            engine.train(model, objective, plan, STEPS, BATCH, Progress("", 0, enabled=False), lambda _: {}, reports=1)
            torch.distributed.barrier()
            if turn:  # the first warms up, and DDP learns the order of its buckets
                seconds[name].append((time.perf_counter() - began) / STEPS)
                sizes[name].append((sent() - before) / STEPS / engine.processes / 1e6)
    if engine.is_main:
        weights, count = sum(p.numel() for p in start.parameters()), engine.processes
        print(f"{count} processes, {torch.get_num_threads()} threads each, {weights:,} weights; a ring sends")
        print(f"2(N-1)/N x 4 x weights = {2 * (count - 1) / count * 4 * weights / 1e6:.1f} MB a step and process")
        for name, times in seconds.items():
            spread = f"({min(times):.3f} to {max(times):.3f})"
            print(f"{name:8}{median(times):.3f} s a step {spread}, {median(sizes[name]):.1f} MB sent")
        one, other = (dict(model.named_parameters()) for _, model, _ in ways.values())
        apart = max(float(((one[name] - other[name]).norm() / one[name].norm()).detach()) for name in one)
        print(f"weights differ by {apart:.0e} at most, relative, after {(TURNS + 1) * STEPS} steps")


if __name__ == "__main__":
    main()
