"""What a step of gradient collision costs on this machine, beside a step of cross-entropy, in one run."""

import copy
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.bench import meter
from dtlctl.console import devices
from dtlctl.data.tensors import Batch
from dtlctl.errors import refused
from dtlctl.model import networks
from dtlctl.objectives import batched, collision
from dtlctl.objectives.step import together

WAYS = ("ce-chunked", "gc-batched", "gc-keep", "gc-recompute", "gc-pairwise")
"""Beside "ce", one step of cross-entropy on the whole batch."""
PAIRWISE_MOST = 4
"""Chunks up to which the double loop over pairs is run: its cost grows with their square."""


class Bench:
    """A network and one batch of noise, and a step in any of the ways."""

    def __init__(self, setup: meter.Setup, device: torch.device):
        self.model = setup.network(source=100, target=10)
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        self.model.to(device).to(memory_format=layout)
        self.x = torch.rand(setup.batch_size, 3, setup.image_size, setup.image_size).to(device, memory_format=layout)
        self.y = torch.randint(100, (setup.batch_size,)).to(device)
        self.parameters = list(self.model.parameters())

    def step(self, way: str, chunks: int) -> None:
        """Leave the gradient of one way in `.grad`."""
        pairs = list(zip(self.x.chunk(chunks), self.y.chunk(chunks), strict=True))
        if way.startswith("ce"):
            for pair in pairs:
                self._loss(pair).backward()
        elif way == "gc-batched":
            seen, tape = together(self.model, Batch(self.x, self.y, torch.arange(len(self.y))), chunks)
            losses = [F.cross_entropy(chunk.source, chunk.y) for chunk in seen]
            batched.collide_batched(losses, self.parameters, tape).surrogate.backward()
        elif way == "gc-pairwise":
            grads = [collision.gradient(self._loss(pair), self.parameters) for pair in pairs]
            torch.stack([collision.dot(g, h) for g, h in combinations(grads, 2)]).mean().backward()
        else:
            again = way == "gc-recompute"
            collision.collide(self._loss, self.parameters, pairs, recompute=again).surrogate.backward()

    def reference(self, chunks: int) -> tuple[Tensor, ...]:
        """The gradient in float64."""
        x = devices.exact(self.x)
        exact = copy.deepcopy(self.model).to(x.device).double()
        exact.precision, parameters = "float64", list(exact.parameters())
        pairs = list(zip(x.chunk(chunks), self.y.to(x.device).chunk(chunks), strict=True))
        found = collision.collide(lambda pair: F.cross_entropy(exact(pair[0], "source"), pair[1]), parameters, pairs)
        return torch.autograd.grad(found.surrogate, parameters, materialize_grads=True)

    def error(self, reference: Sequence[Tensor]) -> tuple[float, float]:
        """|g - r| / |r| of the gradient that is there, and its cosine to the reference, over all parameters at once."""
        both = zip(self.parameters, reference, strict=True)
        grads = [torch.zeros_like(r) if p.grad is None else devices.exact(p.grad) for p, r in both]
        ours = torch.cat([g.flatten() for g in grads])
        theirs = torch.cat([r.flatten() for r in reference])
        return float((ours - theirs).norm() / theirs.norm()), float(F.cosine_similarity(ours, theirs, dim=0))

    def _loss(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(pair[0], "source"), pair[1])


def run(setup: meter.Setup, chunks: str, ways: str | None) -> dict[str, Any]:
    """Of every way medians of seconds, and their ratio to cross-entropy's. Raises RecipeError for a call that is wrong.

    Peak memory is what a step adds, in bytes; None where the system does not tell. The error is |g - r| / |r|, to the
    gradient r in float64, beside the cosine of the two.
    """
    with refused("bench"):
        if not all(c.strip().isdecimal() for c in chunks.split(",")):
            raise ValueError(f"--chunks {chunks}: write numbers with commas, as in 2,4,8")
        counts = [int(c) for c in chunks.split(",")]
        chosen = ways.split(",") if ways else list(WAYS)
        for c in counts:
            if c < 2 or setup.batch_size % c or setup.batch_size // c < 2:
                raise ValueError(f"--chunks {c}: {setup.batch_size} images make no {c} equal chunks of 2 or more")
        for way in chosen:
            if way not in WAYS:
                raise ValueError(f"--ways {way}: unknown (valid: {', '.join(WAYS)})")
        device = torch.device(devices.kind())
        bench = Bench(setup, device)
        if lacking := networks.no_second_derivative(setup.arch, setup.stem, None, setup.image_size):
            raise ValueError(f"torch cannot differentiate {lacking} twice, which {setup.arch} has; see --train")
    cannot = {("gc-pairwise", c) for c in counts if c > PAIRWISE_MOST}
    cannot |= set() if batched.batchable(bench.model) else {("gc-batched", c) for c in counts}
    cells = [("ce", 1), *((way, c) for c in counts for way in chosen if (way, c) not in cannot)]
    peaks: dict[meter.Way, int | None] = {}
    errors: dict[meter.Way, tuple[float | None, float | None]] = {}
    reference = lru_cache(1)(bench.reference)

    def turn(way: str, c: int, number: int) -> float:
        bench.model.zero_grad()
        if number:
            started = devices.clock(device)
            bench.step(way, c)
            return devices.clock(device) - started
        peaks[way, c] = meter.peak(partial(bench.step, way, c), device)  # need not be repeated
        errors[way, c] = bench.error(reference(c)) if way.startswith("gc") else (None, None)
        return 0.0

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        turns = setup.seconds({cell: partial(turn, *cell) for cell in cells})
    seconds = {cell: median(took) for cell, took in turns.items()}
    rows = [
        {"way": way, "chunks": c, "seconds": seconds[way, c], "ratio": seconds[way, c] / seconds["ce", 1],
         "peak_bytes": peaks[way, c], "error": errors[way, c][0], "cosine": errors[way, c][1]}
        for way, c in cells
    ]  # fmt: skip
    return setup.document(device, rows, parameters=sum(p.numel() for p in bench.parameters))


def text(document: dict[str, Any]) -> str:
    """The rows as lines of text."""
    told = ", ".join(f"{key} {document['machine'][key]}" for key in ("device", "threads", "precision", "batch_size"))
    lines = [told, f"{'way':24}{'c':>3}{'seconds':>10}{'x CE':>8}{'peak MiB':>10}{'error':>9}{'cosine':>9}"]
    for row in document["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.5f}"
        numbers = f"{row['chunks']:3}{row['seconds']:10.3f}{row['ratio']:8.2f}"
        lines.append(f"{row['way']:24}{numbers}{peak:>10}{error:>9}{cosine:>9}")
    return "\n".join(lines)
