"""What a disposal looks at as it runs: its price so far, what a quick probe gets from the source, and its λ."""

import math
from dataclasses import asdict
from typing import cast

import numpy as np
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dtlctl.attacks import features
from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batches
from dtlctl.errors import counted
from dtlctl.model.networks import Classifier
from dtlctl.objectives import balance
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.training.price import Price, images_to_tell, price, price_apart
from dtlctl.training.resume import State

LOOKED_AT, LOOKED_AT_BY_PROBE = 1000, 600
"""Images that the price on the way, and the probe, look at, at most; where the price steers, it is measured on all."""
PROBED_CLASSES = 10
"""Of the source, at most: so few images tell some classes apart, or a hundred not at all."""
STILL = 1.0
"""Points within which a number that does not move stays."""


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
