"""Two processes, with limits of two seconds: what waits for the main process alone may take longer."""

import time
from datetime import timedelta
from pathlib import Path

import torch

from dtlctl.errors import CheckpointError
from dtlctl.training import collectives
from dtlctl.training import engine as engine_module
from dtlctl.training.collectives import Collectives
from dtlctl.training.engine import Engine
from dtlctl.training.resume import State, StateFile


def wait(work: str) -> None:
    engine_module.TIMEOUT = collectives.TIMEOUT = timedelta(seconds=2)
    engine = Engine()
    first, who = engine.is_main, f"process {engine.share.rank} of {engine.processes}"
    if work == "decoding":
        engine.by_main(lambda: time.sleep(4))
    elif work == "trials":
        time.sleep(4 if first else 0)
        assert engine.gather_objects([engine.share.rank]) == [0, 1]
    try:
        if work == "step":
            time.sleep(0 if first else 6)
            engine.all_reduce([torch.ones(1)])
        elif work == "agreement":
            time.sleep(0 if first else 6)
            engine.agree(0)
    except RuntimeError as error:
        from dtlctl.training.failures import is_loss

        print(f"{who} waited in vain: {is_loss(error)}\n", end="", flush=True)
    else:
        print(f"{who} goes on\n", end="", flush=True)


def restore() -> None:
    """Each process in a folder of its own, of which one has a state of step 3."""
    engine, model = Engine(), torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    file = StateFile(Path(f"{engine.share.rank}.safetensors"), "key")
    if engine.is_main:
        file.save(Collectives(torch.device("cpu"), 0, 1), State(step=3), model, optimizer)
    try:
        file.restore(engine, State(), model, optimizer, schedule)
    except CheckpointError as error:
        print(f"process {engine.share.rank}: {error}\n", end="", flush=True)
