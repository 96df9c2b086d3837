"""Work in a forked child: as good as a fresh process, and seconds quicker."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

from tests.reliability.driver import sabotage

HANG = 120  # seconds
STAGES = ("audit", "dispose", "finetune", "piggyback", "pretrain", "preview")
NEEDED = ["torch", "torchvision", "accelerate", "datasets", "dtlctl.cli.app", "dtlctl.report.files"]
NEEDED += [f"dtlctl.stages.{stage}" for stage in STAGES]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(NEEDED)


class Outcome(NamedTuple):
    code: int  # of the exit, or minus the signal that killed it
    out: str
    err: str
    hung: bool
    seconds: float


def command(*arguments: object, fault: str = "") -> None:
    """`dtlctl ARGUMENTS`, with a fault in it if one is given (see driver.py)."""
    from dtlctl.cli.app import main

    if fault:
        sabotage(fault)
    sys.argv = ["dtlctl", *map(str, arguments)]
    main()


def call(*arguments: object, folder: Path, fault: str = "") -> Outcome:
    """`dtlctl ARGUMENTS` in the folder, in a child of this process."""
    paths = [folder / ".stdout", folder / ".stderr"]
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be(partial(command, *arguments, fault=fault), folder, paths)
    hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > HANG:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    out, err = (path.read_text(errors="replace") for path in paths)
    return Outcome(os.waitstatus_to_exitcode(status), out, err, hung, time.monotonic() - started)


def together(
    work: Callable[[], None], folder: Path, processes: int = 1, machines: int = 1, patience: int = HANG
) -> subprocess.CompletedProcess[str]:
    """The work in the folder, in processes that are told of each other what torchrun tells.

    They are children of a server that has imported what they need; one that has computed anything cannot fork.
    """
    local = processes // machines
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(local), "GROUP_WORLD_SIZE": str(machines)}
    paths, running = [], []
    for rank in range(processes):
        own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} if processes > 1 else {}
        paths.append([folder / f".{stream}-{rank}" for stream in ("stdout", "stderr")])
        running.append(SERVER.Process(target=_be, args=(work, folder, paths[-1], {**os.environ, **own})))
        running[-1].start()
    for process in running:
        process.join(patience)
        process.kill()
        process.join()
    out, err = ("".join(path.read_text() for path in of_all) for of_all in zip(*paths, strict=True))
    return subprocess.CompletedProcess([], next((p.exitcode for p in running if p.exitcode), 0), out, err)


class Started:
    """In the place of `subprocess.Popen([python, "-m", "dtlctl", ...])`: a child of the server; both streams are kept.

    What it says is there to be read once it has ended.
    """

    def __init__(self, command_line: list[str], env: dict[str, str], **_: object):
        work, self.folder = partial(command, *command_line[3:]), tempfile.TemporaryDirectory()
        paths = [Path(self.folder.name, stream) for stream in ("stdout", "stderr")]
        self.child = SERVER.Process(target=_be, args=(work, Path.cwd(), paths, env))
        self.child.start()

    @property
    def stderr(self) -> TextIO:
        self.child.join()
        return Path(self.folder.name, "stderr").open()

    def wait(self) -> int | None:
        self.child.join()
        return self.child.exitcode

    def poll(self) -> int | None:
        return self.child.exitcode

    def terminate(self) -> None:
        self.child.terminate()


def _be(work: Callable[[], None], folder: Path, paths: list[Path], environment: dict[str, str] | None = None) -> None:
    code = 99
    try:
        os.environ.update(environment or {})
        os.chdir(folder)
        for number, path in enumerate(paths, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what every child needs. Nothing is computed here: threads do not survive a fork."""
    for name in NEEDED:
        importlib.import_module(name)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
