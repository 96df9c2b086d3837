"""The trials of tuned attackers on one model, shared out over processes and threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from dtlctl.attacks import tuning
from dtlctl.attacks.piggyback import Attacker, Frozen
from dtlctl.attacks.tuning import Setting, Trial
from dtlctl.data.tensors import Batch, Batches, evaluation_batches
from dtlctl.experiment import Experiment
from dtlctl.models import Classifier
from dtlctl.plan import Job
from dtlctl.recipe import Piggyback

Result = TypeVar("Result")
HEAD = "piggyback"


def start(lab: Experiment, job: Job[Piggyback], head: str, *, alone: bool = False) -> Classifier:
    """The attacked model under a new head; `alone`: its batch statistics are this process's own."""
    if job.parent:
        model = lab.load_model(job.parent, global_batch_norm=not alone)
    else:
        model = lab.new_model({}, f"piggyback/{job.dataset}/init", global_batch_norm=not alone)
    lab.attach_head(model, HEAD, len(lab.classes(job.dataset)), head)
    return model


class Strike(NamedTuple):
    """An attacker's chosen trial, made again with all images that he has."""

    trial: Trial
    acc_pl: float

    def document(self) -> dict[str, Any]:
        return {**self.trial.setting._asdict(), **{k: self.trial.document()[k] for k in ("step", "val")},
                "seed": self.trial.seed, "acc_pl": self.acc_pl}  # fmt: skip


class Ground:
    """One repetition of the attack on one model: the split of the attacker's images, the new head, the features."""

    def __init__(self, lab: Experiment, job: Job[Piggyback], seed: int):
        self.lab, self.job, self.seed, self.tag = lab, job, seed, f"piggyback/{job.dataset}/attack/{seed}"
        self.own, self.labels = lab.index(job.dataset), lab.images(job.dataset, "train").labels
        self.parts = tuning.hold_out(self.labels[self.own], job.settings.held_out, lab.seed(f"{self.tag}/split"))
        self.model = start(lab, job, f"{self.tag}/head", alone=True)
        self.fresh = lab.new_model({}, f"{self.tag}/fresh", global_batch_norm=False)
        self.stop = threading.Event()
        frozen = {a.kind: a for a in job.settings.attackers if isinstance(a, Frozen)}
        self.features = {kind: self._features(attacker) for kind, attacker in frozen.items()}

    def attempt(self, attacker: Attacker, setting: Setting) -> Trial:
        """Train on the training part and look at the held-out part."""
        train, held = self.parts
        if isinstance(attacker, Frozen):
            (x, y), _ = self.features[attacker.kind]
            fitted = tuning.Linear(x[train], y[train], setting.rate)
            return Trial(setting, self.seed, [fitted.look(x[held], y[held])])
        model = self._prepared(attacker, train)
        looks = tuning.train(
            model, HEAD, self._batches(train, attacker.batch_size), setting,
            steps=attacker.steps, warmup=attacker.warmup, held_out=self._pixels(held), stopped=self.stop.is_set,
        )  # fmt: skip
        return Trial(setting, self.seed, looks)

    def strike(self, attacker: Attacker, trial: Trial) -> Strike:
        """The trial's setting and length once more, on all of the attacker's images."""
        everything = np.arange(len(self.own))
        if isinstance(attacker, Frozen):
            (x, y), test = self.features[attacker.kind]
            return Strike(trial, tuning.Linear(x, y, trial.setting.rate).look(*test).accuracy)
        model = self._prepared(attacker, everything)
        tuning.train(
            model, HEAD, self._batches(everything, attacker.batch_size), trial.setting,
            steps=attacker.steps, warmup=attacker.warmup, until=trial.best and trial.best.step,
            stopped=self.stop.is_set,
        )  # fmt: skip
        return Strike(trial, tuning.accuracy(model, HEAD, self._test()))

    def _prepared(self, attacker: Attacker, rows: np.ndarray) -> Classifier:
        model = copy.deepcopy(self.model)
        attacker.prepare(model, self.fresh, self._pixels(rows)[0])
        return model

    def _batches(self, rows: np.ndarray, size: int) -> Batches:
        train = self.lab.images(self.job.dataset, "train")
        augment = self.lab.dataset(self.job.dataset).augment
        seed, device = self.lab.seed(f"{self.tag}/batches"), self.lab.engine.device
        return Batches(
            train.pixels, train.labels, self.own[rows], batch_size=size, augment=augment, seed=seed, device=device
        )

    def _pixels(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Some of the attacker's images [N, 3, S, S] in [0, 1], not augmented, and their labels [N]."""
        parts = list(self._whole("train", self.own[rows]))
        return torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])

    def _test(self) -> Iterator[Batch]:
        return self._whole("test", np.arange(len(self.lab.images(self.job.dataset, "test").labels)))

    def _whole(self, split: Any, rows: np.ndarray) -> Iterator[Batch]:
        """All of these rows, on this process: trials are shared out, batches are not."""
        images = self.lab.images(self.job.dataset, split)
        return evaluation_batches(images.pixels[rows], images.labels[rows], device=self.lab.engine.device)

    @torch.no_grad()
    def _features(self, attacker: Attacker) -> list[tuple[np.ndarray, np.ndarray]]:
        """(features [N, F], labels [N]) of the attacker's own images and of the test split, computed once."""
        model = self._prepared(attacker, np.arange(len(self.own))).eval()
        found = []
        for part in (self._whole("train", self.own), self._test()):
            pairs = [(model.embed(batch.x).double().cpu().numpy(), batch.y.cpu().numpy()) for batch in part]
            found.append((np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])))
        return found


def share_out(ground: Ground, tasks: list[Callable[[], Result]]) -> list[Result]:
    """Every task's result, in order. Tasks are shared out over processes and, on the CPU, over this one's threads.

    One thread a task: networks and batches this small leave a second thread idle. But threads share torch's random
    numbers, so the trials of a network that draws some go one after the other, each from a seed of its own.
    """
    from threadpoolctl import threadpool_limits

    engine, cores = ground.lab.engine, torch.get_num_threads()
    drawing = draws(ground.model)
    at_once = 1 if drawing or engine.device.type != "cpu" else cores

    def work(number: int) -> Result:
        if drawing:
            torch.manual_seed(ground.lab.seed(f"{ground.tag}/{number}"))
        return tasks[number]()

    blas = threadpool_limits(1 if at_once > 1 else None, "blas")  # two probes of two threads each are slower
    torch.set_num_threads(1 if at_once > 1 else cores)
    pool = ThreadPoolExecutor(at_once)
    try:
        results = list(pool.map(work, range(engine.share.rank, len(tasks), engine.processes)))
    except BaseException:
        ground.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        blas.restore_original_limits()  # OpenMP's with them, so torch's own come after
        torch.set_num_threads(cores)
    gathered = engine.gather_objects(results)
    # Process r did tasks r, r + n, r + 2n, ...: deal them back into order.
    order = [number for rank in range(engine.processes) for number in range(rank, len(tasks), engine.processes)]
    return [result for _, result in sorted(zip(order, gathered, strict=True), key=lambda pair: pair[0])]


def draws(model: torch.nn.Module) -> bool:
    """Whether the network draws random numbers as it trains: dropout, or stochastic depth."""
    return any(isinstance(m, (_DropoutNd, StochasticDepth)) and m.p > 0 for m in model.modules())
