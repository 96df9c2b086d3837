"""theta_pl = TRAIN(theta, L(theta; D_p)) and Acc_pl: what an attacker gets out (Eq. 14), with one setting and tuned."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from dtlctl.attacks import features, tuning
from dtlctl.attacks.attackers import Attacker, Frozen, SelfTraining
from dtlctl.attacks.search import Point, reusable, search
from dtlctl.attacks.tuning import Evaluation, Setting, Trial
from dtlctl.data.dataset import Split
from dtlctl.model.networks import Classifier
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Piggyback
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint
from dtlctl.storage.parts import Parts
from dtlctl.training.engine import History

Result = TypeVar("Result")
HEAD = "piggyback"
Features = dict[Split, tuple[dict[str, np.ndarray], np.ndarray]]
"""Of the images of a split: features [N, F] by stage, and labels [N]."""


def piggyback(experiment: Experiment, job: Job[Piggyback]) -> None:
    """Full fine-tuning of all weights under a new head; head, batches and augmentation are the same for all models."""
    model = start(experiment, job, f"piggyback/{job.dataset}/head")
    batches = experiment.trainer.batches(job.dataset, job.settings.batch_size, f"piggyback/{job.dataset}/batches")
    objective, measures = cross_entropy(model, HEAD, batches), {"acc_pl": (HEAD, job.dataset)}
    parts, form = experiment.results.parts(job), tuple[History, dict[str, Any]]
    train = partial(experiment.trainer.train, job, model, objective, batches, measures)
    history, metrics = parts.common(experiment.engine, "single", form, train)
    if job.settings.attackers:
        metrics |= _tuned(experiment, job, parts, metrics["acc_pl"])
    experiment.results.publish(job, metrics, history)


def _tuned(experiment: Experiment, job: Job[Piggyback], parts: Parts, single: float) -> dict[str, Any]:
    """Metrics of the tuned attackers; `single`: Acc_pl of the table's one setting.

    Each attacker tries settings on the training part of his images and keeps what is best on the held-out part, the
    step too; with that he trains once more, on all he has, and is left out if that diverges. The worst case is the
    attacker who is best on held-out images. `acc_pl_max` looks at the images that judge instead: an upper bound.
    """
    started, trials, finals = time.perf_counter(), list[Trial](), list[list[Trial]]()

    def done(count: int, of: int) -> None:
        bar.at(len(trials) + count, job.settings.attack_seeds * of)

    with experiment.processes.progress(f"{job.title}: attackers", 1) as bar:
        for seed in range(job.settings.attack_seeds):
            repetition = Repetition(experiment, job, seed)
            points, tried = _tried(repetition, job.settings, parts, done)
            kinds = dict.fromkeys(trial.setting.kind for trial in tried)
            best = [tuning.choose([t for t in tried if t.setting.kind == kind]) for kind in kinds]
            finishing = [partial(repetition.finish, points[tried.index(trial)][0], trial) for trial in best if trial]
            name = f"final-{seed}-{_digest([trial.document() for trial in best if trial])}"
            again = share_out(repetition, parts.each(name, Trial, finishing, repetition.stop.is_set))
            trials.extend(tried)
            finals.append(again)
    seconds, fits = time.perf_counter() - started, len(experiment.engine.gather_objects(parts.made))
    cost = {"trials_per_minute": round(60 * fits / seconds, 1), "attack_seconds": round(seconds, 1)}
    stood = [found for again in finals if (found := [final for final in again if final.acc_pl is not None])]
    chosen = [final for found in stood if (final := tuning.choose(found))]
    accuracies = [[final.acc_pl or 0.0 for final in found] for found in stood]
    return {
        "acc_pl_worst": mean(final.acc_pl or 0.0 for final in chosen) if chosen else single,
        "acc_pl_median": median([accuracy for row in accuracies for accuracy in row] or [single]),
        "acc_pl_max": mean(max([single, *row]) for row in accuracies) if accuracies else single,
        "judges": len(repetition.judges),
        "chosen": [final.document(final=True) for final in chosen],
        "attackers": [final.document(final=True) for again in finals for final in again],
        "trials": [trial.document() for trial in trials],
        **({"winner": reusable(final.table or {} for final in chosen)} if chosen and job.settings.search else {}),
        **(cost if fits == len(trials) + sum(map(len, finals)) else {}),  # of a part it would say nothing
    }


def _tried(
    repetition: Repetition, settings: Piggyback, parts: Parts, done: Callable[[int, int], None]
) -> tuple[list[Point], list[Trial]]:
    """The settings of the attackers' grids, or of a search, and what came of each. done: told how many, and of what."""
    total = settings.search.trials if settings.search else len(repetition.grid)

    def attempt(points: list[Point], before: int) -> list[Trial]:
        name = f"trial-{repetition.seed}"
        if settings.search:
            name += f"-{before}-{_digest([[attacker.table(), setting] for attacker, setting in points])}"
        tasks = [partial(repetition.attempt, *point) for point in points]
        trying = parts.each(name, Trial, tasks, repetition.stop.is_set)
        return share_out(repetition, trying, lambda count: done(before + count, total))

    if not settings.search:
        return repetition.grid, attempt(repetition.grid, 0)
    seed = repetition.experiment.recipe.stream(f"{repetition.tag}/search")
    return search(settings.attackers, repetition.stages, settings.search.trials, seed, attempt)


def _digest(what: list[Any]) -> str:
    """For the names of parts: another release of Optuna may suggest other settings."""
    return checkpoint.key({"what": what})[:12]


def start(experiment: Experiment, job: Job[Piggyback], head: str, *, alone: bool = False) -> Classifier:
    """The attacked model under a new head; `alone`: its batch statistics are this process's own."""
    if job.parent:
        model = experiment.trainer.load_model(job.parent, global_batch_norm=not alone)
    else:
        model = experiment.trainer.new_model({}, f"piggyback/{job.dataset}/init", global_batch_norm=not alone)
    experiment.trainer.attach_head(model, HEAD, len(experiment.data.classes(job.dataset)), head)
    return model


class Repetition:
    """One repetition of the attack on one model: which images train, choose and judge, the new head, the features."""

    def __init__(self, experiment: Experiment, job: Job[Piggyback], seed: int):
        self.experiment, self.job, self.seed, self.tag = experiment, job, seed, f"piggyback/{job.dataset}/attack/{seed}"
        self.own, self.labels = experiment.data.index(job.dataset), experiment.data.images(job.dataset, "train").labels
        # Places of the images that train, among the attacker's own; that choose, with their split; and that judge.
        test, seed = experiment.data.images(job.dataset, "test").labels, experiment.recipe.stream(f"{self.tag}/split")
        self.held: tuple[Split, np.ndarray]
        if job.settings.choose_on == "test":
            self.judges, held = tuning.hold_out(test, 0.5, seed)
            self.train, self.held = np.arange(len(self.own)), ("test", held)
        else:
            self.train, held = tuning.hold_out(self.labels[self.own], job.settings.held_out, seed)
            self.held, self.judges = ("train", held), np.arange(len(test))
        self.model = start(experiment, job, f"{self.tag}/head", alone=True).through(HEAD)
        self.fresh = experiment.trainer.new_model({}, f"{self.tag}/fresh", global_batch_norm=False)
        asked = any(isinstance(attacker, SelfTraining) for attacker in job.settings.attackers)
        self.left_out = experiment.data.held_back(job.dataset) if asked else self.own[:0]
        self.whole = partial(experiment.trainer.whole, job.dataset)  # trials are shared out, batches are not
        self.stop = threading.Event()
        self.features: dict[Any, Features] = {}
        read = [self.seen(a, n) for a in job.settings.attackers if isinstance(a, Frozen) for n in a.amounts()]
        self.stages = features.distinct(read[0]["train"][0]) if read else []
        self.grid: list[Point] = [(one, setting) for one in job.settings.attackers for setting in one.grid(self.stages)]
        """Every attacker with every setting that he tries."""

    def attempt(self, attacker: Attacker, setting: Setting) -> Trial:
        """Train on the training part and look at the held-out part."""
        table = attacker.table() if self.job.settings.search else None
        return Trial(setting, self.seed, self._learnt(attacker, setting, self.train, self.held), table=table)

    def finish(self, attacker: Attacker, trial: Trial) -> Trial:
        """The trial's setting and length once more, on all of the attacker's images, and how it is judged."""
        everything, until = np.arange(len(self.own)), trial.best and trial.best.step
        found = self._learnt(attacker, trial.setting, everything, ("test", self.judges), until)
        # Of answers that are not finite argmax would make class 0.
        return trial._replace(acc_pl=found[0].accuracy if found and np.isfinite(found[0].loss) else None)

    def _learnt(
        self, attacker: Attacker, setting: Setting, places: np.ndarray, judges: tuple[Split, np.ndarray],
        until: int | None = None,
    ) -> list[Evaluation]:  # fmt: skip
        """Learn from the own images at these places: looks by others on the way, or one after `until` steps."""
        if isinstance(attacker, Frozen):
            seen, stage = self.seen(attacker, setting.amount), setting.stage or features.EMBEDDING

            def known(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                by_stage, y = seen[split]
                return by_stage[stage][rows].astype(np.float64), y[rows]

            (x, y), others = known("train", places), known(*judges)
            finite = np.isfinite(x).all()
            return [tuning.evaluate_probe(attacker.fit(x, y, setting.rate), *others)] if finite else []
        split, rows = judges
        look = partial(self.whole, split, self.own[rows] if split == "train" else rows)
        model, size = self._prepared(attacker, places, setting.amount), attacker.batch_size
        batches = self.experiment.trainer.batches(self.job.dataset, size, f"{self.tag}/batches", self.own[places])
        batches.augment = attacker.augment or batches.augment
        if attacker.head == "fitted" and not self._fit_head(model, self.own[places]):
            return []
        more: dict[str, Any] = {}
        if isinstance(attacker, SelfTraining):
            tag = f"{self.tag}/unlabelled"
            unlabelled = self.experiment.trainer.batches(self.job.dataset, size, tag, self.left_out)
            unlabelled.augment = batches.augment
            more = {"unlabelled": unlabelled, "threshold": attacker.threshold}
        looks = tuning.train(
            model, batches, setting, steps=attacker.steps, warmup=attacker.warmup, until=until,
            weight_decay=attacker.weight_decay, layer_decay=attacker.layer_decay,
            held_out=None if until else look, stopped=self.stop.is_set, **more,
        )  # fmt: skip
        return [tuning.evaluate(model, look(), until)] if until else looks

    def _fit_head(self, model: Classifier, rows: np.ndarray) -> bool:
        """Fit the head to what the model makes of these images; False where that is not finite."""
        found = features.read(model.eval(), self._pixels("train", rows))[features.EMBEDDING]
        if not np.isfinite(found).all():
            return False
        features.refit(model, HEAD, torch.from_numpy(found), torch.from_numpy(self.labels[rows]), model.outputs[HEAD])
        model.heads[HEAD].requires_grad_(True)
        return True

    def seen(self, attacker: Frozen, amount: float | None = None) -> Features:
        """What such an attacker sees of his own images, and of the test split: read once for all who see the same."""
        preparation = type(attacker).prepare, amount
        if preparation not in self.features:
            model = self._prepared(attacker, np.arange(len(self.own)), amount).eval()
            test = self.experiment.data.images(self.job.dataset, "test").labels
            self.features[preparation] = {
                "train": (features.read(model, self._pixels("train", self.own)), self.labels[self.own]),
                "test": (features.read(model, self._pixels("test")), test),
            }
        return self.features[preparation]

    def _prepared(self, attacker: Attacker | Frozen, rows: np.ndarray, amount: float | None) -> Classifier:
        model = copy.deepcopy(self.model)
        size = -(-len(rows) // max(1, len(rows) // 256))  # parts of about equal size
        attacker.prepare(model, self.fresh, self._pixels("train", self.own[rows], size), amount)
        return model

    def _pixels(self, split: Split, rows: np.ndarray | None = None, size: int | None = None) -> Iterator[Tensor]:
        return (batch.x for batch in self.whole(split, rows, size))


def share_out(
    repetition: Repetition, tasks: list[Callable[[], Result]], done: Callable[[int], None] = lambda count: None
) -> list[Result]:
    """Every task's result, in order. Tasks are shared out over processes and, on the CPU, over this one's threads.

    done: told after each of this process's tasks how many of all are finished by then, if others are as far.
    One thread a task: networks and batches this small leave a second thread idle. But threads share torch's random
    numbers, so the trials of a network that draws some go one after the other, each from the same seed: what an
    attacker gets does not depend on who else is tried.
    """
    from threadpoolctl import threadpool_limits

    engine, cores = repetition.experiment.engine, torch.get_num_threads()
    drawing = draws(repetition.model)
    at_once = 1 if drawing or engine.device.type != "cpu" else cores

    def work(number: int) -> Result:
        if drawing:
            torch.manual_seed(repetition.experiment.recipe.stream(f"{repetition.tag}/draws"))
        return tasks[number]()

    mine, found = range(engine.share.rank, len(tasks), engine.processes), dict[int, Result]()
    torch.set_num_threads(1 if at_once > 1 else cores)
    try:  # two probes of two threads each are slower
        with threadpool_limits(1 if at_once > 1 else None, "blas"), ThreadPoolExecutor(at_once) as pool:
            try:
                for number, result in zip(mine, pool.map(work, mine), strict=True):
                    found[number] = result
                    done(min(len(found) * engine.processes, len(tasks)))
            except BaseException:
                repetition.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(cores)  # OpenMP's limits came back with those of BLAS
    every = dict(engine.gather_objects([*found.items()]))
    return [every[number] for number in range(len(tasks))]


def draws(model: torch.nn.Module) -> bool:
    """Whether the network draws random numbers as it trains: dropout, or stochastic depth."""
    return any(isinstance(m, (_DropoutNd, StochasticDepth)) and m.p > 0 for m in model.modules())
