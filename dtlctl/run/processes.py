"""The processes that do a run together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dtlctl import __version__
from dtlctl.console.progress import Progress, say
from dtlctl.model import networks

if TYPE_CHECKING:
    from dtlctl.training.engine import Engine

Item = TypeVar("Item")


class Processes:
    """Work for the main process alone, progress, and the engine, which is started when it is first needed."""

    def __init__(self, folder: Path, precision: networks.Precision, trackers: Sequence[str], quiet: bool):
        self.folder, self.precision, self.trackers, self.quiet = folder, precision, trackers, quiet
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = os.environ.get("RANK", "0") == "0"

    @cached_property
    def engine(self) -> Engine:
        from dtlctl.training.engine import Engine

        engine = Engine(self.precision, self.trackers, self.folder)
        if not self.quiet:
            count = f"{engine.processes} process" + ("es" if engine.processes > 1 else "")
            if (machines := int(os.environ.get("GROUP_WORLD_SIZE", "1"))) > 1:  # as launchers by torchrun tell
                count += f" of {machines} machines"
            say(f"dtlctl {__version__}: {self.folder} on {count}, {engine.device.type}")
        return engine

    def by_main(self, work: Callable[[], Item]) -> Item | None:
        """What the main process alone does, while the others wait. One process needs no engine for it."""
        return work() if self.count == 1 else self.engine.by_main(work)

    def progress(self, title: str, total: int) -> Progress:
        return Progress(title, total, enabled=not self.quiet and self.is_main)

    def say(self, text: str) -> None:
        say(text, self.quiet)
