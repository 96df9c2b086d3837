"""What saving state costs: seconds a save, and share of the run time at an interval.

    python -m tests.reliability.overhead --json docs/results/reliability/overhead.json

A ResNet-18 for 32-pixel images with its momentum (90 MB of state) is trained on random images, once without saving
and once with a save at every `every` steps; the cost of a save is the difference, and the time of `StateFile.save`
itself is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dtlctl.console.progress import Progress
from dtlctl.model import networks
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Training
from dtlctl.training.engine import Engine
from dtlctl.training.resume import StateFile


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_args()
    engine, times, folder = Engine(), [], Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = networks.build("resnet18", {"source": 100})
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8)

    class Timed(StateFile):
        def save(self, *arguments: object) -> None:
            started = time.perf_counter()
            super().save(*arguments)  # type: ignore[arg-type]
            times.append(time.perf_counter() - started)

    def objective(step: int):
        model.train()
        loss = F.cross_entropy(model(x, "source"), y)
        return loss, {"loss": loss.detach()}

    def run(memory: StateFile | None) -> float:
        plan = Training(steps=options.saves, batch_size=8)
        progress = Progress("overhead", options.saves, enabled=False)
        return engine.train(model, objective, plan, options.saves, 8, progress, lambda _: {}, resume=memory).seconds

    run(None)
    without, saving = run(None), run(Timed(folder / "state.safetensors", "key", minutes=0))
    size = (folder / "state.safetensors").stat().st_size
    default = Recipe.model_fields["checkpoint_minutes"].default
    save = statistics.median(times)
    document = {
        "command": "python -m tests.reliability.overhead --json docs/results/reliability/overhead.json",
        "architecture": "resnet18",
        "state_bytes": size,
        "saves": len(times),
        "seconds_a_save_median": round(save, 3),
        "seconds_a_save_longest": round(max(times), 3),
        "seconds_of_steps_without": round(without, 3),
        "seconds_of_steps_with_a_save_each": round(saving, 3),
        "checkpoint_minutes": default,
        "overhead_percent_at_default": round(100 * save / (60 * default), 3),
        "overhead_percent_at_default_longest": round(100 * max(times) / (60 * default), 3),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
    }
    print(json.dumps(document, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
