"""The models of a run, and their training and testing on its datasets."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dtlctl.attacks import tuning
from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batch, Batches, Share, evaluation_batches
from dtlctl.model import networks
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.run.datasets import Datasets
from dtlctl.run.processes import Processes
from dtlctl.run.results import Results
from dtlctl.storage import checkpoint
from dtlctl.training.resume import HELD_OUT, State, StateFile

if TYPE_CHECKING:
    from dtlctl.training.engine import History, Objective


REPORTS = 8
"""How often accuracies are measured in a training, at most."""


class Trainer:
    """Makes, loads, trains and tests the models of one run. `tag`s name independent streams of randomness.

    global_batch_norm: with several processes, batch statistics over all of them, or else each process's own.
    """

    def __init__(self, recipe: Recipe, data: Datasets, results: Results, processes: Processes):
        self.recipe, self.data, self.results, self.processes = recipe, data, results, processes

    def new_model(self, heads: dict[str, int], tag: str, *, global_batch_norm: bool = True) -> networks.Classifier:
        """A freshly initialised model, the same for every use of the tag."""
        torch.manual_seed(self.recipe.stream(tag))
        spec = self.recipe.model
        model = networks.build(heads=heads, **spec.model_dump(exclude={"channels_last"}))
        model.precision, model.channels_last = self.recipe.precision, spec.channels_last
        if self.recipe.precision == "float64":
            model.double()
        return self.processes.engine.place(model, global_batch_norm=global_batch_norm)

    def load_model(self, name: str, *, global_batch_norm: bool = True) -> networks.Classifier:
        """The published model of that name, which must be up to date with the recipe."""
        sidecar = self.results.require(name)
        model = self.new_model(sidecar.get("heads", {}), "load", global_batch_norm=global_batch_norm)
        checkpoint.load_weights(self.results.path(self.results.maker(name)).parent, sidecar, model)
        return model

    def attach_head(self, model: networks.Classifier, name: str, classes: int, tag: str) -> None:
        """Give the model a fresh head, the same for every use of the tag."""
        torch.manual_seed(self.recipe.stream(tag))
        model.add_head(name, classes)

    def rows(self, job: Job[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Of a job's subset, the rows that it trains on, and those held out; DataError where a class is too small."""
        index = self.data.index(job.dataset)
        if getattr(job.settings, "patience", None) is None:
            return index, index[:0]
        labels = self.data.images(job.dataset, "train").labels[index]
        kept, held = tuning.hold_out(labels, job.settings.held_out, self.recipe.stream(f"{job.model}/held-out"))
        return index[kept], index[held]

    def batches_of(self, job: Job[Any], tag: str) -> Batches:
        return self.batches(job.dataset, job.settings.batch_size, tag, rows=self.rows(job)[0])

    def batches(
        self, role: str, batch_size: int, tag: str, own_rows: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> Batches:
        """Training batches of the role's subset or of these rows; or of `own_rows`, which no other process shares."""
        train, engine = self.data.images(role, "train"), self.processes.engine
        rows = self.data.index(role) if rows is None else rows
        return Batches(
            train.pixels,
            train.labels,
            rows if own_rows is None else own_rows,
            batch_size=batch_size,
            augment=self.recipe.data.of(role).augment,
            seed=self.recipe.stream(tag),
            device=engine.device,
            share=engine.share if own_rows is None else Share(),
        )

    def split(self, role: str, split: Split, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """This process's share of a split, or of some rows of it, not augmented; to be read to its end."""
        images, engine = self.data.images(role, split), self.processes.engine
        batches = evaluation_batches(images.pixels, images.labels, rows, device=engine.device, share=engine.share)
        return engine.stoppable(batches)

    def whole(
        self, role: str, split: Split, rows: np.ndarray | None = None, size: int | None = None
    ) -> Iterator[Batch]:
        """All of a split, or of some rows of it, on this process: what is few, or is not shared out."""
        images, device = self.data.images(role, split), self.processes.engine.device
        return evaluation_batches(images.pixels, images.labels, rows, device=device, batch_size=size)

    def right(self, model: networks.Classifier, role: str, split: Split, rows: np.ndarray | None) -> np.ndarray:
        """bool [n]: which images of a split, or of some rows of it, the head of that role answers rightly."""
        return self.processes.engine.correct(model, role, self.split(role, split, rows))

    def measured(self, model: networks.Classifier, measures: dict[str, tuple[str, str]]) -> dict[str, Any]:
        """Accuracies in % as {name: (head, role)} asks for them, each on all of the role's test split.

        `correct` holds by name which of the target's images were answered rightly: two models are told apart by it.
        """
        correct = self.processes.engine.correct
        found = {name: correct(model, head, self.split(role, "test")) for name, (head, role) in measures.items()}
        kept = {name: packed(each) for name, each in found.items() if measures[name][1] == "target"}
        return {name: 100 * float(each.mean()) for name, each in found.items()} | ({"correct": kept} if kept else {})

    def train(
        self,
        job: Job[Any],
        model: networks.Classifier,
        objective: Objective,
        batches: Batches,
        measures: dict[str, tuple[str, str]],
        also: Collection[int] = (),
        state: State | None = None,
        check: Callable[[int], dict[str, float]] = lambda step: {},
        done: Callable[[], bool] = lambda: False,
        part: int = 0,
    ) -> tuple[History, dict[str, Any]]:
        """Train as the job's settings say, measuring {name: (head, role)} accuracies on the way and at the end.

        The metrics are those of the end, as `measured` has them. On the way only as often as no more images are tested
        than trained on. State is saved in the job's scratch folder and taken up from there, each `part` of a job for
        itself; `state` is for those who read its rows on the way. After `also` so many steps there are more rows; each
        has what `check` returns too.
        With the settings' `patience`, the accuracy on images held out is measured after each epoch, and the model ends
        with the best one's weights.
        """
        steps = job.settings.total_steps(batches.images)
        tested = sum(len(self.data.images(role, "test").labels) for _, role in measures.values())
        state = state or State()
        metrics: dict[str, Any] = {}
        epoch, held = batches.images // batches.batch_size, self.rows(job)[1]
        patience = job.settings.patience * epoch if len(held) else None
        also = {*also, *range(epoch, steps, epoch)} if patience else also

        def evaluate(step: int) -> dict[str, float]:
            found = {**check(step)}
            last = next((row["step"] for row in reversed(state.rows) if measures.keys() <= row.keys()), 0)
            if step == steps or step - last >= max(tested / batches.batch_size, steps // REPORTS):
                metrics.update(self.measured(model, measures))
                found |= {name: metrics[name] for name in measures}
            if patience and (step % epoch == 0 or step == steps):
                found[HELD_OUT] = 100 * float(self.right(model, job.dataset, "train", held).mean())
            return found

        own = f"-{part}" if part else ""  # in the key too: one draw's state is not another's
        file = self.results.scratch(job) / f"state{own}.safetensors"
        resume = StateFile(file, self.results.key(job) + own, self.recipe.checkpoint_minutes)
        title = f"{job.title}/draw-{part + 1}" if part else job.title  # to trackers too: steps begin anew
        with self.processes.progress(title, steps) as bar:
            history = self.processes.engine.train(
                model, objective, job.settings, steps, batches.batch_size, bar, evaluate, also=also, resume=resume,
                state=state, done=lambda: done() if patience is None else state.step - state.best_step() >= patience,
            )  # fmt: skip
        if patience or state.step < steps or not metrics:  # other weights; or a signal came after the last row
            metrics.update(self.measured(model, measures))
        if patience:
            metrics |= {"kept_step": state.best_step(), HELD_OUT: max(row.get(HELD_OUT, 0.0) for row in state.rows)}
            where = f"{state.best_step()} of {steps}" + f", stopped at {state.step}" * (state.step < steps)
            self.processes.say(f"{job.title}: keeps step {where}: the best on {len(held):,} images held out")
        return history, metrics


def packed(correct: np.ndarray) -> str:
    """bool [n] for a sidecar: bits in base64."""
    return b64encode(np.packbits(correct).tobytes()).decode()
