"""How the student looks at a batch in chunks: all in one pass, one after the other, or one again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.console import machine
from dtlctl.data.tensors import Batch, Share
from dtlctl.model.networks import Classifier, watched
from dtlctl.objectives.batched import Tape, batchable, record
from dtlctl.objectives.step import View

Memory = Literal["batched", "keep", "recompute"]
Momenta = Sequence[tuple[nn.BatchNorm2d, float]]
"""Every batch normalisation with the momentum it was built with."""


class Look(NamedTuple):
    """What one step of a disposal sees of a batch."""

    chunks: list[View]
    tape: Tape | None
    """Of the one pass, if it was one."""
    again: Callable[[int], View] | None
    """Makes the view of one chunk anew, where graphs are not to be held."""


def look(student: Classifier, batch: Batch, chunks: int, norms: Momenta, memory: Memory) -> Look:
    """The chunks of a batch, in the way that `memory` says."""
    if memory == "batched":
        return Look(*together(student, batch, chunks), None)
    remade = again(student, batch, chunks, norms) if memory == "recompute" else None
    return Look(apart(student, batch, chunks, norms), None, remade)


def momenta(student: nn.Module) -> Momenta:
    return [(m, m.momentum) for m in student.modules() if isinstance(m, nn.BatchNorm2d) and m.momentum is not None]


def together(student: Classifier, batch: Batch, chunks: int) -> tuple[list[View], Tape]:
    """The views of all chunks from one pass, and its tape for `collide_batched`."""
    with record(student, chunks) as tape:
        whole = _view(student, batch)
    parts = zip(*(t.chunk(chunks) for t in (whole.x, whole.y, whole.rows, whole.source, whole.target)), strict=True)
    return [View(*part) for part in parts], tape  # without maps: nothing that comes this way looks at them


def apart(student: Classifier, batch: Batch, chunks: int, norms: Momenta) -> list[View]:
    """The views of the chunks one by one, so that batch statistics are each chunk's own, in any network.

    The running statistics move as the average of the chunks would move them. With momentum
    a_k = (m/c) / (1 - (c-k) m/c) for chunk k of c, each chunk weighs m/c in the end; averaged over processes after
    the step, it does not matter how many processes share the chunks.
    """
    views = []
    for number in range(chunks):
        for norm, momentum in norms:
            norm.momentum = (momentum / chunks) / (1 - (chunks - 1 - number) * momentum / chunks)
        views.append(_view(student, _chunk(batch, number, chunks)))
    _restore(norms)
    return views


def again(student: Classifier, batch: Batch, chunks: int, norms: Momenta) -> Callable[[int], View]:
    """A function that sees one chunk anew, each time with the same dropout, and moves no running statistics."""
    seed, device = int(torch.randint(2**62, ())), batch.x.device

    def one(number: int) -> View:
        for norm, _ in norms:
            norm.momentum = 0.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + number)
            view = _view(student, _chunk(batch, number, chunks))
        _restore(norms)
        return view

    return one


def choose(student: Classifier, x: Tensor, chunks: int) -> Memory:
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


def _view(student: Classifier, batch: Batch) -> View:
    with sdpa_kernel(SDPBackend.MATH), watched(student.backbone) as maps:  # fused attention has no second derivative
        features = student.embed(batch.x)
    source, target = (student.heads[name](features) for name in ("source", "target"))
    return View(batch.x, batch.y, batch.rows, source, target, maps)


def _chunk(batch: Batch, number: int, chunks: int) -> Batch:
    share = Share(number, chunks)
    return Batch(share.of(batch.x), share.of(batch.y), share.of(batch.rows))


def _saved_bytes(student: Classifier, x: Tensor) -> int:
    """What a forward pass keeps for its backward pass, weights aside."""
    sizes = {p.data_ptr(): 0 for p in student.parameters()}

    def note(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.data_ptr(), tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        for norm, _ in (norms := momenta(student)):
            norm.momentum = 0.0
        features = student.embed(x)  # held meanwhile: freed memory would be used, and counted, again
    _restore(norms)
    del features
    return sum(sizes.values())


def _restore(norms: Momenta) -> None:
    for norm, momentum in norms:
        norm.momentum = momentum


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine.memory()
