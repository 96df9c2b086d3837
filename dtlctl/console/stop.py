"""Stop signals: noted at once, obeyed where the work can be put down.

Outside of `deferred` a signal raises Stopped on the spot. Inside, whoever deferred it looks at `pending`. A second one
changes nothing: launchers often pass on a Ctrl-C that the terminal has sent to every process already.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from dtlctl.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Now:
    noted = 0  # the signal that came, or 0
    depth = 0  # how many `deferred` there are around us


def listen() -> None:
    """Take SIGINT and SIGTERM from here on."""
    _Now.noted = _Now.depth = 0
    for signum in SIGNALS:
        signal.signal(signum, _note)


def finish() -> None:
    """From here on a signal changes nothing: the process is on its way out."""
    _Now.depth += 1


def pending() -> int:
    """The number of the signal that came, or 0."""
    return _Now.noted


def obey() -> None:
    """Raise Stopped if a signal came. For where a library may have caught the one that was raised on the spot."""
    if _Now.noted:
        raise Stopped(_Now.noted)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, signals are noted only; one that nobody obeyed raises Stopped at the end."""
    _Now.depth += 1
    try:
        yield
    finally:
        _Now.depth -= 1
    if not _Now.depth:
        obey()


def _note(signum: int, frame: object) -> None:
    if not _Now.noted:
        _Now.noted = signum
        if not _Now.depth:
            raise Stopped(signum)
