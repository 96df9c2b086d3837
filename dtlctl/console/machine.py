"""What this process may use of its machine: less than there is, where it is shared or has a quota."""

import os
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota, rounded up; at least 1."""
    from joblib import cpu_count

    return cpu_count()


def busy() -> str | None:
    """What to say of a machine that has more to do than cores to do it with: times measured there are too long."""
    load, *_ = os.getloadavg()
    if load <= cores():
        return None
    return f"the machine is busy (load {load:.1f} on {cores()} cores): a run takes less when it is idle"


def memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process may use: its share, on this node, of the machine's or of its container's limit.

    root: where control groups are mounted; own: which of them this process is in, and so in those above.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    groups = {Path()}  # inside a container the mount itself is the process's own
    with suppress(OSError):
        for line in own.read_text().splitlines():
            path = Path(line.split(":", 2)[2].lstrip("/"))
            groups |= {path, *path.parents}
    for path in groups:
        for place in (root / path / "memory.max", root / "memory" / path / "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int(place.read_text()))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
