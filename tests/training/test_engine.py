"""What the engine does for every training, whatever is trained."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from dtlctl.console import stop
from dtlctl.console.progress import Progress
from dtlctl.data.tensors import Batch, Share
from dtlctl.errors import DivergedError, Stopped
from dtlctl.model import networks
from dtlctl.recipe.settings import Pretrain, Training
from dtlctl.training import resume
from dtlctl.training.engine import Engine, History
from dtlctl.training.resume import State, StateFile


def dropped(rank: int) -> Tensor:
    """What dropout makes of ones at the first step of a training, as this process of three."""
    torch.manual_seed(5)
    model, engine = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1)), Engine()
    engine.share, seen = Share(rank, 3), []

    def objective(step: int):
        seen.append(model[0](torch.ones(64)))
        loss = model[1](seen[-1]).sum()
        return loss, {"loss": loss.detach()}

    engine.train(model, objective, Training(steps=1, batch_size=2), 1, 2, Progress("", 1, enabled=False), lambda _: {})
    return seen[0]


def test_every_process_draws_a_dropout_of_its_own_and_the_first_that_of_one_process():
    """Image i of every share would lose the same units: a global batch would have a third of its masks."""
    torch.manual_seed(5)
    nn.Linear(64, 1)
    alone = nn.Dropout(0.5)(torch.ones(64))
    assert torch.equal(dropped(0), alone)
    assert not torch.equal(dropped(1), alone) and not torch.equal(dropped(2), alone)
    assert not torch.equal(dropped(1), dropped(2))


class Answers(nn.Module):
    """Its answer is the image."""

    def forward(self, x: Tensor, head: str) -> Tensor:
        return x


def test_answers_that_are_not_finite_are_no_accuracy():
    """For argmax all three of the second batch would be of class 0, and two of them right."""
    y = torch.tensor([0, 1, 0])
    good = Batch(torch.eye(3), y, torch.arange(3))
    assert Engine().correct(Answers(), "source", [good]).tolist() == [True, True, False]
    bad = Batch(torch.tensor([[0.0, torch.nan], [0.0, torch.inf], [1.0, 0.0]]), y, torch.arange(3))
    with pytest.raises(DivergedError, match=r"the source head's answers to 2 of 6 images are not finite"):
        Engine().correct(Answers(), "source", [good, bad])


def test_which_images_are_right_is_told_in_their_order():
    """Of the images 0, 1, 1, 0 by their answers, labelled 0, 0, 1, 1: the first and the third."""
    first, second = torch.eye(2), torch.eye(2).flip(0)
    batches = [
        Batch(first, torch.tensor([0, 0]), torch.arange(2)),
        Batch(second, torch.tensor([1, 1]), torch.arange(2, 4)),
    ]
    assert Engine().correct(Answers(), "target", batches).tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_is_the_one_that_the_plan_names(name: str):
    """One step from 1 at a gradient of 2 and lr 0.01, no decay: SGD goes 0.02, AdamW lr, whatever the gradient."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    plan = Pretrain(steps=1, batch_size=2, lr=0.01, weight_decay=0, schedule="constant", optimizer=name)
    objective = lambda step: (loss := 2 * model.weight.sum(), {"loss": loss.detach()})  # noqa: E731
    Engine().train(model, objective, plan, 1, 2, Progress("", 1, enabled=False), lambda _: {})
    assert model.weight.item() == pytest.approx(0.98 if name == "sgd" else 0.99, abs=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_training_goes_on_with_the_state_of_its_optimizer(name: str, tmp_path: Path):
    """Six steps, and six of which the fourth failed at first: the same weights to the bit."""
    plan = Pretrain(steps=6, batch_size=2, lr=0.01, optimizer=name)

    def trained(file: Path, fails: bool = False) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)

        def objective(step: int):
            if fails and step == 3:
                raise RuntimeError
            loss = (model(torch.full((2, 3), step + 1.0)) ** 2).sum()
            return loss, {"loss": loss.detach()}

        bar = Progress("", 6, enabled=False)
        Engine().train(model, objective, plan, 6, 2, bar, lambda _: {}, resume=StateFile(file, "key", 0))
        return model.weight.detach()

    whole = trained(tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError):
        trained(tmp_path / "b.safetensors", fails=True)
    assert (tmp_path / "b.safetensors").exists()
    assert torch.equal(trained(tmp_path / "b.safetensors"), whole)


def test_a_training_that_has_ended_is_kept_for_what_is_still_measured(tmp_path: Path, monkeypatch):
    """A signal in its last row's measuring stops it with all steps saved; so does a stage that goes on for long."""
    steps: list[int] = []

    def train(file: Path, signum: int = 0) -> Path:
        def evaluate(step: int) -> dict[str, float]:
            if step == 3:
                monkeypatch.setattr(stop, "pending", lambda: signum)
            return {}

        def objective(step: int):
            steps.append(step)
            return model.weight.sum(), {"loss": torch.ones(())}

        model, bar = nn.Linear(1, 1), Progress("", 3, enabled=False)
        Engine().train(model, objective, Pretrain(steps=3), 3, 2, bar, evaluate, resume=StateFile(file, "key"))
        return file

    with pytest.raises(Stopped):
        train(tmp_path / "signal", signal.SIGTERM)
    monkeypatch.setattr(stop, "pending", lambda: 0)
    assert not train(tmp_path / "short").exists()  # done again sooner than said
    monkeypatch.setattr(resume, "AT_END", 0)
    train(tmp_path / "long")
    assert steps == 3 * [0, 1, 2]
    for name in ("signal", "long"):
        train(tmp_path / name)
    assert steps == 3 * [0, 1, 2]


class Heard(GeneralTracker):
    """A tracker of our own, as Accelerate takes them."""

    name, requires_logging_directory, main_process_only, tracker = "heard", False, True, None

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, dict[str, float]] = {}
        self.finished = 0

    def log(self, values: dict[str, float], step: int | None = None, **more: object) -> None:
        self.numbers[int(step or 0)] = values

    def finish(self) -> None:
        self.finished += 1


def test_trackers_hear_every_row_under_its_training_s_name():
    """Two rows of two steps each: the losses are 1, 2, 3, 4, so the means are 1.5 and 3.5.

    The rates of the steps 2 and 4 are (1 + cos(k pi / 4)) / 8 with k = 1 and 3.
    """
    model, heard, engine = nn.Linear(1, 1), Heard(), Engine()
    engine.accelerator.log_with = [heard]

    def objective(step: int):
        return model.weight.sum() * 0, {"loss": torch.tensor(step + 1.0)}

    plan = Training(steps=4, batch_size=2, lr=0.25, schedule="cosine")
    history = engine.train(
        model, objective, plan, 4, 2, Progress("dispose/one", 4, enabled=False), lambda _: {"acc_t": 50.0}, reports=2
    )
    assert heard.finished == 1
    lr = [pytest.approx((1 + 0.5**0.5) / 8), pytest.approx((1 - 0.5**0.5) / 8)]
    assert [row["lr"] for row in history.rows] == lr
    assert {step: (v["dispose/one/loss"], v["dispose/one/lr"], v["dispose/one/acc_t"])
            for step, v in heard.numbers.items()} == {2: (1.5, lr[0], 50.0), 4: (3.5, lr[1], 50.0)}  # fmt: skip


def test_layer_decay_is_that_of_each_stage():
    """AdamW's first step is a weight's lr, whatever its gradient: 0.01, halved by each of three stages, and the stem's.

    resnet8 has a stem, three stages and a head: 0.01 for the head, 0.005, 0.0025, 0.00125, and 0.000625 for the stem.
    """
    model = networks.build("resnet8", {"source": 2}, width=4, image_size=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = Pretrain(steps=1, batch_size=2, lr=0.01, weight_decay=0, schedule="constant", optimizer="adamw",
                    layer_decay=0.5)  # fmt: skip
    objective = lambda step: (loss := sum(p.sum() for p in model.parameters()), {"loss": loss.detach()})  # noqa: E731
    Engine().train(model, objective, plan, 1, 2, Progress("", 1, enabled=False), lambda _: {})
    stages = networks.stages(model.backbone)
    places = {id(p): k for k, stage in enumerate(stages) for m in stage.modules for p in m.parameters()}
    for name, p in model.named_parameters():
        lr = 0.01 if name.startswith("heads") else 0.01 * 0.5 ** (3 - places.get(id(p), -1))
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, lr), rtol=1e-2, atol=1e-7)
    assert len(stages) == 3 and len(set(places.values())) == 3


def stopped(file: Path, fails: int | None = None) -> tuple[Tensor, History]:
    """A weight that starts at 1 and loses 0.1 a step, and what it is worth on images held out after each."""
    worth, model, state = [0, 50, 60, 60, 55, 90, 90, 90, 90], nn.Linear(1, 1, bias=False), State()
    nn.init.ones_(model.weight)
    plan = Training(steps=8, batch_size=2, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")

    def objective(step: int):
        if step == fails:
            raise RuntimeError
        return (loss := model.weight.sum()), {"loss": loss.detach()}

    history = Engine().train(
        model, objective, plan, 8, 2, Progress("", 8, enabled=False), lambda step: {"held_out": float(worth[step])},
        resume=StateFile(file, "key", 0), state=state, done=lambda: state.step - state.best_step() >= 2,
    )  # fmt: skip
    return model.weight.detach(), history


def test_a_training_may_end_early_and_keeps_the_first_best_weights(tmp_path: Path):
    """60 after step 2, never more within two steps: step 4 is the last, and the weight is that of step 2."""
    weight, history = stopped(tmp_path / "whole.safetensors")
    assert history.rows[-1]["step"] == 4
    assert weight.item() == pytest.approx(0.8)


@pytest.mark.parametrize("fails", [1, 3])
def test_an_early_stop_is_the_same_after_a_failure(tmp_path: Path, fails: int):
    weight, history = stopped(tmp_path / "whole.safetensors")
    with pytest.raises(RuntimeError):
        stopped(tmp_path / "cut.safetensors", fails)
    again, rows = stopped(tmp_path / "cut.safetensors")
    assert torch.equal(again, weight) and rows.rows == history.rows
