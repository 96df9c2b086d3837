"""The student's forward passes over a batch in chunks: all in one, one after the other, or one at a time again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from dtlctl.console import machine
from dtlctl.data.tensors import Batch, Share
from dtlctl.model.networks import Classifier, precision, watched
from dtlctl.objectives.batched import Tape, batchable, record
from dtlctl.objectives.step import ChunkOutputs, Step

GraphMode = Literal["batched", "keep", "recompute"]
"""All chunks in one pass; one by one with their graphs kept; or one graph at a time, built when it is needed."""
Outputs = tuple[list[ChunkOutputs], Tape | None, Callable[[int], ChunkOutputs] | None]
"""`chunks`, `tape` and `again` of a `Step`."""


def outputs(student: Classifier, batch: Batch, chunks: int, mode: GraphMode, *, maps: bool = False) -> Outputs:
    """What the student makes of a batch in equal chunks. maps: with the outputs of its stages, but for "batched"."""
    if mode == "batched":
        return *together(student, batch, chunks), None
    again = recomputing(student, batch, chunks) if mode == "recompute" else None
    return apart(student, batch, chunks, maps=maps), None, again


def together(student: Classifier, batch: Batch, chunks: int) -> tuple[list[ChunkOutputs], Tape]:
    """All chunks from one pass, and its tape for `collide_batched`."""
    with record(student, chunks) as tape:
        whole = _outputs(student, batch)
    parts = zip(*(t.chunk(chunks) for t in (whole.x, whole.y, whole.rows, whole.source, whole.target)), strict=True)
    return [ChunkOutputs(*part) for part in parts], tape


def apart(student: Classifier, batch: Batch, chunks: int, *, maps: bool = False) -> list[ChunkOutputs]:
    """The chunks one by one, so that batch statistics are each chunk's own, in any network.

    The running statistics move as the average of the chunks would move them. With momentum
    a_k = (m/c) / (1 - (c-k) m/c) for chunk k of c, each chunk weighs m/c in the end; averaged over processes after
    the step, it does not matter how many processes share the chunks.
    """
    found = []
    with _momenta(student) as norms:
        for number in range(chunks):
            for norm, momentum in norms:
                norm.momentum = (momentum / chunks) / (1 - (chunks - 1 - number) * momentum / chunks)
            found.append(_outputs(student, _chunk(batch, number, chunks), maps))
    return found


def recomputing(student: Classifier, batch: Batch, chunks: int) -> Callable[[int], ChunkOutputs]:
    """A function that computes one chunk anew, each time with the same dropout, and moves no running statistics."""
    seed, device = int(torch.randint(2**62, ())), batch.x.device

    def one(number: int) -> ChunkOutputs:
        with _momenta(student, 0.0), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + number)
            return _outputs(student, _chunk(batch, number, chunks))

    return one


def choose(student: Classifier, x: Tensor, chunks: int) -> GraphMode:
    """The fastest way whose graphs fit into half of the memory of this device.

    x: this process's share of a batch. A second-order graph holds about three times what a forward pass saves; kept
    chunk by chunk it holds a gradient a chunk too. The device's whole memory counts, not what is free of it now, so
    that a run that is taken up again takes the same way.
    """
    saved = chunks * _saved_bytes(student, x[: len(x) // chunks])
    weights = sum(p.nbytes for p in student.parameters())
    room = _memory_bytes(x.device) / 2
    if batchable(student):
        return "batched" if 3 * saved + 4 * weights < room else "recompute"
    return "keep" if 3 * saved + (2 * chunks + 4) * weights < room else "recompute"


def cosine_to_float64(
    student: Classifier,
    batch: Batch,
    chunks: int,
    mode: GraphMode,
    loss: Callable[[Step], tuple[Tensor, Tensor]],
    make: Callable[..., Step],
) -> float:
    """Cosine of a loss's gradient on a batch, in the student's precision, to the same in float64.

    loss: of an unlearning kind. make: a `Step` of `chunks`, `tape`, `again` and `parameters`. The gradients are those
    of the global batch, over all parameters at once, without dropout. The student is left as it is.
    """
    gradients = []
    for exact in (False, True):
        model = copy.deepcopy(student)
        if exact:
            model.double().precision = "float64"
            batch, mode = replace(batch, x=batch.x.double()), "recompute"
        for module in model.modules():
            if isinstance(module, _DropoutNd | StochasticDepth):
                module.eval()
        parameters = list(model.parameters())
        with precision(model.precision):
            seen, tape, again = outputs(model, batch, chunks, mode)
            step = make(chunks=seen, tape=tape, again=again, parameters=parameters)
            grads = torch.autograd.grad(loss(step)[0], parameters, materialize_grads=True)
            gradients.append(torch.cat([g.double().flatten() for g in step.all_reduce(grads)]))
    ours, theirs = gradients
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))


def _outputs(student: Classifier, batch: Batch, maps: bool = False) -> ChunkOutputs:
    watching: AbstractContextManager[list[Tensor]] = watched(student.backbone) if maps else nullcontext([])
    with sdpa_kernel(SDPBackend.MATH), watching as seen:  # fused attention has no second derivative
        features = student.embed(batch.x)
    source, target = (student.heads[name](features) for name in ("source", "target"))
    return ChunkOutputs(batch.x, batch.y, batch.rows, source, target, seen)


def _chunk(batch: Batch, number: int, chunks: int) -> Batch:
    share = Share(number, chunks)
    return Batch(share.of(batch.x), share.of(batch.y), share.of(batch.rows))


def _saved_bytes(student: Classifier, x: Tensor) -> int:
    """What a forward pass keeps for its backward pass, weights aside."""
    student = copy.deepcopy(student)  # its batch norms move
    sizes = {p.data_ptr(): 0 for p in student.parameters()}

    def note(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.data_ptr(), tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        features = student.embed(x)  # held meanwhile: freed memory would be used, and counted, again
    del features
    return sum(sizes.values())


@contextmanager
def _momenta(student: nn.Module, within: float | None = None) -> Iterator[list[tuple[nn.BatchNorm2d, float]]]:
    """The batch norms with their momenta, which are `within` and may be changed within, and are restored afterwards."""
    norms = [(m, m.momentum) for m in student.modules() if isinstance(m, nn.BatchNorm2d) and m.momentum is not None]
    try:
        for norm, momentum in norms:
            norm.momentum = momentum if within is None else within
        yield norms
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine.memory()
