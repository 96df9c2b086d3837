"""`dtlctl sweep`: a recipe over a grid of changes, each point a run of its own, common parents made once."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dtlctl.console.machine import cores
from dtlctl.console.progress import say
from dtlctl.errors import CheckpointError, DataError, DivergedError, DtlError, RecipeError, suggest
from dtlctl.recipe.loading import load, parse_value
from dtlctl.recipe.plan import STAGES, Job, Stage
from dtlctl.run.earlier import Earlier, relatives
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands, runner
from dtlctl.storage import checkpoint


@dataclass(frozen=True)
class Point:
    """One choice for every swept key."""

    values: dict[str, Any]
    hashed: bool = False
    """Whether its name has a part of its hash, because another point of the grid would have the same name."""

    @property
    def name(self) -> str:
        """The point as a folder's name, such as `gc.lambda-0.05`; long ones end in a part of their hash too."""
        text = "_".join(f"{key.removeprefix('dispose.')}-{value}" for key, value in self.values.items())
        plain = re.sub(r"[^A-Za-z0-9._-]+", "", text.replace("*", "all")).strip("._-")
        return plain if 0 < len(plain) <= 64 and not self.hashed else f"{plain[:48]}-{checkpoint.key(self.values)[:8]}"

    def overrides(self, lambdas: Mapping[str, float]) -> list[str]:
        """As `--set` would have them. lambdas: the recipe's λ of every variant with an unlearning loss.

        `dispose.*.KEY` is KEY of all these variants. `dispose.NAME.odds` is no key of the recipe, but a factor: λ is
        set to where λ / (1 − λ), the weight of the unlearning loss over the retaining loss's in Eq. 1, is that many
        times the recipe's.
        """
        return [
            _override(one, value, lambdas)
            for key, value in self.values.items()
            for one in ([key.replace("*", _quoted(n), 1) for n in lambdas] if key.startswith("dispose.*.") else [key])
        ]


def names_in(key: str) -> list[str]:
    """The names in a dotted key, without the quotes that one with a dot has."""
    return [name.strip("\"'") for name in re.findall(r"\"[^\"]*\"|'[^']*'|[^.]+", key)]


def _quoted(name: str) -> str:
    return f'"{name}"' if "." in name else name


def _override(key: str, value: Any, lambdas: Mapping[str, float]) -> str:
    names = names_in(key)
    if len(names) != 3 or (names[0], names[2]) != ("dispose", "odds"):
        return f"{key}={json.dumps(value, ensure_ascii=False)}"
    # An integer may be larger than any float, and still below infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise RecipeError(f"--over {key}: {value!r:.40} is no factor of the odds of lambda; give numbers above 0")
    if (lam := lambdas.get(names[1])) is None:
        raise RecipeError(f"--over {key}: {names[1]} has no unlearning loss" + suggest(names[1], [*lambdas]))
    return f"dispose.{_quoted(names[1])}.lambda={value * lam / (1 - lam + value * lam):g}"


def points(over: Sequence[str]) -> list[Point]:
    """The grid of `key=a,b,c` texts, in order. Raises RecipeError for a text that is not of this form."""
    axes: dict[str, list[Any]] = {}
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise RecipeError(f"--over {text}: write key.path=a,b,c, for example --over dispose.gc.lambda=0.1,0.5")
        if key.strip() in axes or key.strip() == "name":
            raise RecipeError(f"--over {text}: {key.strip()} cannot be swept here (given twice, or the run's name)")
        axes[key.strip()] = parse_value(values)
    grid = [Point(dict(zip(axes, choice, strict=True))) for choice in itertools.product(*axes.values())]
    taken = Counter(point.name for point in grid)
    return [replace(point, hashed=taken[point.name] > 1) for point in grid]


def run(
    recipe: Path, over: Sequence[str], overrides: Sequence[str], out: Path, *, jobs: int = 1, quiet: bool = False
) -> list[tuple[Point, Experiment]]:
    """Do all points' stages under OUT/<name>-sweep; what is up to date there or in OUT/<name> is not done again."""
    one_process("sweep: start it as one process; --jobs N works on N points at a time")
    base = load(recipe, list(overrides))
    lambdas = {name: settings.lam for name, settings in base.dispose.items() if settings.unlearn.kind != "none"}
    folder = out / f"{base.name}-sweep"
    grid = points(over)
    calls = {p.name: [*overrides, *p.overrides(lambdas), f"name={p.name}"] for p in grid}
    experiments = [
        Experiment(load(recipe, calls[point.name]), folder, source=str(recipe), quiet=quiet or jobs > 1)
        for point in grid
    ]
    if len(calls) < len(grid):
        raise RecipeError("sweep: two points have the same values")
    for experiment in experiments:
        data_demands.check(experiment, experiment.jobs)
    perform(experiments, STAGES, relatives(out, base.name), jobs=jobs, calls=calls, quiet=quiet)
    return list(zip(grid, experiments, strict=True))


def one_process(otherwise: str) -> None:
    """Raise RecipeError, with that message, under a launcher: each of its processes would do and print everything."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(otherwise)


def perform(
    experiments: Sequence[Experiment], stages: Iterable[Stage], others: Sequence[Path] = (), *, jobs: int = 1,
    calls: dict[str, list[str]] | None = None, quiet: bool = True,
) -> None:  # fmt: skip
    """Do these stages of several runs, a result that they share only once; `jobs` runs at a time, if there are `calls`.

    calls: the `--set` texts of every run, from which it can be a process of its own. No run waits for another, unless
    for a result that both need; the one that is furthest behind goes first. The first failure ends all.
    """
    left = {experiment.folder: list(stages) for experiment in experiments}
    running: dict[Future[None], tuple[Experiment, set[str]]] = {}
    crew, pool = _Crew(calls or {}, quiet), ThreadPoolExecutor(jobs)
    try:
        while True:
            busy = [experiment for experiment, _ in running.values()]
            taken = {key for _, keys in running.values() for key in keys}
            earlier = Earlier([*others, *left])
            idle = [experiment for experiment in experiments if experiment not in busy] if len(running) < jobs else []
            ready = [
                (experiment, task)
                for experiment in idle
                if (task := _next(experiment, left[experiment.folder], earlier, taken))
            ]
            if ready:
                experiment, task = max(ready, key=lambda pair: len(left[pair[0].folder]))
                if jobs > 1 and calls is not None:
                    beside = min(jobs, sum(map(bool, left.values())))
                    running[pool.submit(crew.work, experiment, task, beside)] = (experiment, task.keys)
                else:
                    with experiment.results.opened():
                        runner.run(experiment, (task.stage,), only=task.models)
            elif running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
            else:
                return
    finally:
        crew.dismiss()
        pool.shutdown(cancel_futures=True)


class _Task(NamedTuple):
    stage: Stage
    models: list[str]
    keys: set[str]


def _next(experiment: Experiment, left: list[Stage], earlier: Earlier, taken: set[str]) -> _Task | None:
    """What the run has to do next, less what others are at; stages with nothing to do are taken off `left`.

    What another run has made is taken over.
    """
    results = experiment.results
    while left:
        ready = [job for job in experiment.chosen((left[0],)) if _has_parent(experiment, job) and not results.done(job)]
        if left[0] == "audit" or any(earlier.find(experiment, job) for job in ready):
            with results.opened():
                for job in ready:
                    earlier.take(experiment, job)
        todo = [(job.model, results.key(job)) for job in ready if not results.done(job)]
        if todo:
            free = [(model, key) for model, key in todo if key not in taken]
            models = list(dict.fromkeys(model for model, _ in free))
            return _Task(left[0], models, {key for _, key in free}) if free else None
        del left[0]
    return None


def _has_parent(experiment: Experiment, job: Job[Any]) -> bool:
    with suppress(CheckpointError):
        return bool(experiment.results.key(job))
    return False


class _Crew:
    """The processes that work on runs, one a run: a run's folder has one owner."""

    def __init__(self, calls: dict[str, list[str]], quiet: bool):
        self.calls, self.quiet = calls, quiet
        self.running: list[subprocess.Popen[str]] = []

    def work(self, experiment: Experiment, task: _Task, beside: int) -> None:
        """Do the task in a process of its own that shares the cores with so many others; raise what ended it."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // beside))}
        command = [
            sys.executable,
            "-m",
            "dtlctl",
            task.stage,
            experiment.source,
            "--out",
            str(experiment.folder.parent),
        ]
        command += ["--quiet"] * self.quiet
        command += [word for text in self.calls[experiment.recipe.name] for word in ("--set", text)]
        command += [word for model in task.models for word in ("--only", model)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.running.append(process)
        assert process.stderr is not None
        with process.stderr as lines:  # closed here: `running` keeps the process as long as the sweep lasts
            reason = self._relay(experiment.recipe.name, lines)
        if code := process.wait():
            kinds: dict[int, type[DtlError]] = {2: RecipeError, 3: DivergedError, 4: DataError}
            reason = reason or f"ended with exit code {code}"
            raise kinds.get(code, DtlError)(f"{experiment.recipe.name}, {task.stage}: {reason}")

    def _relay(self, name: str, lines: Iterable[str]) -> str:
        """Say what a process says, under its run's name, as it comes; return the error that it ends with, if any."""
        error = ""
        for line in lines:
            if error or line.startswith("error: "):
                error += line
            else:
                say(f"{name}: {line.rstrip()}")
        return error.strip().removeprefix("error: ")

    def dismiss(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.terminate()
