"""One run of a recipe: its folder, its data, its models, and which results are up to date."""

from __future__ import annotations

import os
import shlex
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dtlctl import __version__
from dtlctl.console import stop
from dtlctl.console.progress import Progress, say
from dtlctl.data import cache as decoded
from dtlctl.data.cache import Images
from dtlctl.data.dataset import Split
from dtlctl.data.subset import balanced, digest
from dtlctl.data.tensors import Batch, Batches, evaluation_batches
from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.model import networks
from dtlctl.recipe import network_demands
from dtlctl.recipe.plan import Job, jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.run import origins
from dtlctl.run.provenance import circumstances
from dtlctl.storage import checkpoint, lock
from dtlctl.training.resume import Memory, State

if TYPE_CHECKING:
    from dtlctl.training.engine import Engine, History, Objective


class Experiment:
    """Everything a stage needs besides its own settings. Data and the engine are loaded when first asked for.

    source: the recipe's file, words: what followed it on the command line; for messages.
    """

    def __init__(
        self, recipe: Recipe, out: Path, *, source: str = "RECIPE", words: Sequence[str] = (), quiet: bool = False
    ):
        self.recipe, self.folder, self.quiet = recipe, out / recipe.name, quiet
        self.source, self.words = source, words
        network_demands.check(recipe, source)  # raises RecipeError
        self.jobs = jobs(recipe)
        self.reference_folder = self.folder / "audit/references"
        self.images = cache(self._images)
        self.index = cache(self._index)

    def chosen(self, stages: Collection[str], only: Collection[str]) -> list[Job[Any]]:
        """The jobs of these stages, of some models only if any are named."""
        return [job for job in self.jobs if job.stage in stages and (not only or job.model in only)]

    @contextmanager
    def opened(self, stages: Collection[str], only: Collection[str]) -> Iterator[None]:
        """Own the run's folder: lock it, put it in order after a crash, write the resolved recipe there.

        Raises RecipeError for a model in `only` that these stages do not make or attack, CheckpointError where
        nothing can be written, another process is at work, or a link leads out of the folder.
        """
        known = dict.fromkeys(job.model for job in self.chosen(stages, ()))
        for model in only:
            if model not in known:
                raise RecipeError(
                    f"--only {model}: {self.source} has none here (it has {', '.join(known) or 'nothing'})"
                )
        with ExitStack() as stack:
            self._by_main(lambda: self._open(stack))
            yield

    def _open(self, stack: ExitStack) -> None:
        folders = sorted({place for job in self.jobs for place in (self._path(job).parent, self.scratch(job))})
        lock.refuse_links(self.folder, [*folders, self.reference_folder, self.folder / "report"])
        if taken_over := stack.enter_context(lock.held(self.folder)):
            say(taken_over)
        for folder in [self.folder, self.reference_folder, *folders]:
            checkpoint.settle(folder)
        checkpoint.renew_json(self.folder / "recipe.json", self.recipe.resolved())

    def _by_main(self, work: Callable[[], Any]) -> Any:
        """Done once, by the main process. No engine is started where there is one process."""
        return work() if os.environ.get("WORLD_SIZE", "1") == "1" else self.engine.by_main(work)

    @cached_property
    def engine(self) -> Engine:
        from dtlctl.training.engine import Engine

        engine = Engine(self.recipe.precision)
        if not self.quiet:
            count = f"{engine.processes} process" + ("es" if engine.processes > 1 else "")
            say(f"dtlctl {__version__}: {self.folder} on {count}, {engine.device.type}")
        return engine

    # Data -------------------------------------------------------------------------------------------------------

    def classes(self, role: str) -> tuple[str, ...]:
        return self.images(role, "train").classes

    def batches(self, role: str, batch_size: int, tag: str) -> Batches:
        """Training batches of the role's subset; `tag` names an independent stream of randomness."""
        train = self.images(role, "train")
        return Batches(
            train.pixels,
            train.labels,
            self.index(role),
            batch_size=batch_size,
            augment=self.recipe.data.of(role).augment,
            seed=self.seed(tag),
            device=self.engine.device,
            share=self.engine.share,
        )

    def accuracy(self, model: networks.Classifier, head: str, role: str) -> float:
        """Accuracy in % of one head on the role's test split."""
        return self.engine.accuracy(model, head, self.split(role, "test"))

    def split(self, role: str, split: Split, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """This process's share of a split, or of some rows of it, not augmented; to be read to its end."""
        images = self.images(role, split)
        pixels, labels = (images.pixels, images.labels) if rows is None else (images.pixels[rows], images.labels[rows])
        batches = evaluation_batches(pixels, labels, device=self.engine.device, share=self.engine.share)
        return self.engine.heeding(batches)

    def identity(self, role: str) -> dict[str, Any]:
        """What the role's data is, by content: for keys and sidecars."""
        train, test = self.images(role, "train"), self.images(role, "test")
        return {
            "train": train.fingerprint,
            "test": test.fingerprint,
            "index": digest(self.index(role)),
            "images": len(self.index(role)),
            "test_images": len(test.labels),
            "dropped": train.dropped + test.dropped,
            "augment": self.recipe.data.of(role).augment,
        }

    def seed(self, tag: str) -> int:
        """An independent 32-bit seed for every use of randomness in this run."""
        shared = self.recipe.pretrain.seed if tag.startswith(("pretrain/", "subset/source")) else None
        return zlib.crc32(f"{self.recipe.seed if shared is None else shared}/{tag}".encode())

    def progress(self, title: str, total: int) -> Progress:
        return Progress(title, total, enabled=not self.quiet and self.engine.is_main)

    def _images(self, role: str, split: Split) -> Images:
        dataset, size = self.recipe.data.of(role), self.recipe.model.image_size
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone and (found := decoded.cached(dataset, split, size, role=role)) is not None:
            return found  # no engine is started to find that everything is up to date
        with self.progress(f"decode {role} {split}", 1) as bar:
            self._by_main(lambda: decoded.load(dataset, split, size, role=role, progress=bar.at))
        return decoded.load(dataset, split, size, role=role)

    def _index(self, role: str) -> np.ndarray:
        train = self.images(role, "train")
        fraction = self.recipe.data.of(role).fraction
        return balanced(train.labels, len(train.classes), fraction, self.seed(f"subset/{role}"))

    # Models and training ----------------------------------------------------------------------------------------

    def new_model(self, heads: dict[str, int], tag: str, *, global_batch_norm: bool = True) -> networks.Classifier:
        """A freshly initialised model, the same for every use of the tag.

        With several processes its batch statistics are global, or else each process's own.
        """
        torch.manual_seed(self.seed(tag))
        spec = self.recipe.model
        model = networks.build(spec.arch, heads, stem=spec.stem, width=spec.width, image_size=spec.image_size)
        model.precision, model.channels_last = self.recipe.precision, spec.channels_last
        if self.recipe.precision == "float64":
            model.double()
        return self.engine.place(model, global_batch_norm=global_batch_norm)

    def load_model(self, name: str, *, global_batch_norm: bool = True) -> networks.Classifier:
        """The published model of that name, which must be up to date with the recipe."""
        sidecar = self.require(name)
        model = self.new_model(sidecar.get("heads", {}), "load", global_batch_norm=global_batch_norm)
        checkpoint.load_weights(self._path(self.job(name)).parent, sidecar, model)
        return model

    def attach_head(self, model: networks.Classifier, name: str, classes: int, tag: str) -> None:
        """Give the model a fresh head, the same for every use of the tag."""
        torch.manual_seed(self.seed(tag))
        model.add_head(name, classes)

    def train(
        self,
        job: Job[Any],
        model: networks.Classifier,
        objective: Objective,
        batches: Batches,
        measures: dict[str, tuple[str, str]],
        part: str = "",
        also: Collection[int] = (),
    ) -> tuple[History, dict[str, float]]:
        """Train as the job's settings say, measuring {name: (head, role)} accuracies on the way and at the end.

        On the way only as often as no more images are tested than trained on. State is saved in the job's scratch
        folder and taken up from there; a job that trains more than once names its `part`s, each a plain file name.
        After `also` so many steps there is a row in the history besides those at even intervals.
        """
        steps = job.settings.total_steps(batches.images)
        tested = sum(len(self.images(role, "test").labels) for _, role in measures.values())
        state = State()

        def evaluate(step: int) -> dict[str, float]:
            last = next((row["step"] for row in reversed(state.rows) if measures.keys() <= row.keys()), 0)
            if step < steps and (step - last) * batches.batch_size < tested:
                return {}
            return {name: self.accuracy(model, head, role) for name, (head, role) in measures.items()}

        file = self.scratch(job) / f"{part or 'state'}.safetensors"
        memory = Memory(file, checkpoint.key({self.key(job): part}), self.recipe.checkpoint_minutes)
        with self.progress(job.title, steps) as bar:
            size = batches.batch_size
            history = self.engine.train(
                model, objective, job.settings, steps, size, bar, evaluate, also=also, memory=memory, state=state
            )
        return history, {name: history.rows[-1][name] for name in measures}

    def require(self, name: str) -> dict[str, Any]:
        """The sidecar of an up-to-date model; else CheckpointError with the command that makes it."""
        job = self.job(name)
        sidecar = checkpoint.read_sidecar(self._path(job))
        remedy = f"run: {shlex.join(['dtlctl', job.stage, self.source, *self.words])}"
        if sidecar is None:
            raise CheckpointError(f"{self._path(job)}: {name} has not been made yet; {remedy}")
        if sidecar["key"] != self.key(job):
            raise CheckpointError(f"{self._path(job)}: {name} was made from other settings or data; {remedy}")
        return sidecar

    def job(self, model: str) -> Job[Any]:
        """The job that makes the model."""
        return next(job for job in self.jobs if job.model == model and job.stage not in ("piggyback", "audit"))

    # Results ----------------------------------------------------------------------------------------------------

    def key(self, job: Job[Any]) -> str:
        return checkpoint.key(self._inputs(job))

    def done(self, job: Job[Any]) -> bool:
        """Whether the result exists and was made from exactly this recipe, data and parent."""
        sidecar = checkpoint.read_sidecar(self._path(job))
        return sidecar is not None and sidecar["key"] == self.key(job)

    def publish(
        self, job: Job[Any], metrics: dict[str, Any], history: History, model: networks.Classifier | None = None
    ):
        """Publish a result from the main process, once all processes are there. Returns the sidecar's path."""
        engine = self.engine
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
            "precision": self.recipe.precision,
            "datasets": {role: origins.of(self.recipe.data.of(role), self.images(role, "train")) for role in job.roles},
            **circumstances(engine.device, engine.processes),
        }

        def write() -> None:
            if model is None:
                checkpoint.publish_json(self._path(job), sidecar)
            else:
                checkpoint.publish(self._path(job).parent, model, {**sidecar, "heads": model.classes})
            self.tidy(job)

        with stop.deferred():
            engine.agree(0, patient=True)  # nobody is still at work on it
            engine.by_main(write)

    def scratch(self, job: Job[Any]) -> Path:
        """A folder for what a job needs until it is published, and no longer."""
        return self._path(job).with_suffix(".resume")

    def tidy(self, job: Job[Any]) -> None:
        """Remove the job's scratch folder, if this is the main process."""
        if os.environ.get("RANK", "0") == "0" and self.scratch(job).exists():
            shutil.rmtree(self.scratch(job), ignore_errors=True)

    def _path(self, job: Job[Any]) -> Path:
        return self.folder / job.path

    def _inputs(self, job: Job[Any]) -> dict[str, Any]:
        """Everything a result depends on."""
        return {
            **job.described(self.recipe),
            "data": {role: self.identity(role) for role in job.roles},
            "parent": {job.parent: self.require(job.parent).get("weights_sha256")} if job.parent else {},
        }
