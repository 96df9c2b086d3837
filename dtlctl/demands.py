"""What a recipe demands of its network and its data, looked at before anything trains."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from dtlctl import models
from dtlctl.attacks import tuning
from dtlctl.errors import DataError, RecipeError
from dtlctl.objectives.batched import batchable
from dtlctl.objectives.unlearn import NullSpace

if TYPE_CHECKING:
    from dtlctl.experiment import Experiment
    from dtlctl.plan import Job
    from dtlctl.recipe import Dispose, Model, Piggyback, Recipe


def of_network(recipe: Recipe, source: str) -> None:
    """Raise RecipeError where the network lacks stages or layers that a variant or an attacker needs.

    source: the recipe's file, for the message, which names the first mistake in full and the others by their keys.
    """
    found = [*_of_variants(recipe), *_of_attackers(recipe)]
    if found:
        others = ", ".join(place for place, _ in found[1:])
        raise RecipeError(f"{source}: {found[0][0]}: {found[0][1]}" + (f"\nalso wrong: {others}" if others else ""))


def of_data(lab: Experiment, jobs: Iterable[Job[Any]]) -> None:
    """Raise RecipeError or DataError where a job's data has too many classes, or too few images, for its settings.

    And RecipeError where a disposal that is not there yet cannot be shared by the processes of this start. Reads data
    for those jobs alone that demand something of it.
    """
    for job in jobs:
        if job.stage == "dispose":
            # What is there need not be shared by the processes of this start.
            processes = 1 if (lab.folder / job.path).exists() else int(os.environ.get("WORLD_SIZE", "1"))
            local_chunks(job.settings, processes, f"{lab.source}: {job.title}")
            for role in ("source", "target") if job.settings.retain.needs_target else ("source",):
                equal_parts(lab, job, role, processes)
        if job.stage == "dispose" and isinstance(job.settings.unlearn, NullSpace):
            _batch_for_null_space(lab, job)
        if job.stage == "piggyback" and job.settings.attackers:
            _images_to_hold_out(lab, job)


def local_chunks(settings: Dispose, processes: int, title: str) -> int:
    """How many chunks a process has: all have as many, and of a batch without chunks an equal share.

    Raises RecipeError where that cannot be.
    """
    chunks = settings.unlearn.chunks
    if chunks == 1 and settings.batch_size % processes:
        size, rest = settings.batch_size, settings.batch_size % processes
        raise RecipeError(
            f"{title}: batch_size = {size} cannot be shared equally by {processes} processes (rest {rest})"
            f"; make it a multiple of {processes}"
        )
    if chunks > 1 and chunks % processes:
        raise RecipeError(
            f"{title}: unlearn.chunks = {chunks} cannot be shared by {processes} processes (rest {chunks % processes})"
            f"; make chunks a multiple of {processes}"
        )
    return max(1, chunks // processes)


def equal_parts(lab: Experiment, job: Job[Dispose], role: str, processes: int) -> int:
    """Images of a step of a disposal on the role's data: equal chunks on equal processes, of a small dataset fewer.

    Raises RecipeError where a chunk, or a process's share, has fewer than two.
    """
    images, size, chunks = len(lab.index(role)), job.settings.batch_size, job.settings.unlearn.chunks
    parts = max(chunks, processes)
    if min(size, images) >= 2 * parts:
        return min(size, images) // parts * parts
    key = f"data.{role}.fraction" if images < size else f"dispose.{job.model}.batch_size"
    kind = "chunks" if chunks >= processes else "processes"
    raise RecipeError(
        f"{lab.source}: dispose.{job.model}: {min(size, images)} images of data.{role} a step make no {parts} equal "
        f"parts of 2 or more, for as many {kind}; make {key} larger, or take fewer {kind}"
    )


def _batch_for_null_space(lab: Experiment, job: Job[Dispose]) -> None:
    classes, size = len(lab.classes("target")), job.settings.batch_size
    if size < (least := NullSpace.least_images(classes)):
        raise RecipeError(
            f"{lab.source}: dispose.{job.model}.batch_size: {size} images a step are too few for null-space; "
            f"{classes} target classes need {least} or more"
        )


def _images_to_hold_out(lab: Experiment, job: Job[Piggyback]) -> None:
    fraction = lab.dataset(job.dataset).fraction
    if job.settings.choose_on == "test":
        labels, share = lab.images(job.dataset, "test").labels, 0.5
        where, remedy = "piggyback.choose_on", f'the test split of data.{job.dataset} is too small; write "own"'
    else:
        labels, share = lab.images(job.dataset, "train").labels[lab.index(job.dataset)], job.settings.held_out
        where = f"data.{job.dataset}.fraction: {fraction:g}"
        remedy = "make it larger" if fraction < 1 else "leave it out of the attackers' datasets"
    try:
        tuning.hold_out(labels, share, 0)
    except DataError as error:
        raise DataError(f"{lab.source}: {where}: {error}; {remedy}") from None


def _of_variants(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) of every variant that asks for more stages than there are, or for one pass that cannot be."""
    for name, settings in recipe.dispose.items():
        if settings.unlearn.memory == "batched" and not batchable(_backbone(recipe.model)):
            reason = f"{recipe.model.arch} has other layers than convolutions, linear layers and batch norms"
            yield f"dispose.{name}.unlearn.memory", f'"batched": {reason}; write "auto", "keep" or "recompute"'
        asked = {"fresh_stages": settings.fresh_stages}
        if isinstance(settings.unlearn, NullSpace):
            asked["unlearn.stages"] = settings.unlearn.stages
        for key, count in asked.items():
            if count and count > (known := len(models.stages(_backbone(recipe.model)))):
                reason = f"{count}, but {recipe.model.arch} has {known} stages; write {known} or less"
                if not known:
                    reason = f"the stages of {recipe.model.arch} are not known; choose another network or variant"
                yield f"dispose.{name}.{key}", reason


def _of_attackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, reason) of every attacker who cannot prepare this network."""
    for number, attacker in enumerate(recipe.piggyback.attackers):
        lacking = ""
        if attacker.kind == "last-block" and not models.stages(_backbone(recipe.model)):
            lacking = "a known last stage"
        if "renorm" in attacker.kind and not any(map(_is_batch_norm, _backbone(recipe.model).modules())):
            lacking = "batch normalisation"
        if lacking:
            reason = f'kind "{attacker.kind}" needs {lacking}, which {recipe.model.arch} does not have; leave it out'
            yield f"piggyback.attackers.{number}", reason


def _backbone(spec: Model) -> nn.Module:
    """Built only if something is demanded of it: most recipes need not wait for it."""
    return models.outline(spec.arch, spec.stem, spec.width, spec.image_size).backbone


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
