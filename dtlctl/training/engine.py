"""The one training loop, and the only file that knows Accelerate.

Every process keeps the bare module and its share of each global batch; gradients are averaged by one explicit
all-reduce a step. DistributedDataParallel is not used because it does not support `torch.autograd.grad`, on which
second-order objectives rest.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from dtlctl.console import devices, stop
from dtlctl.console.progress import Progress
from dtlctl.data.tensors import Batch
from dtlctl.errors import DivergedError, RecipeError, Stopped
from dtlctl.model import networks
from dtlctl.model.batchnorm import BatchNorm, over_processes
from dtlctl.model.networks import Precision
from dtlctl.recipe.settings import Training
from dtlctl.training import surroundings
from dtlctl.training.collectives import TIMEOUT, Collectives
from dtlctl.training.failures import check_reports, check_weights
from dtlctl.training.resume import HELD_OUT, State, StateFile

Model = TypeVar("Model", bound=nn.Module)
Objective = Callable[[int], tuple[Tensor, dict[str, Tensor]]]
"""number of the step -> (scalar to back-propagate, detached scalars to report); means over this process's share."""
Measure = Callable[[int], dict[str, float]]
"""steps done -> numbers for the history"""


@dataclass
class History:
    """What a training run leaves behind besides the weights."""

    rows: list[dict[str, int | float]] = field(default_factory=list)
    """One a report: the step, means since the report before, and accuracies where they were measured."""
    seconds: float = 0.0
    images_per_second: float = 0.0


class Engine(Collectives):
    """Device, processes, and the loop that trains everything.

    precision and trackers: the recipe's; folder: the run's, for trackers to write to. Raises RecipeError where the
    environment asks for something else, or where a tracker is not installed.
    """

    def __init__(self, precision: Precision = "float32", trackers: Sequence[str] = (), folder: Path = Path("run")):
        surroundings.check(precision)
        self._project = folder.name
        for name in trackers:
            if name not in map(str, get_available_trackers()):
                raise RecipeError(f"track.with: {name} is not installed here; pip install {name.replace('_', '-')}")
        try:
            # Where it is the CPU, Accelerate must be told so, or it starts processes that know nothing of each other.
            self.accelerator = Accelerator(
                cpu=devices.kind() == "cpu",
                mixed_precision="no",
                log_with=[*trackers] or None,
                project_dir=folder / "track" if trackers else None,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
        except (ValueError, ImportError, NotImplementedError) as error:
            raise RecipeError(f"accelerate: {str(error).strip().splitlines()[0]}") from None
        super().__init__(self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes)

    def place(self, model: Model, *, global_batch_norm: bool) -> Model:
        """The model on this device; with several processes, batch statistics over all of them or each one's own."""
        if self.processes > 1 and global_batch_norm:
            for module in model.modules():
                if isinstance(module, BatchNorm):
                    over_processes(module)
        return model.to(self.device)

    def train(
        self,
        model: nn.Module,
        objective: Objective,
        plan: Training,
        steps: int,
        batch_size: int,
        progress: Progress,
        evaluate: Measure,
        reports: int = 8,
        also: Collection[int] = (),
        resume: StateFile | None = None,
        state: State | None = None,
        done: Callable[[], bool] = lambda: False,
    ) -> History:
        """Minimise `objective` over `steps` steps as `plan` says.

        At each of `reports` even intervals, after each number of steps in `also` and at the end, the means of what the
        objective reported since the row before, and what `evaluate` returns, go into the history. With a `resume`,
        training goes on from the state that is kept there, and saves its own when it is due and when a signal stops it.
        It ends where `done`; with the weights of the row that is best by HELD_OUT, where rows have that.
        Raises Stopped, and DivergedError for a gradient that is not finite, at once or at the next report, or weights.
        """
        optimizer = optimizer_of(model, plan)
        schedule = schedule_of(optimizer, plan, steps)
        state, every = state or State(), max(1, steps // reports)
        if self.share.rank:  # random numbers of its own, or all processes would drop the same units
            torch.manual_seed(torch.initial_seed() + self.share.rank)
        saved = resume.restore(self, state, model, optimizer, schedule) if resume else None
        progress.goes_on(state.step, saved)
        begun, due = time.perf_counter() - state.seconds, {*range(every, steps, every), *also, steps}

        def save() -> None:
            if resume:
                state.seconds = time.perf_counter() - begun
                check_reports(state, state.step)
                resume.save(self, state, model, optimizer)

        with stop.deferred(), _precision(model), self._tracked(progress.title):
            try:
                self._report(state, due, model, evaluate, progress)  # where a signal cut it short
                while state.step < steps and not done():
                    self._heed(resume, save)
                    self._step(state, objective, model, optimizer, plan.clip)
                    schedule.step()
                    self._report(state, due, model, evaluate, progress)
                    progress.advance(1, images=batch_size)
                check_weights(model, state.step)
                self._heed(resume, save, True)
            except Stopped:
                save()
                raise
            except DivergedError:
                if resume and self.is_main:
                    resume.forget()
                raise
        if state.best:
            model.load_state_dict(state.best)
        seconds = time.perf_counter() - begun
        return History(state.rows, seconds, state.step * batch_size / max(seconds, 1e-9))

    def _step(
        self, state: State, objective: Objective, model: nn.Module, optimizer: Optimizer, clip: float | None
    ) -> None:
        loss, parts = objective(state.step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in parameters if p.grad is not None]
        self.average_([*grads, *(b for b in model.buffers() if b.is_floating_point())])
        norm = nn.utils.get_total_norm(grads)
        if clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        # Where it is 1, a fused step changes nothing, and nobody had to wait for the number. No nan is below infinity.
        optimizer.found_inf = (~(norm < torch.inf)).float()  # type: ignore[attr-defined]
        for name, value in {**parts, "gradient_norm": norm}.items():
            state.sums[name] = state.sums.get(name, 0) + value.detach().to(devices.widest(self.device))
        if self.device.type == "cpu":
            check_reports(state, state.step + 1)
        state.lr = max(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        state.step += 1

    def _report(self, state: State, due: set[int], model: nn.Module, evaluate: Measure, progress: Progress) -> None:
        """A row of the history, where one is due that is not there yet; the best weights by HELD_OUT are kept."""
        last = int(state.rows[-1]["step"]) if state.rows else 0
        if state.step == last or state.step not in due:
            return
        check_reports(state, state.step)
        sums = self.all_reduce([torch.stack(list(state.sums.values()))])[0] / ((state.step - last) * self.processes)
        means = dict(zip(state.sums, sums.tolist(), strict=True))
        found = evaluate(state.step)
        if HELD_OUT in found and all(found[HELD_OUT] > row.get(HELD_OUT, -1) for row in state.rows):
            state.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        state.rows.append({"step": state.step, **means, "lr": state.lr, **found})
        state.sums = {}
        progress.show(state.rows[-1])
        numbers = {f"{progress.title}/{name}": value for name, value in state.rows[-1].items() if name != "step"}
        self.accelerator.log(numbers, step=state.step)

    @contextmanager
    def _tracked(self, title: str) -> Iterator[None]:
        """Within, the rows of a training go to the recipe's trackers, from the main process."""
        named = {"name": title}
        if self.accelerator.log_with:
            try:  # each training is a run of its own to them: some refuse a step below the last
                self.accelerator.init_trackers(self._project, init_kwargs={"wandb": named, "trackio": named})
            except ImportError as error:
                raise RecipeError(f"track.with: {error}") from None
        try:
            yield
        finally:
            while self.accelerator.trackers:
                self.accelerator.trackers.pop().finish()

    def _heed(self, resume: StateFile | None, save: Callable[[], None], ends: bool = False) -> None:
        """Save when it is time, stop when a signal asks for it: all processes at the same step."""
        code = self.agree(max(stop.pending(), resume is not None and self.is_main and resume.due(ends)))
        if code > 1:
            raise Stopped(code)
        if code:
            save()

    @torch.no_grad()
    def correct(self, model: nn.Module, head: str, batches: Iterable[Batch]) -> np.ndarray:
        """bool [n]: whether the head is right about each image, over all processes' shares in order. The mode is kept.

        Raises DivergedError, in all processes, where an answer is not finite: argmax would make class 0 of it.
        """
        own, training = [], model.training
        model.eval()
        for batch in batches:
            with _precision(model):
                logits = model(batch.x, head)
            own.append((logits.argmax(1) == batch.y).to(torch.int8).masked_fill(~logits.isfinite().all(1), -1))
        model.train(training)
        answers = self.gather(torch.cat(own)).cpu().numpy()
        if bad := int((answers < 0).sum()):  # though all weights may be finite
            what = f"the {head} head's answers to {bad} of {len(answers)} images are not finite"
            raise DivergedError(f"training diverged: {what}")
        return answers == 1


def _precision(model: nn.Module) -> AbstractContextManager[None]:
    return networks.precision(getattr(model, "precision", "float32"))


def optimizer_of(model: nn.Module, plan: Training) -> Optimizer:
    weights: Any = [p for p in model.parameters() if p.requires_grad]
    if getattr(plan, "optimizer", "sgd") == "adamw":
        if (decay := getattr(plan, "layer_decay", None)) and isinstance(model, networks.Classifier):
            weights = networks.rates(model, model.backbone, plan.lr, decay)
        return torch.optim.AdamW(weights, plan.lr, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(weights, plan.lr, plan.momentum, weight_decay=plan.weight_decay, fused=True)


def schedule_of(optimizer: Optimizer, plan: Training, steps: int) -> LRScheduler:
    if plan.schedule == "one-cycle" and steps > 1:
        return OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps, cycle_momentum=False)
    if plan.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return ConstantLR(optimizer, factor=1.0)
