"""theta_dtl = TRAIN(theta_tl, (1 - lambda) L_retain + lambda L_unlearn): dispose of the source (Eq. 1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dtlctl.console.progress import say
from dtlctl.data.tensors import Batch, Batches
from dtlctl.model.networks import Classifier, renew
from dtlctl.objectives import views
from dtlctl.objectives.step import Step, View
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.training.engine import Objective


def dispose(experiment: Experiment, job: Job[Dispose]) -> None:
    settings = job.settings
    chunks = data_demands.local_chunks(settings, experiment.engine.processes, job.title)
    # Collisions need each chunk's own batch statistics; one chunk means the statistics of the global batch.
    own_statistics = settings.unlearn.chunks > 1
    teacher = experiment.trainer.load_model("TL", global_batch_norm=not own_statistics).eval().requires_grad_(False)
    student = _student(experiment, job, teacher.classes, global_batch_norm=not own_statistics)
    source = _batches(experiment, "source", job)
    target = _batches(experiment, "target", job) if settings.retain.needs_target else None
    repair_from = round(settings.total_steps(source.images) * (1 - settings.repair))
    objective = _objective(experiment, settings, (student, teacher), (source, target), chunks, repair_from)
    measures = {"acc_s": ("source", "source"), "acc_t": ("target", "target")}
    before = _source_loss_of(experiment, teacher, source, chunks, settings.batch_norm)
    history, metrics = experiment.trainer.train(job, student, objective, source, measures, also=(repair_from,))
    metrics |= diagnose(history.rows, before)
    after = metrics.get("source_loss_unlearned", before)
    if settings.unlearn.kind == "gradient-collision" and after < before and experiment.engine.is_main:
        say(
            f"{job.title}: gradient collision lowered the source loss, from {before:.2f} in TL to {after:.2f}: "
            "gradients are small in the source minimum too, and the network slides back into it; "
            "try a larger lambda or lr"
        )
    experiment.results.publish(job, metrics, history, student)


def _student(
    experiment: Experiment, job: Job[Dispose], heads: dict[str, int], *, global_batch_norm: bool
) -> Classifier:
    """TL, TL with its last stages and heads drawn anew, or a new network."""
    settings = job.settings
    if not settings.new_heads:
        return experiment.trainer.load_model("TL", global_batch_norm=global_batch_norm)
    fresh = experiment.trainer.new_model(heads, "dispose/init", global_batch_norm=global_batch_norm)
    if settings.init == "fresh":
        return fresh
    student = experiment.trainer.load_model("TL", global_batch_norm=global_batch_norm)
    renew(student.backbone, fresh.backbone, settings.fresh_stages)
    student.heads.load_state_dict(fresh.heads.state_dict())
    return student


def diagnose(rows: list[dict[str, float]], before: float) -> dict[str, float]:
    """Where the unlearning loss took the source's cross-entropy, in nats: out of its minimum, or back into it.

    rows: the history, with `source_loss`; one of them ends where repair begins. before: TL's, taken in the same way.
    Its counterpart is the last row in which the unlearning loss was on; where it never was there is nothing to say.
    """
    driven = [row["source_loss"] for row in rows if "unlearn" in row]
    return {"source_loss_tl": before, "source_loss_unlearned": driven[-1]} if driven else {}


@torch.no_grad()
def _source_loss_of(
    experiment: Experiment, model: Classifier, batches: Batches, chunks: int, batch_norm: str, count: int = 8
) -> float:
    """Cross-entropy on the first batches, in a disposal's mode and in its chunks, as its first steps see it."""
    probe = copy.deepcopy(model)  # its running statistics may move
    _set_mode(probe, views.momenta(probe), batch_norm)
    found = [
        F.cross_entropy(probe(x, "source"), y)
        for batch in (batches[number] for number in range(count))
        for x, y in zip(batch.x.chunk(chunks), batch.y.chunk(chunks), strict=True)
    ]
    return float(experiment.engine.all_reduce([torch.stack(found).mean()])[0]) / experiment.engine.processes


def _objective(
    experiment: Experiment,
    settings: Dispose,
    models: tuple[Classifier, Classifier],
    data: tuple[Batches, Batches | None],
    chunks: int,
    repair_from: int,
) -> Objective:
    """Eq. 1 with the settings' two losses, the unlearning loss for `repair_from` steps; `chunks` of this process."""
    (student, teacher), (source, target) = models, data
    unlearn, retain, parameters = settings.unlearn, settings.retain, list(student.parameters())
    norms, memory = views.momenta(student), _memory(settings, student, source[0], chunks)
    images = len(experiment.data.images("source", "train").labels)

    @torch.no_grad()
    def answers(x: Tensor) -> Tensor:
        return teacher(x, "target")

    def objective(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        _set_mode(student, norms, settings.batch_norm)
        seen = views.look(student, source[number], chunks, norms, memory)
        step = Step(
            chunks=seen.chunks,
            target=views.apart(student, target[number], chunks, norms) if target else [],
            teacher=answers,
            parameters=parameters,
            images=images,
            seed=experiment.recipe.stream("dispose/labels"),
            processes=experiment.engine.processes,
            all_reduce=experiment.engine.all_reduce,
            tape=seen.tape,
            again=seen.again,
        )
        keep = retain.loss(step)
        parts = {
            "retain": keep.detach(),
            "source_loss": _source_loss(seen.chunks),
            "weight_norm": torch.nn.utils.get_total_norm([p.detach() for p in parameters]),
        }
        if number >= repair_from:
            return keep, parts
        drive, value = unlearn.loss(step)
        total = (1 - settings.lam) * keep + settings.lam * retain.guard(drive, keep, step)
        return total, {**parts, "unlearn": value}

    return objective


@torch.no_grad()
def _source_loss(chunks: Sequence[View]) -> Tensor:
    return torch.stack([F.cross_entropy(chunk.source, chunk.y) for chunk in chunks]).mean()


def _memory(settings: Dispose, student: Classifier, batch: Batch, chunks: int) -> views.Memory:
    """How the chunks' graphs are held; without collisions there is one chunk, and nothing to choose."""
    wanted = settings.unlearn.memory
    return views.choose(student, batch.x, chunks) if wanted == "auto" else wanted


def _batches(experiment: Experiment, role: str, job: Job[Dispose]) -> Batches:
    """Batches of equal chunks on equal processes; of a dataset smaller than a batch, as many images as divide."""
    return experiment.trainer.batches(
        role, data_demands.equal_parts(experiment, job, role, experiment.engine.processes), f"dispose/{role}"
    )


def _set_mode(student: Classifier, norms: views.Momenta, batch_norm: str) -> None:
    student.train()
    if batch_norm == "frozen":
        for norm, _ in norms:
            norm.eval()
