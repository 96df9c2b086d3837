"""How trials are shared out: at once where nothing is drawn, one after the other and seeded where something is."""

from __future__ import annotations

import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torchvision.ops import StochasticDepth

from dtlctl.errors import Stopped
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment
from dtlctl.stages.piggyback import Repetition, draws, share_out


def repetition(model: nn.Module) -> Any:
    share = SimpleNamespace(rank=0)
    engine = SimpleNamespace(device=torch.device("cpu"), share=share, processes=1, gather_objects=lambda found: found)
    recipe = SimpleNamespace(stream=lambda tag: zlib.crc32(tag.encode()))
    experiment = SimpleNamespace(engine=engine, recipe=recipe)
    return SimpleNamespace(experiment=experiment, model=model, tag="attack", stop=threading.Event())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_trials_of_a_network_that_draws_are_decided_by_the_seed_alone(two_threads: None):
    """Each has the same random numbers, whoever is tried before or beside it: a winner named alone does as well."""

    def trial() -> list[float]:
        found = []
        for _ in range(3):
            found.append(float(torch.rand(())))
            time.sleep(0.002)  # another thread would draw now
        return found

    found = share_out(repetition(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))), [trial] * 4)
    torch.manual_seed(zlib.crc32(b"attack/draws"))
    assert found == [[float(torch.rand(())) for _ in range(3)]] * 4


def test_trials_of_a_network_that_draws_nothing_run_at_once(two_threads: None):
    meeting = threading.Barrier(2)
    assert share_out(repetition(nn.Linear(2, 2)), [lambda: meeting.wait(20) * 0 + 1] * 2) == [1, 1]


def test_trials_that_run_at_once_have_one_blas_thread_each(two_threads: None):
    """Otherwise two probes have four threads on two cores, and take three times as long."""

    def blas() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    with threadpool_limits(2, "blas"):
        assert share_out(repetition(nn.Linear(2, 2)), [blas] * 2) == [{1}] * 2
        assert share_out(repetition(nn.Sequential(nn.Dropout(0.5))), [blas]) == [{2}]
        assert blas() == {2}


def test_a_signal_ends_the_trials_at_work_and_begins_no_other(two_threads: None):
    """A trial takes a moment after it was told to stop: until then nobody else can have begun all of them."""
    held, told, begun = repetition(nn.Linear(2, 2)), [], threading.Event()

    def stopped() -> None:
        assert begun.wait(60)
        raise Stopped(15)

    def trial() -> None:
        begun.set()
        told.append(held.stop.wait(60))
        time.sleep(0.02)

    with pytest.raises(Stopped):
        share_out(held, [stopped, *[trial] * 100])
    assert 0 < len(told) < 100 and all(told)


def test_dropout_and_stochastic_depth_draw_where_they_have_a_probability():
    assert draws(nn.Sequential(nn.Dropout2d(0.1))) and draws(nn.Sequential(StochasticDepth(0.1, "row")))
    assert not draws(nn.Sequential(nn.Dropout(0.0), StochasticDepth(0.0, "row"), nn.BatchNorm2d(2)))


class Watched(np.ndarray):
    """Pixels that nobody may take many of at once."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        assert not isinstance(key, np.ndarray) or len(key) <= 512, f"{len(key)} images at once"
        return found


def test_no_more_than_a_batch_of_a_split_is_copied(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """797 images to test on, 750 of 1,000 to train on: the attackers, and `split`, take at most 512 at a time."""
    change = 'piggyback.attackers=[{kind="full", lr=[0.1], steps=2}, {kind="renorm-probe", C=[1.0]}]'
    fraction = "data.piggyback.again.fraction=1.0"
    experiment = Experiment(load(recipe_file, [change, fraction]), recipe_file.parent, quiet=True)
    images = experiment.data.images

    def watched(role: str, split: Any) -> Any:
        found = images(role, split)
        return found._replace(pixels=np.asarray(found.pixels).view(Watched))

    monkeypatch.setattr(experiment.data, "images", watched)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition = Repetition(experiment, job, 0)
    for attacker in job.settings.attackers:
        trial = repetition.attempt(attacker, attacker.grid()[0])
        assert repetition.finish(attacker, trial).acc_pl is not None
    rows = np.arange(797)
    assert sum(len(batch.y) for batch in experiment.trainer.split("source", "test", rows)) == 797
