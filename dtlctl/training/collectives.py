"""What the processes of a run do together: agree, wait for the main one, stop at once, sum and gather."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from dtlctl.console import stop
from dtlctl.data.tensors import Share
from dtlctl.errors import DtlError, Stopped

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)
"""Where processes have different work to do, as when the main one decodes; a dead one is found by its connection."""
TIMEOUT = timedelta(minutes=30)
"""Where all do the same step: a process that is this late hangs."""


class Collectives:
    """Messages between the processes of a run; with one process nothing is sent."""

    def __init__(self, device: torch.device, rank: int, processes: int):
        self.device, self.processes, self.share = device, processes, Share(rank, processes)
        self.is_main = rank == 0
        # Agreements go over CPU memory: asking an accelerator's queue would wait for all that is in it.
        group = torch.distributed.new_group
        self._control: Any = group(backend="gloo", timeout=PATIENCE) if processes > 1 else None

    def agree(self, code: int, *, patient: bool = False) -> int:
        """The largest code of any process. patient: others may be at other work, for days; a signal need not wait."""
        if self.processes == 1:
            return code
        flag, most = torch.tensor([int(code)]), torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(flag, most, group=self._control, async_op=True)
        assert work is not None
        while patient and not work.is_completed():
            time.sleep(0.005)  # between these, Python looks at signals; in `wait` it would not
        work.wait(TIMEOUT)
        return int(flag)

    def by_main(self, work: Callable[[], Item]) -> Item | None:
        """Let the main process do it while the others wait; what ends it ends them all, with the same exit code."""
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except DtlError as error:
                failure = error
        code = self.agree(failure.exit_code if failure else 0, patient=True)
        if code and not failure:
            failure = DtlError("ended because the main process did; its message says why")
            failure.exit_code = code
        if failure:
            raise failure
        return result

    def stoppable(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, to be read to their end; where a signal asked any process to stop, Stopped, in all at once."""
        with stop.deferred():
            source, end = iter(items), object()
            while True:
                item = next(source, end)
                code = self.agree(max(stop.pending(), item is not end))
                if code > 1:
                    raise Stopped(code)
                if not code:
                    return
                if item is not end:
                    yield item  # type: ignore[misc]

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = list(tensors)
        if self.processes == 1:
            return tensors
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values [n, ...], one after the other; their lengths may differ."""
        if self.processes == 1:
            return values
        return torch.cat(self.gather_objects([values.cpu()])).to(values.device)

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """All processes' lists, one after the other, however long the others take."""
        if self.processes == 1:
            return values
        self.agree(0, patient=True)
        parts: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(parts, values, group=self._control)
        return [value for part in parts for value in part]

    def average_(self, tensors: Sequence[Tensor]) -> None:
        if self.processes > 1:
            for own, total in zip(tensors, self.all_reduce(tensors), strict=True):
                own.copy_(total / self.processes)
