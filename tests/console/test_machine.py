"""What a process may use of its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtlctl.console import machine

WHOLE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, WHOLE),
        ({"memory.max": "max"}, WHOLE),
        ({"memory.max": "4000000"}, 4_000_000),
        ({"memory.max": "4000000", "a/b/memory.max": "max", "a/memory.max": "3000000"}, 3_000_000),
        ({"memory/a/b/memory.limit_in_bytes": "2000000"}, 2_000_000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, WHOLE),  # version 1 says "none" like this
        ({"memory.max": "rubbish"}, WHOLE),
    ],
)
def test_the_smallest_limit_above_a_process_is_its_memory(tmp_path: Path, monkeypatch, files: dict, expected: int):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    own = tmp_path / "own"
    own.write_text("4:memory:/a/b\n0::/a/b\n")
    assert machine.memory(tmp_path, own) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.memory(tmp_path, own) == expected // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert machine.memory(tmp_path, tmp_path / "none") <= WHOLE


@pytest.mark.parametrize(
    ("load", "said"),
    [(9.0, "the machine is busy (load 9.0 on 2 cores): a run takes less when it is idle"), (0.5, None)],
)
def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch, load: float, said: str | None):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.busy() == said


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_of_the_affinity():
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{first}]); from dtlctl.console.machine import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
