"""What a step of gradient collision costs on this machine, beside a step of cross-entropy, in one run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.bench import meter
from dtlctl.bench.steps import WAYS, Bench
from dtlctl.console.progress import Progress
from dtlctl.errors import RecipeError
from dtlctl.model import networks


def run(
    arch: str,
    stem: str,
    image_size: int,
    batch_size: int,
    chunks: str,
    ways: str | None,
    precision: networks.Precision,
    repeats: int,
    channels_last: bool,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """The benchmark as the command line asks for it. Raises RecipeError for a call that is wrong."""
    try:
        if not all(c.strip().isdecimal() for c in chunks.split(",")):
            raise ValueError(f"--chunks {chunks}: write numbers with commas, as in 2,4,8")
        counts = [int(c) for c in chunks.split(",")]
        chosen = ways.split(",") if ways else list(WAYS)
        for c in counts:
            if c < 2 or batch_size % c or batch_size // c < 2:
                raise ValueError(f"--chunks {c}: {batch_size} images make no {c} equal chunks of 2 or more")
        for way in chosen:
            if way not in WAYS:
                raise ValueError(f"--ways {way}: unknown (valid: {', '.join(WAYS)})")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = Bench(arch, stem, image_size, batch_size, precision, device, channels_last)
    except ValueError as error:
        raise RecipeError(f"bench: {error}") from None
    cells = [("ce", 1), *((way, c) for c in counts for way in chosen if bench.can(way, c))]
    math = sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
    with (
        math,
        networks.precision(precision),
        Progress("bench", (repeats + 1) * len(cells), enabled=not quiet) as progress,
    ):
        return measure(bench, cells, repeats, progress)


def measure(bench: Bench, cells: Sequence[tuple[str, int]], repeats: int, progress: Progress) -> dict[str, Any]:
    """Every (way, chunks) in turn, after a warm-up: seconds, their ratio to cross-entropy, peak memory, and error.

    Seconds are medians. The error is |g - r| / |r|, to the gradient r in float64, beside the cosine of the two.
    Peak memory is what a step adds, in bytes, above what is held before it; None where the system does not tell.
    """
    steps = {cell: bench.step(*cell) for cell in cells}
    seconds: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    peaks: dict[tuple[str, int], int | None] = {}
    errors: dict[tuple[str, int], tuple[float, float]] = {}
    references: tuple[int, list[Tensor]] = (0, [])
    for turn in range(repeats + 1):
        for cell in cells:
            way, c = cell
            bench.model.zero_grad()
            if turn:
                seconds[cell].append(meter.timed(steps[cell], bench.device))
            else:  # the first turn warms up, and measures what need not be repeated
                peaks[cell] = meter.peak(steps[cell], bench.device)
                if way.startswith("gc"):
                    held = [p.grad for p in bench.parameters]
                    if references[0] != c:
                        bench.model.zero_grad()
                        references = c, bench.reference(c)
                    for parameter, grad in zip(bench.parameters, held, strict=True):
                        parameter.grad = grad
                    errors[cell] = bench.error(references[1])
            progress.advance(1)
            progress.show({f"{way} c={c}": seconds[cell][-1] if turn else 0.0})
    base = median(seconds["ce", 1])
    rows = [
        {
            "way": way,
            "chunks": c,
            "seconds": median(seconds[way, c]),
            "ratio": median(seconds[way, c]) / base,
            "peak_bytes": peaks[way, c],
            **dict(zip(("error", "cosine"), errors.get((way, c), (None, None)), strict=True)),
        }
        for way, c in cells
    ]
    return {"machine": {**meter.machine(bench.device), **_settings(bench)}, "repeats": repeats, "rows": rows}


def text(document: dict[str, Any]) -> str:
    """The rows as lines of text."""
    lines = [f"{key} {document['machine'][key]}" for key in ("device", "threads", "precision", "batch_size")]
    lines = [", ".join(lines), f"{'way':24}{'c':>3}{'seconds':>10}{'x CE':>8}{'peak MiB':>10}{'error':>9}{'cosine':>9}"]
    for row in document["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.5f}"
        lines.append(
            f"{row['way']:24}{row['chunks']:3}{row['seconds']:10.3f}{row['ratio']:8.2f}{peak:>10}{error:>9}{cosine:>9}"
        )
    return "\n".join(lines)


def _settings(bench: Bench) -> dict[str, Any]:
    return {
        "precision": bench.precision,
        "channels_last": bench.x.is_contiguous(memory_format=torch.channels_last),
        "batch_size": len(bench.y),
        "image_size": bench.x.shape[-1],
        "parameters": sum(p.numel() for p in bench.parameters),
    }
