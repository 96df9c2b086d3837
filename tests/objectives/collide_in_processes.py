"""Steps of gradient collision with eight chunks, shared by the processes; each way in turn.

`everything(FOLDER)` runs it on 1, 2, 4 and 8 processes (gloo), and writes value, gradient and weights.
"""

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dtlctl.data.tensors import Batch, Share
from dtlctl.model import networks
from dtlctl.objectives import step as forward
from dtlctl.objectives.step import Step
from dtlctl.objectives.unlearn import GradientCollision

CHUNKS = 8
STEPS = {"batched": 10, "keep": 3, "recompute": 3}


def all_reduce(tensors):
    """Sums over processes, by one message."""
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def train(memory, share, out):
    torch.manual_seed(0)
    student = networks.build("resnet8", {"source": 3, "target": 2}, width=4, image_size=8)
    parameters = list(student.parameters())
    out.update(weights(student, f"before/{memory}"))
    local = CHUNKS // share.processes
    for number in range(STEPS[memory]):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.rand(32, 3, 8, 8, generator=generator), torch.randint(3, (32,), generator=generator)
        batch = Batch(share.of(x), share.of(y), share.of(torch.arange(32)))
        seen, tape, again = forward.outputs(student, batch, local, memory)
        step = Step(
            chunks=seen,
            target=[],
            teacher=lambda x: x,
            parameters=parameters,
            images=32,
            seed=0,
            processes=share.processes,
            all_reduce=all_reduce,
            tape=tape,
            again=again,
        )
        surrogate, value = GradientCollision(chunks=CHUNKS).loss(step)
        grads = torch.autograd.grad(surrogate, parameters, materialize_grads=True)
        grads = [g / share.processes for g in all_reduce(grads)]
        if number == 0:
            out[f"value/{memory}"] = value.reshape(1)
            out.update({f"gradient/{memory}/{i}": g.contiguous() for i, g in enumerate(grads) if g.norm() > 1e-6})
        with torch.no_grad():
            torch._foreach_add_(parameters, grads, alpha=-0.02)
    out.update(weights(student, f"after/{memory}"))


def weights(student, prefix):
    return {f"{prefix}/{name}": p.detach().clone() for name, p in student.named_parameters()}


def work(rank, processes, folder):
    dist.init_process_group("gloo", f"file://{folder}/store-{processes}", rank=rank, world_size=processes)
    assert dist.get_world_size() == processes
    found = {}
    for memory in STEPS:
        train(memory, Share(rank, processes), found)
    if rank == 0:
        save_file(found, f"{folder}/{processes}.safetensors")
    dist.destroy_process_group()


def everything(folder):
    context = torch.multiprocessing.get_context("fork")  # importing torch anew costs far more than the work
    for processes in (1, 2, 4, 8):
        running = [context.Process(target=work, args=(rank, processes, folder)) for rank in range(processes)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        assert [process.exitcode for process in running] == [0] * processes
