"""What a recipe demands of its data and of the processes that share it, looked at before anything trains."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from dtlctl.attacks import tuning
from dtlctl.attacks.attackers import SelfTraining
from dtlctl.errors import DataError, RecipeError, counted
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Dispose, Piggyback
from dtlctl.run.experiment import Experiment
from dtlctl.stages.audit import Role, groups
from dtlctl.training.price import EXPECTED, images_for, resolution


def check(experiment: Experiment, jobs: Iterable[Job[Any]]) -> None:
    """Raise RecipeError or DataError where a job's data cannot be read, or not do for its settings or processes."""
    jobs, said = list(jobs), set[str]()  # roles that share a dataset share its notes
    for role, notes in experiment.data.notes(tuple(dict.fromkeys(role for job in jobs for role in job.roles))).items():
        for text in [note.text for note in notes if note.text not in said]:
            experiment.processes.say(f"data.{role}: {text}")
            said.add(text)
    for job in jobs:
        if job.stage == "dispose":
            processes = _sharing(experiment, job)
            local_chunks(job.settings, processes, f"{experiment.source}: {job.title}")
            size = equal_parts(experiment, job, processes)["source"]
            _images_for_a_loss(experiment, job, size, processes)
            if job.settings.price is not None:
                _images_for_a_price(experiment, job, job.settings.price)
        if job.stage == "piggyback" and job.settings.attackers:
            _images_to_hold_out(experiment, job)
            asking = any(isinstance(attacker, SelfTraining) for attacker in job.settings.attackers)
            if asking and not len(experiment.data.held_back(job.dataset)):
                raise DataError(
                    f"{experiment.source}: data.{job.dataset}.fraction: it leaves no images out, and self-training "
                    "learns from these; set it to 0.1, say, or leave the dataset out of the attacker's datasets"
                )
    audits = [job for job in jobs if job.stage == "audit"]
    processes = max((_sharing(experiment, job) for job in audits), default=1)
    roles: tuple[Role, ...] = ("source", "target")
    for job in {job.roles: job for job in audits}.values():
        for role in (one for one in roles if one == "source" or one in {*job.roles} & {*job.settings.modes}):
            parts, _ = groups(experiment, job, role)
            if (least := min(len(part) for part in parts if len(part))) < processes:
                raise RecipeError(
                    f"{experiment.source}: {job.title}: {processes} processes cannot share {counted(least, 'image')}; "
                    f"start {least} or fewer"
                )


def _sharing(experiment: Experiment, job: Job[Any]) -> int:
    """The processes of this start that share a job: one is enough for what is there already."""
    return 1 if (experiment.folder / job.path).exists() else int(os.environ.get("WORLD_SIZE", "1"))


def local_chunks(settings: Dispose, processes: int, title: str) -> int:
    """How many chunks a process has: all have as many, and of a batch without chunks an equal share; or RecipeError."""
    chunks = settings.unlearn.chunks
    key, count, how, what = "unlearn.chunks", chunks, "shared", "chunks"
    if chunks == 1:
        key, count, how, what = "batch_size", settings.batch_size, "shared equally", "it"
    if rest := count % processes:
        reason = f"cannot be {how} by {processes} processes (rest {rest}); make {what} a multiple of {processes}"
        raise RecipeError(f"{title}: {key} = {count} {reason}")
    return max(1, chunks // processes)


def equal_parts(experiment: Experiment, job: Job[Dispose], processes: int) -> dict[str, int]:
    """Images of a disposal's step by role; RecipeError where a chunk, or a process's share, has fewer than two."""
    images = {role: len(experiment.data.index(role)) for role in job.roles}
    whole, chunks, sizes = job.settings.batch_size, job.settings.unlearn.chunks, job.batches(images, processes)
    parts, kind = max(chunks, processes), "chunks" if chunks >= processes else "processes"
    for role, size in sizes.items():
        if size < 2 * parts:
            key = f"data.{role}.fraction" if images[role] < whole else f"dispose.{job.model}.batch_size"
            seen = counted(min(whole, images[role]), "image")
            raise RecipeError(
                f"{experiment.source}: dispose.{job.model}: a step has {seen} of data.{role}: no {parts} equal parts "
                f"of 2 or more, for as many {kind}; make {key} larger, or take fewer {kind}"
            )
    return sizes


def _images_for_a_price(experiment: Experiment, job: Job[Dispose], allowed: float) -> None:
    """Raise RecipeError without images; say where they are so few that the price on them is known but roughly."""
    count = len(experiment.data.held_back("target"))
    if not count:
        raise RecipeError(
            f"{experiment.source}: dispose.{job.model}.price: measured on target images that nothing trains on, and "
            "data.target.fraction leaves none out; set it to 0.8, or 0.5 where no class has more than two images, or "
            "give lambda instead"
        )
    if (half := resolution(count, EXPECTED)) > allowed:
        experiment.processes.say(
            f"{job.title}: the price is measured on {counted(count, 'target image')} held back, to about ± {half:.1f} "
            f"points, where {allowed:g} is allowed: to be safe lambda is kept lower, even near 0 "
            f"({images_for(allowed, EXPECTED):,} such images would be enough; else allow more, or give lambda)"
        )


def _images_for_a_loss(experiment: Experiment, job: Job[Dispose], size: int, processes: int) -> None:
    """size: images a step; of a source smaller than a batch there are fewer."""
    unlearn = job.settings.unlearn
    least, what = unlearn.least_images(processes)
    if remark := unlearn.remark(len(experiment.data.classes("target")), size):
        experiment.processes.say(f"{job.title}: {remark}")
    if size >= least:
        return
    key, remedy = f"dispose.{job.model}.batch_size", ""
    if size < job.settings.batch_size:
        key = "data.source.fraction"
        if experiment.recipe.data.source.fraction == 1:
            key = f"dispose.{job.model}.unlearn"
            remedy = f"; the source has no more: take another kind{unlearn.way_out}"
    raise RecipeError(
        f"{experiment.source}: {key}: too few for {unlearn.kind} with {counted(size, 'image')} a step; "
        f"{what} {least} or more{remedy}"
    )


def _images_to_hold_out(experiment: Experiment, job: Job[Piggyback]) -> None:
    data, role, fraction = experiment.data, job.dataset, experiment.recipe.data.of(job.dataset).fraction
    whole, test = (data.images(role, split).labels for split in ("train", "test"))
    own = whole[data.index(role)]

    def lacking(labels: np.ndarray) -> str:
        try:
            tuning.hold_out(labels, 0.5, 0)
        except DataError as error:
            return str(error)
        return ""

    by_own = job.settings.choose_on == "own"
    chosen, others, other = (own, test, "test") if by_own else (test, own, "own")
    if reason := lacking(chosen):
        where = f"data.{role}.fraction: {fraction:g}" if by_own else f"piggyback.choose_on: data.{role}.test"
        remedies = ["make it larger"] * (by_own and not lacking(whole))
        remedies += [f'write piggyback.choose_on = "{other}"'] * (not lacking(others))
        remedy = ", or ".join(remedies) or f"leave data.{role} out, or have no attackers"
        raise DataError(f"{experiment.source}: {where}: {reason}; {remedy}")
