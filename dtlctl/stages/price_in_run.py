"""A disposal with a price: its λ on the way, and what it cost in the end, on target images that nothing trains on."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from dtlctl.data.tensors import Batches
from dtlctl.model.networks import Classifier
from dtlctl.objectives import balance
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Dispose
from dtlctl.run.experiment import Experiment
from dtlctl.training.price import images_for, price
from dtlctl.training.resume import State

LOOKED_AT = 1000
"""Images that the price on the way is measured on, at most; in the end it is measured on all of them."""


class PriceInRun:
    """Finds the λ of one disposal as it runs (`objectives.balance`); each check is a row of the history.

    state: where the training stands. What a check decides depends on its rows, the weights and the number of the step
    alone, so that a run that is taken up again decides the same.
    """

    def __init__(
        self, experiment: Experiment, job: Job[Dispose], disposal: Disposal, source: Batches, target: Batches | None,
        state: State,
    ):  # fmt: skip
        self.experiment, self.job, self.disposal, self.state = experiment, job, disposal, state
        assert job.settings.price is not None
        self.allowed = job.settings.price
        self.source, self.target = source, target
        self.length = job.settings.total_steps(source.images)
        self.steps = range(0, self.length, max(1, self.length // balance.CHECKS))
        self.rows = experiment.data.held_back("target")
        # Evenly taken, so that a few stand for all where the dataset is sorted by class.
        few = np.linspace(0, len(self.rows) - 1, min(LOOKED_AT, len(self.rows)))
        self.few = few.round().astype(int)
        self.before = self._right(disposal.teacher, self.rows)
        self.first = self._lam(0, balance.START)

    def lam(self) -> float:
        """λ of the next step."""
        return next((row["lambda"] for row in reversed(self.state.rows) if "lambda" in row), self.first)

    def check(self, step: int) -> dict[str, float]:
        """The price so far, and the ratio and λ from here on."""
        now = price(self.before[self.few], self._right(self.disposal.student, self.rows[self.few]))
        wanted = balance.aim(self.allowed, now.half_width)
        ratio = balance.ratio(self.state.rows, step / self.length, now.points, wanted)
        lam = self._lam(step, ratio) if step < self.length else self.lam()
        return {"price": now.points, "price_half_width": now.half_width, "ratio": ratio, "lambda": lam}

    def found(self) -> dict[str, float]:
        """Metrics of the finished disposal: its price with its 95 % interval, and the last λ."""
        cost = price(self.before, self._right(self.disposal.student, self.rows))
        kept = "within" if cost.high <= self.allowed else "above" if cost.low > self.allowed else "not told from"
        more = f" (about {images_for(self.allowed, cost.disagreement):,} would tell)" if kept[0] == "n" else ""
        self.experiment.processes.say(
            f"{self.job.title}: costs {cost.points:.1f} points [{cost.low:.1f}, {cost.high:.1f}] on {cost.images:,} "
            f"target images held back, {kept} the {self.allowed:g} allowed{more}"
        )
        found = asdict(cost)
        return {"price": found.pop("points"), **{f"price_{name}": value for name, value in found.items()},
                "lambda": self.lam()}  # fmt: skip

    def _lam(self, step: int, ratio: float) -> float:
        target = self.target[step] if self.target else None
        return balance.lam(self.state.rows, ratio, *self.disposal.norms(self.source[step], target))

    def _right(self, model: Classifier, rows: np.ndarray) -> np.ndarray:
        """bool [n]: which of these rows the model answers rightly."""
        batches = self.experiment.trainer.split("target", "train", rows)
        return self.experiment.engine.correct(model, "target", batches)
