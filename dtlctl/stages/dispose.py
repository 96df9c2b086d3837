"""theta_dtl = TRAIN(theta_tl, (1 - lambda) L_retain + lambda L_unlearn): dispose of the source (Eq. 1)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.console.progress import say
from dtlctl.data.tensors import Batch, Batches
from dtlctl.errors import RecipeError
from dtlctl.model.networks import Classifier, renew
from dtlctl.objectives import forward
from dtlctl.objectives.step import ChunkOutputs, Step
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.training.engine import Objective


def dispose(lab: Experiment, job: Job[Dispose]) -> None:
    settings = job.settings
    chunks = data_demands.local_chunks(settings, lab.engine.processes, job.title)
    # Collisions need each chunk's own batch statistics; one chunk means the statistics of the global batch.
    own_statistics = settings.unlearn.chunks > 1
    teacher = lab.load_model("TL", global_batch_norm=not own_statistics).eval().requires_grad_(False)
    student = _student(lab, job, teacher.classes, global_batch_norm=not own_statistics)
    source = _batches(lab, "source", job)
    target = _batches(lab, "target", job) if settings.retain.needs_target else None
    repair_from = round(settings.total_steps(source.images) * (1 - settings.repair))
    exactness = _exactness(lab, job, student, source, chunks)
    objective = _objective(lab, settings, (student, teacher), (source, target), chunks, repair_from)
    measures = {"acc_s": ("source", "source"), "acc_t": ("target", "target")}
    before = _source_loss_of(lab, teacher, source, chunks, settings.batch_norm)
    history, metrics = lab.train(job, student, objective, source, measures, also=(repair_from,))
    metrics |= diagnose(history.rows, before) | exactness
    after = metrics.get("source_loss_unlearned", before)
    if settings.unlearn.kind == "gradient-collision" and after < before and lab.engine.is_main:
        say(
            f"{job.title}: gradient collision lowered the source loss, from {before:.2f} in TL to {after:.2f}: "
            "gradients are small in the source minimum too, and the network slides back into it; "
            "try a larger lambda or lr"
        )
    lab.publish(job, metrics, history, student)


def _student(lab: Experiment, job: Job[Dispose], heads: dict[str, int], *, global_batch_norm: bool) -> Classifier:
    """TL, TL with its last stages and heads drawn anew, or a new network."""
    settings = job.settings
    if not settings.new_heads:
        return lab.load_model("TL", global_batch_norm=global_batch_norm)
    fresh = lab.new_model(heads, "dispose/init", global_batch_norm=global_batch_norm)
    if settings.init == "fresh":
        return fresh
    student = lab.load_model("TL", global_batch_norm=global_batch_norm)
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
    lab: Experiment, model: Classifier, batches: Batches, chunks: int, batch_norm: str, count: int = 8
) -> float:
    """Cross-entropy on the first batches, in a disposal's mode and in its chunks, as its first steps see it."""
    probe = copy.deepcopy(model)  # its running statistics may move
    _set_mode(probe, batch_norm)
    found = [
        F.cross_entropy(probe(x, "source"), y)
        for batch in (batches[number] for number in range(count))
        for x, y in zip(batch.x.chunk(chunks), batch.y.chunk(chunks), strict=True)
    ]
    return float(lab.engine.all_reduce([torch.stack(found).mean()])[0]) / lab.engine.processes


def _objective(
    lab: Experiment,
    settings: Dispose,
    models: tuple[Classifier, Classifier],
    data: tuple[Batches, Batches | None],
    chunks: int,
    repair_from: int,
) -> Objective:
    """Eq. 1 with the settings' two losses, the unlearning loss for `repair_from` steps; `chunks` of this process."""
    (student, teacher), (source, target) = models, data
    unlearn, retain, parameters = settings.unlearn, settings.retain, list(student.parameters())
    mode, maps = _graph_mode(settings, student, source[0], chunks), unlearn.kind == "null-space"
    images = len(lab.images("source", "train").labels)

    @torch.no_grad()
    def answers(x: Tensor) -> Tensor:
        return teacher(x, "target")

    def objective(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        _set_mode(student, settings.batch_norm)
        seen, tape, again = forward.outputs(student, source[number], chunks, mode, maps=maps)
        step = Step(
            chunks=seen,
            target=forward.apart(student, target[number], chunks) if target else [],
            teacher=answers,
            parameters=parameters,
            images=images,
            seed=lab.seed("dispose/labels"),
            processes=lab.engine.processes,
            all_reduce=lab.engine.all_reduce,
            tape=tape,
            again=again,
        )
        keep = retain.loss(step)
        parts = {
            "retain": keep.detach(),
            "source_loss": _source_loss(seen),
            "weight_norm": torch.nn.utils.get_total_norm([p.detach() for p in parameters]),
        }
        if number >= repair_from:
            return keep, parts
        drive, value = unlearn.loss(step)
        total = (1 - settings.lam) * keep + settings.lam * retain.guard(drive, keep, step)
        return total, {**parts, "unlearn": value}

    return objective


@torch.no_grad()
def _source_loss(chunks: Sequence[ChunkOutputs]) -> Tensor:
    return torch.stack([F.cross_entropy(chunk.source, chunk.y) for chunk in chunks]).mean()


def _exactness(
    lab: Experiment, job: Job[Dispose], student: Classifier, source: Batches, chunks: int
) -> dict[str, float]:
    """How near the first batch's collision is to float64, where the recipe sets a bound; else nothing.

    Raises RecipeError where it does not hold.
    """
    settings, bound = job.settings, job.settings.unlearn.cosine
    if bound is None:
        return {}
    _set_mode(student, settings.batch_norm)
    engine, mode = lab.engine, _graph_mode(settings, student, source[0], chunks)
    make = partial(
        Step, target=(), teacher=torch.zeros_like, images=source.images, seed=0,
        processes=engine.processes, all_reduce=engine.all_reduce,
    )  # fmt: skip
    found = forward.cosine_to_float64(student, source[0], chunks, mode, settings.unlearn.loss, make)
    if not found >= bound:
        raise RecipeError(
            f"{job.title}: the collision's gradient in {lab.recipe.precision} has a cosine of {found:.4f} to that in "
            f"float64 on the first batch, below unlearn.cosine = {bound:g}\n"
            'set precision = "float32", or a lower bound if the result may differ that much'
        )
    return {"collision_cosine": found}


def _graph_mode(settings: Dispose, student: Classifier, batch: Batch, chunks: int) -> forward.GraphMode:
    """How the chunks' graphs are held; without collisions there is one chunk, and nothing to choose."""
    wanted = settings.unlearn.memory
    return forward.choose(student, batch.x, chunks) if wanted == "auto" else wanted


def _batches(lab: Experiment, role: str, job: Job[Dispose]) -> Batches:
    """Batches of equal chunks on equal processes; of a dataset smaller than a batch, as many images as divide."""
    return lab.batches(role, data_demands.equal_parts(lab, job, role, lab.engine.processes), f"dispose/{role}")


def _set_mode(student: Classifier, batch_norm: str) -> None:
    student.train()
    if batch_norm == "frozen":
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
