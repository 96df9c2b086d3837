"""Two processes, with limits of two seconds: what waits for the main process alone may take longer."""

import time
from datetime import timedelta

import torch

from dtlctl.training import collectives
from dtlctl.training import engine as engine_module
from dtlctl.training.engine import Engine


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
