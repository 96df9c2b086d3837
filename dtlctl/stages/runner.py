"""The stages of disposable transfer learning, each a function of (experiment, job) in a file that tells its story."""

from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from typing import Any

from dtlctl.errors import DivergedError, DtlError, counted
from dtlctl.model.networks import precision
from dtlctl.recipe.plan import Job, Stage
from dtlctl.run.earlier import Earlier, relatives
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.storage import checkpoint

NAMED = 6
"""Results that are named, of those that are there already."""


def run(
    experiment: Experiment, stages: Collection[Stage], *, only: Collection[str] = (), force: bool = False
) -> list[Job[Any]]:
    """Do the jobs of these stages that are not up to date, in order; return those that were done.

    One process alone takes over what a sweep or a comparison of the recipe has made. `only` restricts to some models;
    `force` redoes what is there. Raises DtlError of whatever kind stops it, before the first job trains where the data
    or the processes cannot do for one of them.
    """
    # What is adopted comes first: whether it fits is not told after hours of training.
    chosen = sorted(experiment.chosen(stages, only), key=lambda job: not job.weights)
    there, done = list[str](), list[Job[Any]]()
    data_demands.check(experiment, chosen)
    if (left := experiment.data.left) and chosen:
        experiment.processes.say(f"decoded images are kept in {left}, or where DTLCTL_CACHE says; delete it at will")
    earlier = cache(lambda: Earlier(relatives(experiment.folder.parent, experiment.recipe.name)))
    for number, job in enumerate(chosen, 1):
        if not force and ((own := experiment.results.done(job)) or _taken_over(experiment, job, earlier)):
            experiment.results.tidy(job)
            there += [job.title] * own
            continue
        if there:
            more = f" and {len(there) - NAMED} more" if len(there) > NAMED else ""
            experiment.processes.say(f"up to date: {', '.join(there[:NAMED])}{more}")
            there.clear()
        if lost := checkpoint.lost(experiment.results.path(job)):
            experiment.processes.say(f"{job.title}: {lost} is missing; the model is made again")
        if experiment.results.scratch(job).exists() and (parts := experiment.results.parts(job).count()):
            experiment.processes.say(f"{job.title}: goes on with {counted(parts, 'finished part')}")
        try:
            with precision(experiment.recipe.precision):
                name = "adopt" if job.weights else job.stage
                # Imported when there is work to do: looking whether everything is up to date needs no training code.
                getattr(import_module(f"dtlctl.stages.{name}"), name)(experiment, job)
        except DivergedError as error:
            from dtlctl.training.failures import remedy

            # Of an audit the model is at fault, or its own training: relearning.
            audit = job.stage == "audit"
            what = f"make {job.model} again with" if audit else "nothing was published; try"
            way = remedy(experiment.results.maker(job.model).settings if audit else job.settings)
            way += "; for relearning a smaller audit.relearn_lr" * (audit and job.settings.relearn_steps > 0)
            raise DivergedError(f"{job.title}: {error}\n{what} {way}") from None
        except (RuntimeError, MemoryError) as error:
            from dtlctl.training.failures import is_shortage, shortage

            if not is_shortage(error):
                raise
            raise DtlError(f"{experiment.source}: {shortage(job)}") from error
        done.append(job)
        sidecar = checkpoint.read_sidecar(experiment.results.path(job)) or {}
        metrics = sidecar.get("metrics", {})
        told = ", ".join(f"{name} {n:.4g}" for name, n in metrics.items() if isinstance(n, float)) or "done"
        seconds = sidecar.get("wall_seconds", 0) + metrics.get("attack_seconds", 0)
        place = f"; {number} of {len(chosen)}" * (len(chosen) > 1)
        experiment.processes.say(f"{job.title}: {told} ({seconds:.0f} s{place})")
    return done


def _taken_over(experiment: Experiment, job: Job[Any], earlier: Callable[[], Earlier]) -> bool:
    """Whether another run's result could be taken. Several processes would have to agree on what there is."""
    found = earlier().take(experiment, job) if experiment.processes.count == 1 else None
    if found is None or not experiment.results.done(job):
        return False
    experiment.processes.say(f"{job.title}: taken over from {found.parent}")
    return True
