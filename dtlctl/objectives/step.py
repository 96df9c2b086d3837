"""One step as an objective sees it, and the student's forward passes over its chunks that make it."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.console import devices, machine
from dtlctl.data.tensors import Batch, Share
from dtlctl.model.batchnorm import BatchNorm
from dtlctl.model.networks import Classifier, watched
from dtlctl.objectives.batched import Tape, batchable, collide_batched, record
from dtlctl.objectives.collision import Collision, collide

GraphMode = Literal["batched", "keep", "recompute"]
"""All chunks in one pass; one by one with their graphs kept; or one graph at a time, built when it is needed."""


@dataclass(frozen=True)
class ChunkOutputs:
    """Images, as in a `Batch`, and what the student makes of them, with its graph.

    source, target: logits [B, classes] through either head; maps: the outputs [B, ...] of the backbone's stages, first
    stage first; empty where they are not asked for, or not known.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    source: Tensor
    target: Tensor
    maps: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Step:
    """This process's share of a global step.

    Every objective returns a scalar whose gradient, averaged over processes, is the objective's gradient.
    """

    chunks: Sequence[ChunkOutputs]
    """The source batch in equal chunks."""
    target: Sequence[ChunkOutputs]
    """A batch of the target in as many chunks, for the retaining losses whose `needs_target` is true; else empty."""
    teacher: Callable[[Tensor], Tensor]
    """x [B, 3, H, W] -> logits [B, target classes] of the frozen TL model, without a graph."""
    parameters: Sequence[Tensor]
    """All weights of the student."""
    images: int
    """Rows of the source dataset, chosen or not."""
    seed: int
    processes: int
    all_reduce: Callable[[Sequence[Tensor]], list[Tensor]]
    student: nn.Module | None = None
    """For a loss that takes the network on from where it is: called with (x, "source"), it gives logits."""
    tape: Tape | None = None
    """Where `chunks` came out of one pass: its record."""
    again: Callable[[int], ChunkOutputs] | None = None
    """Where graphs are not to be held: computes one chunk anew."""
    number: int = 0
    """Of this step in its training."""

    def gradient(self, scalar: Tensor) -> list[Tensor]:
        """The global gradient of what is a mean over this process's share, whose graph is kept."""
        grads = torch.autograd.grad(scalar, self.parameters, retain_graph=True, materialize_grads=True)
        return [grad / self.processes for grad in self.all_reduce(grads)]

    def collide(self, loss: Callable[[ChunkOutputs], Tensor], *, self_pairs: bool = False) -> Collision:
        options: Any = {"self_pairs": self_pairs, "processes": self.processes, "all_reduce": self.all_reduce}
        if self.tape is not None:
            return collide_batched([loss(chunk) for chunk in self.chunks], self.parameters, self.tape, **options)
        if (again := self.again) is not None:
            numbers = range(len(self.chunks))
            return collide(lambda m: loss(again(m)), self.parameters, numbers, recompute=True, **options)
        return collide(loss, self.parameters, self.chunks, **options)


Outputs = tuple[list[ChunkOutputs], Tape | None, Callable[[int], ChunkOutputs] | None]
"""`chunks`, `tape` and `again` of a `Step`."""


def outputs(student: Classifier, batch: Batch, chunks: int, mode: GraphMode, *, maps: bool = False) -> Outputs:
    """What the student makes of a batch in equal chunks. maps: with those of its stages, but for "batched"."""
    if mode == "batched":
        return *together(student, batch, chunks), None
    again = recomputing(student, batch, chunks) if mode == "recompute" else None
    return apart(student, batch, chunks, maps=maps), None, again


def together(student: Classifier, batch: Batch, chunks: int) -> tuple[list[ChunkOutputs], Tape]:
    with record(student, chunks) as tape:
        whole = _outputs(student, batch)
    parts = zip(*(t.chunk(chunks) for t in (whole.x, whole.y, whole.rows, whole.source, whole.target)), strict=True)
    return [ChunkOutputs(*part) for part in parts], tape


def apart(student: Classifier, batch: Batch, chunks: int, *, maps: bool = False) -> list[ChunkOutputs]:
    """The chunks one by one, so that batch statistics are each chunk's own, in any network."""
    return [_one(student, batch, number, chunks, maps=maps) for number in range(chunks)]


def recomputing(student: Classifier, batch: Batch, chunks: int) -> Callable[[int], ChunkOutputs]:
    """A function that computes one chunk anew, each time with the same dropout, and moves no running statistics."""
    seed, device = int(torch.randint(2**62, ())), batch.x.device

    def one(number: int) -> ChunkOutputs:
        with devices.forked(device):
            torch.manual_seed(seed + number)
            return _one(student, batch, number, chunks, moves=False)

    return one


def choose(student: Classifier, x: Tensor, chunks: int) -> GraphMode:
    """The fastest way whose graphs for this share x of a batch fit into half of the memory of this device.

    A second-order graph holds about three times what a forward pass saves; kept chunk by chunk, a gradient a chunk too.
    The device's whole memory counts, not what is free now, so that a run that is taken up again takes the same way.
    """
    saved = chunks * _saved_bytes(student, x[: len(x) // chunks])
    weights = sum(p.nbytes for p in student.parameters())
    known = devices.memory(x.device)
    room = (known[1] if known else machine.memory()) / 2
    if batchable(student):
        return "batched" if 3 * saved + 4 * weights < room else "recompute"
    return "keep" if 3 * saved + (2 * chunks + 4) * weights < room else "recompute"


def _outputs(student: Classifier, batch: Batch, maps: bool = False) -> ChunkOutputs:
    watching: AbstractContextManager[list[Tensor]] = watched(student.backbone) if maps else nullcontext([])
    with sdpa_kernel(SDPBackend.MATH), watching as seen:  # fused attention has no second derivative
        features = student.embed(batch.x)
    source, target = (student.heads[name](features) for name in ("source", "target"))
    return ChunkOutputs(batch.x, batch.y, batch.rows, source, target, seen)


def _one(
    student: Classifier, batch: Batch, number: int, chunks: int, *, maps: bool = False, moves: bool = True
) -> ChunkOutputs:
    """One chunk by itself; moves: the running statistics, as the average of all chunks would move them.

    With momentum a_k = (m/c) / (1 - (c-k) m/c) for chunk k of c, each chunk weighs m/c in the end; averaged over
    processes after the step, it does not matter how many processes share the chunks.
    """
    share = Share(number, chunks)
    norms = [(m, m.momentum) for m in student.modules() if isinstance(m, BatchNorm) and m.momentum is not None]
    try:
        for norm, m in norms:
            norm.momentum = (m / chunks) / (1 - (chunks - 1 - number) * m / chunks) if moves else 0.0
        return _outputs(student, Batch(share.of(batch.x), share.of(batch.y), share.of(batch.rows)), maps)
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


def _saved_bytes(student: Classifier, x: Tensor) -> int:
    """What a forward pass keeps for its backward pass, weights aside."""
    student = copy.deepcopy(student)  # its batch norms move
    sizes = {p.data_ptr(): 0 for p in student.parameters()}

    def note(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.data_ptr(), tensor.nbytes)
        return tensor

    watching = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with devices.forked(x.device), watching, sdpa_kernel(SDPBackend.MATH):
        features = student.embed(x)  # held meanwhile: freed memory would be used, and counted, again
    del features
    return sum(sizes.values())
