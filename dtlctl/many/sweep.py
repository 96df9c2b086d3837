"""`dtlctl sweep`: a recipe over a grid of changes, each point a run of its own, common parents made once."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtlctl.console.machine import cores
from dtlctl.console.progress import say
from dtlctl.errors import CheckpointError, DataError, DivergedError, DtlError, RecipeError, named
from dtlctl.recipe.loading import load
from dtlctl.recipe.overrides import parse_value
from dtlctl.recipe.plan import STAGES, Job, Stage
from dtlctl.run.earlier import Earlier, relatives
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands, runner
from dtlctl.storage import checkpoint


class Point(NamedTuple):
    """One choice for every swept key, and its folder's name, such as `gc.lambda-0.05`."""

    values: dict[str, Any]
    name: str

    @property
    def overrides(self) -> list[str]:
        """As `--set` would have them."""
        return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.values.items()]


def folder_name(text: str, identity: dict[str, Any], *, hashed: bool = False) -> str:
    """The text as a name that a recipe may have; one that is too long, or `hashed`, ends in a hash of the identity."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "", text).strip("._-")
    return plain if 0 < len(plain) <= 64 and not hashed else f"{plain[:48]}-{checkpoint.key(identity)[:8]}".lstrip("-")


def points(over: Sequence[str]) -> list[Point]:
    """The grid of `key=a,b,c` texts, in order. Raises RecipeError for a text of another form."""
    axes: dict[str, list[Any]] = {}
    for text in over:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise RecipeError(f"--over {text}: write key.path=a,b,c, for example --over dispose.gc.lambda=0.1,0.5")
        if key.strip() in axes or key.strip() == "name":
            raise RecipeError(f"--over {text}: {key.strip()} cannot be swept here (given twice, or the run's name)")
        axes[key.strip()] = parse_value(values)

    def name(values: dict[str, Any], *, hashed: bool = False) -> str:
        text = "_".join(f"{key.removeprefix('dispose.')}-{value}" for key, value in values.items())
        return folder_name(text.replace("*", "all"), values, hashed=hashed)

    grid = [dict(zip(axes, choice, strict=True)) for choice in itertools.product(*axes.values())]
    taken = Counter(name(values).lower() for values in grid)  # lower: some file systems do not tell "a" from "A"
    return [Point(values, name(values, hashed=taken[name(values).lower()] > 1)) for values in grid]


def run(
    recipe: Path, over: Sequence[str], overrides: Sequence[str], out: Path, *, jobs: int = 1, quiet: bool = False
) -> list[tuple[Point, Experiment]]:
    """Do all points' stages under OUT/<name>-sweep; what is up to date there or in OUT/<name> is not done again."""
    one_process("sweep: start it as one process; --jobs N works on N points at a time")
    done = opened(recipe, over, overrides, out, quiet=quiet or jobs > 1)
    perform([experiment for _, experiment in done], STAGES, jobs=jobs, quiet=quiet)
    return done


def plan(recipe: Path, over: Sequence[str], overrides: Sequence[str], out: Path) -> tuple[list[str], list[str]]:
    """The sweep as lines for a shell: first every pre-training that points share, then the points, in any order."""
    experiments = [experiment for _, experiment in opened(recipe, over, overrides, out, quiet=True)]
    shared: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        for job in experiment.chosen(("pretrain",)):
            shared.setdefault(experiment.results.key(job), []).append(experiment)
    first = [some[0].command("pretrain") for some in shared.values() if len(some) > 1]
    return first, [experiment.command("run") for experiment in experiments]


def opened(
    recipe: Path, over: Sequence[str], overrides: Sequence[str], out: Path, *, quiet: bool
) -> list[tuple[Point, Experiment]]:
    """The points and their runs, with data that fits. Raises RecipeError for two points that are one."""
    folder, grid = out / f"{load(recipe, list(overrides)).name}-sweep", points(over)
    if len({point.name for point in grid}) < len(grid):
        raise RecipeError("sweep: two points have the same values")
    found = []
    for point in grid:
        call = [*overrides, *point.overrides, f"name={point.name}"]
        words = [*(word for text in call for word in ("--set", text)), "--out", str(folder)]
        with named(", ".join(point.overrides)):
            experiment = Experiment(load(recipe, call), folder, source=str(recipe), words=words, quiet=quiet)
        found.append((point, experiment))
    for point, experiment in found:
        with named(", ".join(point.overrides)):
            data_demands.check(experiment, experiment.jobs)
    return found


def one_process(otherwise: str) -> None:
    """Raise RecipeError, with that message, under a launcher: each of its processes would do and print everything."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(otherwise)


class Task(NamedTuple):
    """What a run has to do next: a stage for some models, and the keys of the results that it makes."""

    stage: Stage
    models: list[str]
    keys: set[str]


class Child(NamedTuple):
    process: subprocess.Popen[str]
    folder: Path
    keys: set[str]
    gpu: str


def perform(experiments: Sequence[Experiment], stages: Iterable[Stage], *, jobs: int = 1, quiet: bool = True) -> None:
    """Do these stages of several runs, a result that they share only once; `jobs` runs at a time, each a process.

    No run waits for another, unless for a result that both need; the one that is furthest behind goes first. Processes
    share the cores, and each has one GPU, if there are any: the one that fewest are at. The first failure ends all.
    """
    left = {experiment.folder: list(stages) for experiment in experiments}
    others = relatives(experiments[0].folder.parent, experiments[0].recipe.name)
    children: dict[Future[None], Child] = {}
    gpus, pool = visible_gpus() or [""], ThreadPoolExecutor(jobs)
    try:
        while True:
            busy = {child.folder for child in children.values()}
            taken = {key for child in children.values() for key in child.keys}
            earlier = Earlier([*others, *left])
            idle = [one for one in experiments if one.folder not in busy] if len(children) < jobs else []
            ready = [(one, task) for one in idle if (task := _next(one, left[one.folder], earlier, taken))]
            if ready:
                experiment, task = max(ready, key=lambda pair: len(left[pair[0].folder]))
                if jobs > 1:
                    gpu = min(gpus, key=[child.gpu for child in children.values()].count)
                    threads = max(1, cores() // min(jobs, sum(map(bool, left.values()))))
                    process = _start(experiment, task, threads, gpu, quiet)
                    ended = pool.submit(_wait, process, experiment.recipe.name, task.stage)
                    children[ended] = Child(process, experiment.folder, task.keys, gpu)
                else:
                    with named(experiment.recipe.name), experiment.results.opened():
                        runner.run(experiment, (task.stage,), only=task.models)
            elif children:
                for ended in wait(children, return_when=FIRST_COMPLETED).done:
                    del children[ended]
                    ended.result()
            else:
                return
    finally:
        for child in children.values():
            if child.process.poll() is None:
                child.process.terminate()
        pool.shutdown(cancel_futures=True)


def _next(experiment: Experiment, left: list[Stage], earlier: Earlier, taken: set[str]) -> Task | None:
    """What the run has to do next, less what others are at or have made; stages that are done are taken off `left`."""
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
            return Task(left[0], models, {key for _, key in free}) if free else None
        del left[0]
    return None


def _has_parent(experiment: Experiment, job: Job[Any]) -> bool:
    with suppress(CheckpointError):
        return bool(experiment.results.key(job))
    return False


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be for a process that has one of this process's GPUs; none where there are none."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return list(itertools.takewhile(lambda one: one not in ("", "-1"), map(str.strip, listed.split(","))))


def _start(run: Experiment, task: Task, threads: int, gpu: str, quiet: bool) -> subprocess.Popen[str]:
    """A process that does the task. gpu: the one that it sees; "": those that this process sees."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    command = [sys.executable, "-m", "dtlctl", task.stage, run.source, *run.words, *["--quiet"] * quiet]
    command += [word for model in task.models for word in ("--only", model)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait(process: subprocess.Popen[str], name: str, stage: Stage) -> None:
    """Say what a process says, under its run's name, as it comes; raise the error that it ends with, if any."""
    error = ""
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            if error or line.startswith("error: "):
                error += line
            else:
                say(f"{name}: {line.rstrip()}")
    if code := process.wait():
        kinds: dict[int, type[DtlError]] = {2: RecipeError, 3: DivergedError, 4: DataError}
        reason = error.strip().removeprefix("error: ") or f"{stage} ended with exit code {code}"
        raise kinds.get(code, DtlError)(f"{name}: {reason}")
