"""theta_pl = TRAIN(theta, L(theta; D_p)) and its test accuracy Acc_pl: what an attacker gets out (Eq. 14)."""

from __future__ import annotations

import time
from functools import partial
from statistics import mean, median
from typing import Any

from dtlctl.attacks import tuning
from dtlctl.attacks.tuning import Trial
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Piggyback
from dtlctl.run.experiment import Experiment
from dtlctl.stages.trials import HEAD, Repetition, share_out, start
from dtlctl.storage.parts import Parts
from dtlctl.training.engine import History


def piggyback(experiment: Experiment, job: Job[Piggyback]) -> None:
    """Full fine-tuning of all weights under a new head. Head, batches and augmentation are the same for all models.

    Then, if the recipe names any, the attackers who tune themselves.
    """
    model = start(experiment, job, f"piggyback/{job.dataset}/head")
    batches = experiment.trainer.batches(job.dataset, job.settings.batch_size, f"piggyback/{job.dataset}/batches")
    objective = cross_entropy(model, HEAD, batches)
    parts = experiment.results.parts(job)
    history, metrics = parts.common(
        experiment.engine,
        "single",
        tuple[History, dict[str, Any]],
        lambda: experiment.trainer.train(job, model, objective, batches, {"acc_pl": (HEAD, job.dataset)}),
    )
    if job.settings.attackers:
        metrics |= _tuned(experiment, job, parts, metrics["acc_pl"])
    experiment.results.publish(job, metrics, history)


def _tuned(experiment: Experiment, job: Job[Piggyback], parts: Parts, single: float) -> dict[str, Any]:
    """Metrics of the tuned attackers; `single`: Acc_pl of the table's one setting.

    Each attacker tries his grid on the training part of his images and keeps what is best on the held-out part, the
    step too; with that he trains once more, on all he has, and is left out if that diverges. The worst case is the
    attacker who is best on held-out images. `acc_pl_max` looks at the images that judge instead: no attacker can do
    that, so it is an upper bound.
    """
    started, kinds = time.perf_counter(), dict.fromkeys(attacker.kind for attacker in job.settings.attackers)
    trials: list[Trial] = []
    finals: list[list[Trial]] = []
    total = 1

    def done(count: int) -> None:
        bar.at(len(trials) + count, total)

    with experiment.processes.progress(f"{job.title}: attackers", total) as bar:
        for seed in range(job.settings.attack_seeds):
            repetition = Repetition(experiment, job, seed)
            grid, total = repetition.grid, job.settings.attack_seeds * len(repetition.grid)
            tasks = [partial(repetition.attempt, *point) for point in grid]
            trying = parts.each(f"trial-{seed}", Trial, tasks, repetition.stop.is_set)
            tried = share_out(repetition, trying, done)
            best = [tuning.choose([t for t in tried if t.setting.kind == kind]) for kind in kinds]
            finishing = [partial(repetition.finish, grid[tried.index(trial)][0], trial) for trial in best if trial]
            again = share_out(repetition, parts.each(f"final-{seed}", Trial, finishing, repetition.stop.is_set))
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
        "chosen": [final.document(final=True) for final in chosen],
        "attackers": [final.document(final=True) for again in finals for final in again],
        "trials": [trial.document() for trial in trials],
        **(cost if fits == len(trials) + sum(map(len, finals)) else {}),  # of a part it would say nothing
    }
