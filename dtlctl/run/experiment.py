"""One run of a recipe: its datasets, its results and its trainer, put together."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtlctl.errors import RecipeError
from dtlctl.recipe import network_demands
from dtlctl.recipe.plan import Job, jobs
from dtlctl.recipe.schema import Recipe
from dtlctl.run.datasets import Datasets
from dtlctl.run.processes import Processes
from dtlctl.run.results import Results
from dtlctl.run.trainer import Trainer

if TYPE_CHECKING:
    from dtlctl.training.engine import Engine


class Experiment:
    """What a stage needs besides its own settings. Data and the engine are loaded when first asked for.

    source: the recipe's file, words: what followed it on the command line; for messages. Raises RecipeError.
    """

    def __init__(
        self, recipe: Recipe, out: Path, *, source: str = "RECIPE", words: Sequence[str] = (), quiet: bool = False
    ):
        self.recipe, self.source, self.words, self.quiet = recipe, source, words, quiet
        network_demands.check(recipe, source)
        self.jobs = jobs(recipe)
        self.folder = out / recipe.name
        self.processes = Processes(self.folder, recipe.precision, recipe.track.trackers, quiet)
        self.data = Datasets(recipe, self.processes)
        self.results = Results(self.folder, recipe, self.jobs, self.data, self.processes, self.command)
        self.trainer = Trainer(recipe, self.data, self.results, self.processes)

    def command(self, stage: str) -> str:
        return shlex.join(["dtlctl", stage, self.source, *self.words])

    @property
    def engine(self) -> Engine:
        return self.processes.engine

    def chosen(self, stages: Collection[str], only: Collection[str] = ()) -> list[Job[Any]]:
        """The jobs of these stages, of some models only if any are named. Raises RecipeError for an unknown one."""
        found = [job for job in self.jobs if job.stage in stages]
        known = dict.fromkeys(job.model for job in found)
        for model in only:
            if model not in known:
                has = ", ".join(known) or "nothing"
                raise RecipeError(f"--only {model}: {self.source} has none here (it has {has})")
        return [job for job in found if not only or job.model in only]
