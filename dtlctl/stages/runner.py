"""The stages of disposable transfer learning, each a function of (experiment, job) in a file that tells its story."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dtlctl.console.progress import say
from dtlctl.errors import DtlError
from dtlctl.model.networks import precision
from dtlctl.recipe.plan import Job, Stage
from dtlctl.run import reuse
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.storage import checkpoint


def run(
    lab: Experiment, stages: Collection[Stage], *, only: Collection[str] = (), force: bool = False
) -> list[Job[Any]]:
    """Do the jobs of these stages that are not up to date, in order; return those that were done.

    One process alone takes over what a sweep or a comparison of the recipe has made. `only` restricts to some models;
    `force` redoes what is there. Raises DtlError of whatever kind stops it, before the first job trains where the data
    or the processes cannot do for one of them.
    """
    done, chosen = [], lab.chosen(stages, only)
    data_demands.check(lab, chosen)
    elsewhere = cache(lambda: reuse.results(reuse.relatives(lab.folder.parent, lab.recipe.name)))
    for job in chosen:
        if not force and (lab.done(job) or _taken_over(lab, job, elsewhere)):
            lab.tidy(job)
            continue
        try:
            with precision(lab.recipe.precision):
                _stage(job.stage)(lab, job)
        except (RuntimeError, MemoryError) as error:
            from dtlctl.training.failures import is_shortage, shortage

            if not is_shortage(error):
                raise
            raise DtlError(f"{lab.source}: {shortage(job)}") from error
        done.append(job)
        if not lab.quiet and lab.engine.is_main:
            say(f"{job.title}: {_summary(lab.folder / job.path)}")
    return done


def _taken_over(lab: Experiment, job: Job[Any], elsewhere: Callable[[], dict[str, Path]]) -> bool:
    """elsewhere: what is known, by key. Several processes would have to agree on what is there: they make it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return False
    found = reuse.take_over(lab, job, elsewhere())
    if found is None and job.stage == "audit":
        reuse.take_over_references(lab, reuse.relatives(lab.folder.parent, lab.recipe.name))
    if found is None or not lab.done(job):
        return False
    if not lab.quiet:
        say(f"{job.title}: taken over from {found.parent}")
    return True


def _summary(path: Path) -> str:
    """One line of what a finished job measured."""
    sidecar = checkpoint.read_sidecar(path) or {}
    numbers = {k: v for k, v in sidecar.get("metrics", {}).items() if isinstance(v, float)}
    text = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    return f"{text or 'done'} ({sidecar.get('wall_seconds', 0):.0f} s)"


def _stage(name: Stage) -> Callable[[Experiment, Job[Any]], None]:
    """Imported when there is work to do: looking whether everything is up to date needs no training code."""
    return getattr(import_module(f"dtlctl.stages.{name}"), name)
