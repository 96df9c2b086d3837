"""Twenty steps of gradient collision with eight chunks, shared by the processes; each way in turn.

Run alone or by torchrun: `collide_in_processes.py FILE PROCESSES` writes value, gradient and weights.
"""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dtlctl import models
from dtlctl.data.tensors import Batch, Share
from dtlctl.objectives import views
from dtlctl.objectives.step import Step
from dtlctl.objectives.unlearn import GradientCollision

CHUNKS, STEPS = 8, 20


def all_reduce(tensors):
    tensors = [t.clone() for t in tensors]
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
    return tensors


def train(memory, share, out):
    torch.manual_seed(0)
    student = models.build("resnet8", {"source": 3, "target": 2}, width=4, image_size=8)
    parameters, norms = list(student.parameters()), views.momenta(student)
    out.update(weights(student, f"before/{memory}"))
    local = CHUNKS // share.processes
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.rand(32, 3, 8, 8, generator=generator), torch.randint(3, (32,), generator=generator)
        batch = Batch(share.of(x), share.of(y), share.of(torch.arange(32)))
        seen, tape = views.together(student, batch, local) if memory == "batched" else (None, None)
        step = Step(
            chunks=seen or views.apart(student, batch, local, norms),
            target=[],
            teacher=lambda x: x,
            parameters=parameters,
            images=32,
            seed=0,
            processes=share.processes,
            all_reduce=all_reduce,
            tape=tape,
            again=views.again(student, batch, local, norms) if memory == "recompute" else None,
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


if __name__ == "__main__":
    path, expected = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    share = Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Share()
    assert share.processes == expected, f"{share.processes} processes, not {expected}"
    found = {}
    for memory in ("batched", "keep", "recompute"):
        train(memory, share, found)
    if share.rank == 0:
        save_file(found, path)
    if dist.is_initialized():
        dist.destroy_process_group()
