"""theta_dtl = TRAIN(theta, (1 - lambda) L_retain + lambda L_unlearn): dispose of the source (Eq. 1).

theta is a new network by default, theta_tl in the paper; TL answers for what is retained.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dtlctl.attacks import features
from dtlctl.console.progress import say
from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batches
from dtlctl.errors import CheckpointError, DivergedError, RecipeError, counted
from dtlctl.model.networks import Classifier, renew
from dtlctl.objectives import balance
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.training.price import Price, images_to_tell, price, price_apart
from dtlctl.training.resume import State

if TYPE_CHECKING:
    from dtlctl.training.engine import History

PROBED = 8
"""Batches on which TL's source loss is measured before the disposal."""
LOOKED_AT, LOOKED_AT_BY_PROBE = 1000, 600
"""Images that the price on the way, and the probe, look at, at most; where the price steers, it is measured on all."""
PROBED_CLASSES = 10
"""Of the source, at most: so few images tell some classes apart, or a hundred not at all."""
LUCK = 5.0
"""Points: so far above the allowed price may be the draw's luck; what is dearer has another cause."""
TOLD_OF_A_DRAW = ("price", "price_low", "price_high", "acc_t", "source_probe", "lambda")
"""What a sidecar keeps of every draw, where there was more than one."""
STILL = 1.0
"""Points within which a number that does not move stays."""


def dispose(experiment: Experiment, job: Job[Dispose]) -> None:
    settings = job.settings
    if job.model == next(iter(experiment.recipe.dispose)):
        _say_what_there_is_to_keep(experiment)
    kept: tuple[dict[str, Any], History, Classifier] | None = None
    draws, seconds, tell = list[dict[str, Any]](), 0.0, experiment.processes.say
    while len(draws) < settings.most_draws and (kept is None or _bad_luck(settings, kept[0])):
        if kept:
            tell(f"{job.title}: draw {len(draws) + 1} of at most {settings.most_draws} begins; the cheapest is kept")
        try:
            metrics, history, student = _drawn(experiment, job, len(draws))
        except DivergedError as error:
            if kept is None:
                raise
            draws.append({"diverged": str(error)})
            continue
        seconds += history.seconds
        draws.append({name: metrics[name] for name in TOLD_OF_A_DRAW if name in metrics})
        if kept is None or metrics["price"] < kept[0]["price"]:
            kept = metrics, history, student
    assert kept
    metrics, history, student = kept
    if len(draws) > 1:
        metrics["draws"] = draws
        costs = ", ".join(f"{one['price']:.1f}" if "price" in one else "diverged" for one in draws)
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
        disposal.lam = checks.lam()
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
    found = disposal.cosine_to_float64(source[0])
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


class Checks:
    """Looks at one disposal as it runs, and finds its λ (`objectives.balance`) where the recipe gives a price.

    state: where the training stands: a check depends on its rows, the weights and the step alone, so that a run that is
    taken up again decides the same. The price is measured on target images held back for it, which a TL from outside
    may have learned: then TL is measured on the test images. Where λ is given, it is on test images, and, as by the
    probe, on at most a quarter of the images trained on since the last check, or 100.
    """

    def __init__(
        self, experiment: Experiment, job: Job[Dispose], disposal: Disposal, source: Batches, target: Batches | None,
        state: State,
    ):  # fmt: skip
        self.experiment, self.job, self.disposal, self.state = experiment, job, disposal, state
        self.allowed = job.settings.price
        self.source, self.target = source, target
        self.length = job.settings.total_steps(source.images)
        every = max(balance.APART, self.length // balance.CHECKS)
        self.averaged: AveragedModel | None = None
        if job.settings.schedule != "constant":  # else nothing will give back what the last weights lack
            average = get_ema_multi_avg_fn(1 - 1 / max(5.0, balance.AVERAGED * self.length))
            self.averaged = state.beside = AveragedModel(disposal.student, multi_avg_fn=average, use_buffers=True)
        self.steps = range(0, self.length, every)
        most = max(100, every * source.batch_size // 4)
        labels = experiment.data.images("source", "test").labels
        own = np.flatnonzero(np.isin(labels, _evenly(int(labels.max()) + 1, PROBED_CLASSES)))
        self.probed = own[_evenly(len(own), min(LOOKED_AT_BY_PROBE, most))]
        self.split: Split = "train" if self.allowed else "test"
        tested = len(experiment.data.images("target", "test").labels)
        self.rows = experiment.data.held_back("target") if self.allowed else _evenly(tested, min(LOOKED_AT, most))
        self.few = _evenly(len(self.rows), LOOKED_AT)
        self.apart = bool(self.allowed) and experiment.recipe.finetune.weights is not None
        self.right = experiment.trainer.right
        seen: tuple[Split, np.ndarray | None] = ("test", None) if self.apart else (self.split, self.rows)
        self.before = self.right(disposal.teacher, "target", *seen)
        self.probe_of_tl = self._probe(disposal.teacher)
        self.first = self._lam(0, balance.START) if self.allowed else disposal.lam

    def follow(self, student: Classifier) -> None:
        """Take the weights before a step into the mean whose price is measured on the way."""
        if self.averaged:
            self.averaged.update_parameters(student)

    def lam(self) -> float:
        """λ of the next step."""
        return next((row["lambda"] for row in reversed(self.state.rows) if "lambda" in row), self.first)

    def check(self, step: int) -> dict[str, float]:
        """The price so far, of the mean of the last weights, the probe's accuracy in %, and λ from here on."""
        few = slice(None) if step >= balance.ON_ALL * self.length else self.few
        on_its_way = self.averaged if step < self.length else None
        now = self._price(cast(Classifier, on_its_way.module) if on_its_way else self.disposal.student, few)
        probe = self._probe(self.disposal.student)
        row = {"price": now.points, "price_half_width": now.half_width, "source_probe": probe}
        if not self.allowed:
            return {**row, "lambda": self.disposal.lam}
        wanted = balance.aim(self.allowed, now.half_width * math.sqrt(now.images / len(self.rows)))  # of all images
        ratio = balance.ratio(self.state.rows, step / self.length, now.points, wanted, 100 * self.before.mean())
        lam = self._lam(step, ratio) if step < self.length else self.lam()
        return {**row, "ratio": ratio, "lambda": lam}

    def settled(self) -> bool:
        """Whether the recipe lets it end here: at its last `settle` checks neither number moved."""
        wanted, step = self.job.settings.settle, self.state.step
        looks = [row for row in self.state.rows if "source_probe" in row][-(wanted or 0) - 1 :]
        early = self.allowed is not None and step < balance.ON_ALL * self.length
        if wanted is None or early or len(looks) <= wanted or looks[-1]["step"] != step:
            return False
        columns = ([row[name] for row in looks] for name in ("price", "source_probe"))
        # Processes may round a probe differently; they must end together.
        return bool(self.experiment.engine.agree(all(max(seen) - min(seen) <= STILL for seen in columns)))

    def found(self) -> dict[str, float]:
        """Metrics of the finished disposal: the probe, its price with its 95 % interval, and the last λ."""
        metrics = {"source_probe_tl": self.probe_of_tl, "source_probe": self._probe(self.disposal.student)}
        if not self.allowed:
            return metrics
        cost = self._price(self.disposal.student, slice(None))
        kept, more = "within" if cost.high <= self.allowed else "above", ""
        if cost.low <= self.allowed < cost.high:
            enough = images_to_tell(cost, self.allowed)
            kept, more = "not told from", f" (about {enough:,} would tell)" if enough else ""
        elif kept == "above":
            more = "; more epochs may cost less"
        where = f"{counted(cost.images, 'target image')} held back" + ", TL on the test images" * self.apart
        self.experiment.processes.say(
            f"{self.job.title}: costs {cost.points:.1f} points [{cost.low:.1f}, {cost.high:.1f}] on {where}, {kept} "
            f"the {self.allowed:g} allowed{more}"
        )
        metrics["price"] = cost.points
        metrics |= {f"price_{name}": value for name, value in asdict(cost).items() if name != "points"}
        return {**metrics, "lambda": self.lam()}

    def _lam(self, step: int, ratio: float) -> float:
        target = self.target[step] if self.target else None
        return balance.lam(self.state.rows, ratio, *self.disposal.norms(self.source[step], target))

    def _price(self, model: Classifier, few: np.ndarray | slice) -> Price:
        """What going from TL to this model costs, by these of the rows."""
        after = self.right(model, "target", self.split, self.rows[few])
        return price_apart(self.before, after) if self.apart else price(self.before[few], after)

    def _probe(self, model: Classifier) -> float:
        """Accuracy in % of least squares on the means of all stages' maps, fitted on one half of the images."""
        labels, training = self.experiment.data.images("source", "test").labels[self.probed], model.training
        batches = self.experiment.trainer.whole("source", "test", self.probed)
        seen = features.read(model.eval(), (batch.x for batch in batches))
        model.train(training)
        return features.least_squares(np.concatenate([*seen.values()], 1), labels)


def _evenly(images: int, most: int) -> np.ndarray:
    """Places of at most so many images, evenly taken, so that a few stand for all of a dataset sorted by class."""
    return np.linspace(0, images - 1, min(most, images)).round().astype(int)
