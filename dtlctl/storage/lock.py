"""One run folder, one owner: a lock of the kernel's (flock), which ends with its owner however that dies.

What the file says, who and since when, is for people. Over NFS the kernel asks the server.
"""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dtlctl.errors import CheckpointError


@contextmanager
def held(folder: Path) -> Iterator[str | None]:
    """Own the folder, which is made if need be; yields what to say of an owner that died without letting go.

    Raises CheckpointError where another process owns it, or where nothing can be written.
    """
    path = folder / ".lock"
    me = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; choose another place with --out") from None
    try:
        left = _owner(handle)
        with suppress(OSError):  # a full disk is told by whoever has a result to write
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
        yield left and f"{path}: {left} ended without letting go of the folder; taken over"
    finally:
        path.unlink(missing_ok=True)  # while it is still ours
        os.close(handle)


def refuse_links(folder: Path, inside: Iterable[Path]) -> None:
    """A run folder from a stranger may hold links; CheckpointError if one leads out of the run's folder."""
    home = folder.parent.resolve() / folder.name
    for path in (folder, *inside):
        if path.resolve() != home / path.relative_to(folder):
            raise CheckpointError(f"{path}: leads out of the run's folder, to {path.resolve()}; remove the link")


def _take(path: Path) -> int:
    import fcntl  # not on Windows, where `dtlctl.load` works

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(handle) or "another process"
            os.close(handle)
            other = f"{path.parent}: in use by {owner}; wait for it, or choose another name or --out"
            raise CheckpointError(other) from None
        # Its last owner may have removed the file between our two calls: then we hold nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _owner(handle: int) -> str | None:
    """The words for who the file names; None for an empty file."""
    text = os.pread(handle, 1000, 0).decode(errors="replace")
    try:
        who = json.loads(text)
        return f"process {int(who['pid'])} on {ascii(who['host'])[1:-1]} since {ascii(who['since'])[1:-1]}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process" if text else None
