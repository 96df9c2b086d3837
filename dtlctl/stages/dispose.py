"""theta_dtl = TRAIN(theta, (1 - lambda) L_retain + lambda L_unlearn): dispose of the source (Eq. 1).

theta is a new network by default, theta_tl in the paper; TL answers for what is retained.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dtlctl.console.progress import say
from dtlctl.data.tensors import Batches
from dtlctl.errors import CheckpointError, DivergedError, RecipeError
from dtlctl.model.networks import Classifier, renew
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.stages.checks import Checks
from dtlctl.training.resume import State

if TYPE_CHECKING:
    from dtlctl.training.engine import History

PROBED = 8
"""Batches on which TL's source loss is measured before the disposal."""
LUCK = 5.0
"""Points: so far above the allowed price may be the draw's luck; what is dearer has another cause."""
TOLD_OF_A_DRAW = ("price", "price_low", "price_high", "acc_t", "source_probe", "lambda")
"""What a sidecar keeps of every draw, where there was more than one."""


def dispose(experiment: Experiment, job: Job[Dispose]) -> None:
    settings = job.settings
    if job.model == next(iter(experiment.recipe.dispose)):
        _say_what_there_is_to_keep(experiment)
    kept: tuple[dict[str, Any], History, Classifier] | None = None
    draws, seconds, tell = list[dict[str, Any]](), 0.0, experiment.processes.say
    while len(draws) < settings.most_draws and (kept is None or _bad_luck(settings, kept[0])):
        if kept:
            tell(f"{job.title}: draw {len(draws) + 1} of at most {settings.most_draws} begins; the cheapest is kept")
        began = time.perf_counter()
        try:
            metrics, history, student = _drawn(experiment, job, len(draws))
        except (DivergedError, RecipeError) as error:  # the latter: it misses `unlearn.cosine`, which another met
            if kept is None:
                raise
            seconds += time.perf_counter() - began
            draws.append({"failed": str(error)})
            continue
        seconds += history.seconds
        draws.append({name: metrics[name] for name in TOLD_OF_A_DRAW if name in metrics})
        if kept is None or metrics["price"] < kept[0]["price"]:
            kept = metrics, history, student
    assert kept
    metrics, history, student = kept
    if len(draws) > 1:
        metrics["draws"] = draws
        costs = ", ".join(f"{one['price']:.1f}" if "price" in one else "failed" for one in draws)
        tell(f"{job.title}: keeps the cheapest of {len(draws)} draws: {costs}")
    experiment.results.publish(job, metrics, replace(history, seconds=seconds), student)


def _bad_luck(settings: Dispose, metrics: dict[str, Any]) -> bool:
    """Whether another draw may cost less: this one is shown to be above the price, but not by far."""
    return settings.price is not None and 0 < metrics["price_low"] - settings.price <= LUCK


def _drawn(experiment: Experiment, job: Job[Dispose], draw: int) -> tuple[dict[str, Any], History, Classifier]:
    """One whole disposal: its metrics, its history and the network; other draws are independent of it."""
    settings, engine = job.settings, experiment.engine
    chunks = data_demands.local_chunks(settings, engine.processes, job.title)
    # Collisions need each chunk's own batch statistics; one chunk means the statistics of the global batch.
    how = {"global_batch_norm": settings.unlearn.chunks == 1}
    teacher = experiment.trainer.load_model("TL", **how).eval().requires_grad_(False)
    tag = f"dispose/{draw}" if draw else "dispose"
    student = _student(experiment, settings, teacher.outputs, tag, how)
    images, label_seed = experiment.data.images("source", "train").labels, experiment.recipe.stream(f"{tag}/labels")
    disposal = Disposal(
        settings.lam or 0.0, settings.unlearn, settings.retain, student, teacher, chunks=chunks,
        batch_norm=settings.batch_norm, images=len(images), label_seed=label_seed, processes=engine.processes,
        all_reduce=engine.all_reduce,
    )  # fmt: skip
    sizes = data_demands.equal_parts(experiment, job, engine.processes)
    batches = {role: experiment.trainer.batches(role, size, f"{tag}/{role}") for role, size in sizes.items()}
    source, target = batches["source"], batches.get("target")
    repair_from, state = round(settings.total_steps(source.images) * (1 - settings.repair)), State()
    checks = Checks(experiment, job, disposal, source, target, state)

    def objective(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        disposal.lam, disposal.number = checks.lam(), step
        checks.follow(student)
        return disposal(source[step], target[step] if target else None, step < repair_from)

    exactness = _exactness(experiment, job, disposal, source)
    before = disposal.source_loss_of_teacher(source[number] for number in range(PROBED))
    measures = {"acc_s": ("source", "source"), "acc_t": ("target", "target")}
    history, metrics = experiment.trainer.train(
        job, student, objective, source, measures, also={repair_from, *checks.steps}, state=state, check=checks.check,
        done=checks.settled, part=draw,
    )  # fmt: skip
    metrics |= diagnose(history.rows, before) | exactness | checks.found()
    after = metrics.get("source_loss_unlearned", before)
    if settings.unlearn.kind == "gradient-collision" and after < before:
        say(  # however quiet: nothing may have been disposed of
            f"{job.title}: gradient collision lowered the source loss, from {before:.2f} in TL to {after:.2f}: "
            "gradients are small in the source minimum too, and the network slides back into it; "
            f"try a larger {'price' if settings.price else 'lambda'} or lr"
        )
    return metrics, history, student


def _say_what_there_is_to_keep(experiment: Experiment) -> None:
    """Say it before the dearest stages where the source has brought nothing: then TGT is what to publish."""
    with suppress(CheckpointError):  # of a TGT that is not there
        kept, alone = (experiment.results.require(model)["metrics"]["acc_t"] for model in ("TL", "TGT"))
        if kept <= alone:
            experiment.processes.say(
                f"TL has {kept:.1f} % on the target and TGT, which never saw the source, {alone:.1f} %: the source has "
                "brought nothing that a disposal could keep; pre-train or fine-tune longer, or publish TGT"
            )


def _student(
    experiment: Experiment, settings: Dispose, heads: dict[str, int], tag: str, how: dict[str, bool]
) -> Classifier:
    """TL, TL with its last stages and heads drawn anew, or a new network."""
    if not settings.new_heads:
        return experiment.trainer.load_model("TL", **how)
    fresh = experiment.trainer.new_model(heads, f"{tag}/init", **how)
    if settings.init == "fresh":
        return fresh
    student = experiment.trainer.load_model("TL", **how)
    renew(student.backbone, fresh.backbone, settings.fresh_stages)
    student.heads.load_state_dict(fresh.heads.state_dict())
    return student


def _exactness(experiment: Experiment, job: Job[Dispose], disposal: Disposal, source: Batches) -> dict[str, float]:
    """How near the first batch's collision is to float64; RecipeError where the recipe's bound, if any, is missed."""
    if (bound := job.settings.unlearn.cosine) is None:
        return {}
    # Of every process's share of the batch: all of them must decide the same.
    found = min(experiment.engine.gather_objects([disposal.cosine_to_float64(source[0])]))
    if not found >= bound:
        raise RecipeError(
            f"{job.title}: the collision's gradient in {experiment.recipe.precision} has a cosine of {found:.4f} to "
            f"that in float64 on the first batch, below unlearn.cosine = {bound:g}\n"
            'set precision = "float32", or a lower bound if the result may differ that much'
        )
    return {"collision_cosine": found}


def diagnose(rows: list[dict[str, float]], before: float) -> dict[str, float]:
    """Where the unlearning loss took the source's cross-entropy, in nats: out of its minimum, or back into it.

    rows: the history, one of which ends where repair begins. before: TL's, taken in the same way. Its counterpart is
    the last row in which the unlearning loss was on.
    """
    driven = [row["source_loss"] for row in rows if "unlearn" in row]
    return {"source_loss_tl": before, "source_loss_unlearned": driven[-1]} if driven else {}
