"""The command line with one fault in it: `driver.py "WHERE:N=WHAT[@RANK]" ARGUMENTS...`.

WHERE is a kind of place that the program passes, N the pass (from 1) at which WHAT happens:

step      between two steps of training            kill    kill -9
start     before training starts                   none    nothing
eval      before a batch of an evaluation          term    SIGTERM
decode    before images are decoded                int     SIGINT
save      a write boundary while state is saved    raise   an exception that nobody foresaw
publish   a write boundary while a result is       full    the disk is full (write boundaries only)
          published
rename    as publish, but just after the call

A write boundary is: half of a file written, and every fsync, rename and removal, just before it. The product knows
nothing of this: everything is patched from here.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any


class Fault:
    """What happens where; counts the passes."""

    def __init__(self, text: str):
        where, _, what = text.partition("=")
        self.where, _, number = where.partition(":")
        self.what, _, rank = what.partition("@")
        self.number, self.mine = int(number or 1), (rank or "0") == os.environ.get("RANK", "0")
        self.passed: Counter[str] = Counter()
        self.inside = ""  # "save" or "publish"

    def here(self, where: str) -> None:
        self.passed[where] += 1
        if not self.mine or (where, self.passed[where]) != (self.where, self.number):
            return
        if "RANK" in os.environ:
            print("FAULT", file=sys.stderr, flush=True)
        if self.what == "raise":
            raise ValueError("an exception that nobody foresaw")
        if self.what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}[self.what])

    def boundary(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                self.here(self.inside)
            result = call(*arguments, **options)
            if self.inside == "publish":
                self.here("rename")
            return result

        return wrapped

    def within(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            before, self.inside = self.inside, self.inside or name
            try:
                return call(*arguments, **options)
            finally:
                self.inside = before

        return wrapped

    def open(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = builtins.open(path, mode, *arguments, **options)  # noqa: SIM115
        if self.inside and "x" in mode:
            return _HalfFile(file, self)
        return file


class _HalfFile:
    """Writes the first half, passes a boundary, writes the rest."""

    def __init__(self, file: Any, fault: Fault):
        self.file, self.fault = file, fault

    def write(self, blob: bytes) -> None:
        self.file.write(blob[: len(blob) // 2])
        self.file.flush()
        self.fault.here(self.fault.inside)
        self.file.write(blob[len(blob) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _HalfFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def sabotage(text: str) -> Fault:
    """Put the fault into this process."""
    from dtlctl.data import cache
    from dtlctl.run import trainer
    from dtlctl.storage import checkpoint
    from dtlctl.training import engine, resume

    fault = Fault(text)
    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, fault.boundary(getattr(os, name)))
    vars(checkpoint)["open"] = fault.open
    resume.StateFile._write = fault.within("save", resume.StateFile._write)
    for name in ("publish", "publish_json"):
        setattr(checkpoint, name, fault.within("publish", getattr(checkpoint, name)))
    heed, decode, batches = engine.Engine._heed, cache._decode, trainer.evaluation_batches
    restore = resume.StateFile.restore

    def step(*arguments: Any) -> None:
        fault.here("step")
        heed(*arguments)

    def restoring(*arguments: Any) -> str | None:
        fault.here("start")
        return restore(*arguments)

    def decoding(*arguments: Any) -> None:
        fault.here("decode")
        decode(*arguments)

    def evaluation(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*arguments, **options):
            fault.here("eval")
            yield batch

    engine.Engine._heed, resume.StateFile.restore = step, restoring
    cache._decode = decoding
    trainer.evaluation_batches = evaluation
    return fault


if __name__ == "__main__":
    from dtlctl.cli.app import main

    sabotage(sys.argv.pop(1))
    main()
