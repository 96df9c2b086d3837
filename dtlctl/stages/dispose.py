"""theta_dtl = TRAIN(theta_tl, (1 - lambda) L_retain + lambda L_unlearn): dispose of the source (Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.data.tensors import Batch, Batches, Share
from dtlctl.engine import Objective
from dtlctl.errors import RecipeError
from dtlctl.experiment import Experiment
from dtlctl.models import Classifier
from dtlctl.objectives.step import Step, View
from dtlctl.plan import Job
from dtlctl.recipe import Dispose

Momenta = list[tuple[nn.BatchNorm2d, float]]
"""Every batch normalisation with the momentum it was built with."""


def dispose(lab: Experiment, job: Job[Dispose]) -> None:
    settings = job.settings
    chunks = _local_chunks(settings, lab.engine.processes, job.title)
    teacher = lab.load_model("TL").eval().requires_grad_(False)
    # Collisions need each chunk's own batch statistics; one chunk means the statistics of the global batch.
    own_statistics = settings.unlearn.chunks > 1
    if settings.init == "TL":
        student = lab.load_model("TL", global_batch_norm=not own_statistics)
    else:
        student = lab.new_model(teacher.classes, "dispose/init", global_batch_norm=not own_statistics)
    source = _batches(lab, "source", settings)
    target = _batches(lab, "target", settings) if settings.retain.needs_target else None
    objective = _objective(lab, settings, (student, teacher), (source, target), chunks)
    measures = {"acc_s": ("source", "source"), "acc_t": ("target", "target")}
    history, metrics = lab.train(job, student, objective, source, measures)
    lab.publish(job, metrics, history, student)


def _objective(
    lab: Experiment,
    settings: Dispose,
    models: tuple[Classifier, Classifier],
    data: tuple[Batches, Batches | None],
    chunks: int,
) -> Objective:
    """Eq. 1 with the settings' two losses; `chunks` is this process's number of them."""
    (student, teacher), (source, target) = models, data
    unlearn, retain, parameters = settings.unlearn, settings.retain, list(student.parameters())
    momenta = [(m, m.momentum) for m in student.modules() if isinstance(m, nn.BatchNorm2d) and m.momentum is not None]
    repair_from = round(settings.total_steps(source.images) * (1 - settings.repair))
    images = len(lab.images("source", "train").labels)

    @torch.no_grad()
    def answers(x: Tensor) -> Tensor:
        return teacher(x, "target")

    def objective(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        _set_mode(student, momenta, settings.batch_norm)
        step = Step(
            chunks=_views(student, source[number], chunks, momenta),
            target=_views(student, target[number], chunks, momenta) if target else [],
            teacher=answers,
            parameters=parameters,
            images=images,
            seed=lab.seed("dispose/labels"),
            processes=lab.engine.processes,
            all_reduce=lab.engine.all_reduce,
        )
        keep = retain.loss(step)
        if number >= repair_from:
            return keep, {"retain": keep.detach()}
        drive, value = unlearn.loss(step)
        total = (1 - settings.lam) * keep + settings.lam * retain.guard(drive, keep, step)
        return total, {"retain": keep.detach(), "unlearn": value}

    return objective


def _local_chunks(settings: Dispose, processes: int, title: str) -> int:
    chunks = settings.unlearn.chunks
    if chunks > 1 and chunks % processes:
        raise RecipeError(
            f"{title}: unlearn.chunks = {chunks} cannot be shared by {processes} processes (rest {chunks % processes})"
            f"; make chunks a multiple of {processes}"
        )
    return max(1, chunks // processes)


def _batches(lab: Experiment, role: str, settings: Dispose) -> Batches:
    """Batches of equal chunks on equal processes: of a dataset smaller than a batch, as many images as divide."""
    images, parts = len(lab.index(role)), max(settings.unlearn.chunks, lab.engine.processes)
    size = min(settings.batch_size, images) // parts * parts
    if size < 2 * parts:
        raise RecipeError(
            f"data.{role}: {images} images make no {parts} equal parts (chunks or processes) of 2 or more"
        )
    return lab.batches(role, size, f"dispose/{role}")


def _views(student: Classifier, batch: Batch, chunks: int, momenta: Momenta) -> list[View]:
    """The student's answers chunk by chunk, so that batch statistics are each chunk's own."""
    views = []
    for number in range(chunks):
        share = Share(number, chunks)
        x, y, rows = share.of(batch.x), share.of(batch.y), share.of(batch.rows)
        _weigh_running_statistics(momenta, number, chunks)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            features = student.embed(x)
        views.append(View(x, y, rows, student.heads["source"](features), student.heads["target"](features)))
    return views


def _weigh_running_statistics(momenta: Momenta, number: int, chunks: int) -> None:
    """Make a sequence of chunks move the running statistics as their average would.

    With momentum a_k = (m/c) / (1 - (c-k) m/c) for chunk k of c, each chunk weighs m/c in the end; averaged
    over processes after the step, it does not matter how many processes share the chunks.
    """
    for norm, momentum in momenta:
        norm.momentum = (momentum / chunks) / (1 - (chunks - 1 - number) * momentum / chunks)


def _set_mode(student: Classifier, momenta: Momenta, batch_norm: str) -> None:
    student.train()
    if batch_norm == "frozen":
        for norm, _ in momenta:
            norm.eval()
