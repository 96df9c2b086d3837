"""What both benchmarks share: what is measured, in turns, the bytes of a step, and the machine."""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtlctl.console import devices
from dtlctl.console.progress import Progress
from dtlctl.model import networks

Way = tuple[str, int | None]
"""A name, and the number of chunks, or of workers of a plain script."""


class Setup(NamedTuple):
    """The network and its batches, as the options of `dtlctl bench` have them."""

    arch: str
    stem: str
    image_size: int
    batch_size: int
    precision: networks.Precision
    channels_last: bool
    repeats: int
    quiet: bool

    def network(self, **heads: int) -> networks.Classifier:
        """The same weights every time. Raises ValueError for a network that cannot be made."""
        torch.manual_seed(0)
        model = networks.build(self.arch, heads, stem=self.stem, image_size=self.image_size)
        model.precision = self.precision
        return model

    def seconds(self, turns: dict[Way, Callable[[int], float]]) -> dict[Way, list[float]]:
        """Of every way, one number a turn; the ways take turns. Turn 0 warms up, and is not in the result."""
        seconds: dict[Way, list[float]] = {way: [] for way in turns}
        progress = Progress("bench", (self.repeats + 1) * len(turns), enabled=not self.quiet)
        with networks.precision(self.precision), progress:
            for number in range(self.repeats + 1):
                for way, turn in turns.items():
                    seconds[way].append(turn(number))
                    progress.advance(1)
                    progress.show({f"{way[0]} s": seconds[way][-1]})
        return {way: took[1:] for way, took in seconds.items()}

    def document(self, device: torch.device, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The rows, beside what a time depends on whatever is timed: the device, its instructions, threads, torch."""
        machine = {
            "device": devices.name(device),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **{key: value for key, value in self._asdict().items() if key not in ("repeats", "quiet")},
        }
        return {"machine": machine | more, "repeats": self.repeats, "rows": rows}


def peak(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a step needs at most, beyond what is held already."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc keeps what was freed, and a step would seem to need nothing
        ctypes.CDLL(None).malloc_trim(0)
    if devices.peak(device) is not None:
        there: Any = torch.get_device_module(device)
        there.reset_peak_memory_stats(device)
        before = there.memory_allocated(device)
        step()
        return there.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    try:  # Linux forgets the highest resident size when told so
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        step()
        return None

    def held(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    before = held("VmRSS")
    step()
    return 1024 * max(0, held("VmHWM") - before)
