"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_stderr = Console(stderr=True, highlight=False, emoji=False)


def say(text: str, quiet: bool = False) -> None:
    """One line of talk on stderr, from the main process only, and from none if quiet."""
    if not quiet and os.environ.get("RANK", "0") == "0":
        _stderr.print(text, markup=False, soft_wrap=True)


class Progress:
    """A long piece of work: `with Progress("pretrain", total=300) as p: p.advance(1)`.

    `enabled` is false in quiet runs and on all processes but the main one: then nothing is printed.
    """

    def __init__(self, title: str, total: int, *, enabled: bool = True):
        self.title, self.total, self.enabled = title, total, enabled
        self._done = self._images = self._before = 0
        self._started = self._said = time.monotonic()
        self._note = ""
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.enabled and _stderr.is_terminal:
            columns = (MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = RichProgress(TextColumn("{task.description}"), BarColumn(20), *columns, console=_stderr)
            self._task = self._bar.add_task(self.title, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, images: int = 0) -> None:
        self._images += images
        self.at(self._done + count, self.total)

    def goes_on(self, done: int, saved: str | None) -> None:
        """Begin with so much that is done already. saved: when it was, which is said."""
        if saved and self.enabled:
            say(f"{self.title}: goes on from step {done} of {self.total}, saved at {saved}")
        self._before = done  # no part of this run's pace
        self.advance(done)

    def show(self, metrics: dict[str, float]) -> None:
        """Say where the work stands; without a terminal at most every ten seconds."""
        self._note = " ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "step")
        if self._images:
            self._note += f" {self._images / max(time.monotonic() - self._started, 1e-9):.0f} images/s"
        self.at(self._done, self.total)

    def at(self, done: int, total: int) -> None:
        """Set the absolute place, for work that knows its length only once begun."""
        self._done, self.total = done, total
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done, note=self._note)
        elif self.enabled and (now := time.monotonic()) - self._said > 10:
            self._said, paced = now, max(done - self._before, 1) / (now - self._started)
            left = (total - done) / paced
            ahead = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
            say(" ".join(filter(None, [self.title, f"{done}/{total}", self._note, ahead])))
