"""The main process of two works for longer than torch would have the other wait: its limit is set to two seconds."""

import time
from datetime import timedelta

from torch.distributed import distributed_c10d

from dtlctl.training.engine import Engine

if __name__ == "__main__":
    distributed_c10d._get_default_timeout = lambda _: timedelta(seconds=2)
    engine = Engine()
    engine.by_main(lambda: time.sleep(4))
    print(f"process {engine.share.rank} of {engine.processes} goes on", flush=True)
