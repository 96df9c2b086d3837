"""The results of a run: its folder, the key of each result, how a result is published, and where it comes from.

The key of a result knows its images by content, which nobody has at hand who only reads sidecars. So a sidecar keeps
the recipe's tables too, outside the key.
"""

from __future__ import annotations

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dtlctl import __version__
from dtlctl.console import devices, stop
from dtlctl.console.progress import say
from dtlctl.data.dataset import Note
from dtlctl.errors import CheckpointError
from dtlctl.model import networks, weights
from dtlctl.recipe.plan import Job, references
from dtlctl.recipe.schema import Recipe
from dtlctl.run.datasets import Datasets
from dtlctl.run.processes import Processes
from dtlctl.storage import checkpoint, lock
from dtlctl.storage.parts import Parts

if TYPE_CHECKING:
    from dtlctl.training.engine import History


REFERENCES = "audit/references"


@dataclass(eq=False)
class Results:
    """What is in the run's folder, job by job."""

    folder: Path
    recipe: Recipe
    jobs: Sequence[Job[Any]]
    data: Datasets
    processes: Processes
    command: Callable[[str], str]
    """The command line that does a stage, for messages."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Own the folder: lock it, tidy it after a crash, write the resolved recipe there. Raises CheckpointError."""
        with ExitStack() as stack:
            self.processes.by_main(lambda: self._open(stack))
            yield

    def _open(self, stack: ExitStack) -> None:
        folders = sorted({place for job in self.jobs for place in (self.path(job).parent, self.scratch(job))})
        folders.append(self.folder / REFERENCES)
        lock.refuse_links(self.folder, [*folders, self.folder / "report"])
        if taken_over := stack.enter_context(lock.held(self.folder)):
            say(taken_over)
        for folder in [self.folder, *folders]:
            checkpoint.settle(folder)
        checkpoint.publish_json(self.folder / "recipe.json", self.recipe.resolved())

    def path(self, job: Job[Any]) -> Path:
        """The job's sidecar."""
        return self.folder / job.path

    def scratch(self, job: Job[Any]) -> Path:
        """A folder for what a job needs until it is published."""
        return self.path(job).with_suffix(".resume")

    def parts(self, job: Job[Any]) -> Parts:
        return Parts(self.scratch(job), self.key(job))

    def tidy(self, job: Job[Any]) -> None:
        """Remove the job's scratch folder, if this is the main process."""
        if self.processes.is_main:
            shutil.rmtree(self.scratch(job), ignore_errors=True)

    def maker(self, model: str) -> Job[Any]:
        return next(job for job in self.jobs if job.model == model and job.makes_model)

    def key(self, job: Job[Any]) -> str:
        return checkpoint.key(self._inputs(job))

    def done(self, job: Job[Any]) -> bool:
        """Whether the result exists, whole, and was made from exactly this recipe, data and parent."""
        sidecar = checkpoint.read_sidecar(self.path(job))
        return sidecar is not None and sidecar["key"] == self.key(job) and not checkpoint.lost(self.path(job))

    def reference_answers(self) -> Parts:
        """What reference models said of the source's images, kept for the audits of all models."""
        pre, form = self.key(references(self.recipe)), "scaled answers, of all images"
        key = {"pre": pre, "seed": self.recipe.seed, "form": form}
        return Parts(self.folder / REFERENCES, checkpoint.key(key))

    def require(self, model: str) -> dict[str, Any]:
        """The sidecar of an up-to-date model; else CheckpointError with the command that makes it."""
        job = self.maker(model)
        sidecar = checkpoint.read_sidecar(self.path(job))
        if sidecar is None or sidecar["key"] != self.key(job):
            why = "was made from other settings or data" if sidecar else "has not been made yet"
            raise CheckpointError(f"{self.path(job)}: {model} {why}; run: {self.command(job.stage)}")
        return sidecar

    def publish(
        self,
        job: Job[Any],
        metrics: dict[str, Any],
        history: History,
        model: networks.Classifier | None = None,
        adopted: Sequence[Note] = (),
    ) -> None:
        """Publish a result, and a model's weights with it, with what is to be said of weights that were adopted."""
        engine = self.processes.engine
        notes = self.data.notes(job.roles) | ({"weights": [*adopted]} if adopted else {})
        sidecar = {
            "format": checkpoint.FORMAT,
            "stage": job.stage,
            "model": job.model,
            "key": self.key(job),
            **self._inputs(job),
            "metrics": metrics,
            "history": history.rows,
            "wall_seconds": round(history.seconds, 3),
            "images_per_second": round(history.images_per_second, 1),
            "datasets": {role: self._origin(role) for role in job.roles},
            "notes": {role: [n._asdict() for n in notes] for role, notes in notes.items()},
            **circumstances(engine.device, engine.processes),
        }

        def write() -> None:
            if model is None:
                checkpoint.publish_json(self.path(job), sidecar)
            else:
                checkpoint.publish(self.path(job).parent, model, {**sidecar, "heads": model.outputs})
            self.tidy(job)

        with stop.deferred():
            engine.agree(0, patient=True)  # nobody is still at work on it
            engine.by_main(write)

    def _origin(self, role: str) -> dict[str, Any]:
        """The dataset's table in the recipe, and the sizes of the classes of its whole train split."""
        table, train = self.recipe.data.of(role), self.data.images(role, "train")
        counts = np.bincount(train.labels, minlength=len(train.classes)).tolist()
        return {"table": table.model_dump(mode="json"), "class_images": counts}

    def _inputs(self, job: Job[Any]) -> dict[str, Any]:
        identities = {role: self.data.identity(role, beyond=role == job.beyond) for role in job.roles}
        said, tgt = job.described(self.recipe), self.recipe.target_only and self.recipe.target_only.weights
        outside = {"weights": job.weights, "compared": tgt if "compared" in said["settings"] else None}
        return {
            **said,
            **{name: weights.identity(one, self.recipe.model.arch) for name, one in outside.items() if one},
            "data": identities,
            "batch": job.batches({role: one["images"] for role, one in identities.items()}, self.processes.count),
            "parent": {job.parent: self.require(job.parent).get("weights_sha256")} if job.parent else {},
        }


def circumstances(device: torch.device, processes: int) -> dict[str, Any]:
    import resource  # not on Windows, where `dtlctl.load` works

    from accelerate import __version__ as accelerate_version

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "peak_memory_bytes": devices.peak(device) or peak,
        "processes": processes,
        "device": devices.name(device),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "dtlctl": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate_version,
        },
    }
