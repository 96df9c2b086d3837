"""How trials are shared out: at once where nothing is drawn, one after the other and seeded where something is."""

from __future__ import annotations

import threading
import time
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn
from torchvision.ops import StochasticDepth

from dtlctl.stages.trials import draws, share_out


def ground(model: nn.Module) -> Any:
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
    """Each has the random numbers of its own seed, however the threads would have taken turns."""

    def trial() -> list[float]:
        found = []
        for _ in range(3):
            found.append(float(torch.rand(())))
            time.sleep(0.002)  # another thread would draw now
        return found

    found = share_out(ground(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))), [trial] * 4)
    for number, drawn in enumerate(found):
        torch.manual_seed(zlib.crc32(f"attack/{number}".encode()))
        assert drawn == [float(torch.rand(())) for _ in range(3)]


def test_trials_of_a_network_that_draws_nothing_run_at_once(two_threads: None):
    meeting = threading.Barrier(2)
    assert share_out(ground(nn.Linear(2, 2)), [lambda: meeting.wait(20) * 0 + 1] * 2) == [1, 1]


def test_trials_that_run_at_once_have_one_blas_thread_each(two_threads: None):
    """Otherwise two probes have four threads on two cores, and take three times as long."""

    def blas() -> set[int]:
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    with threadpool_limits(2, "blas"):
        assert share_out(ground(nn.Linear(2, 2)), [blas] * 2) == [{1}] * 2
        assert share_out(ground(nn.Sequential(nn.Dropout(0.5))), [blas]) == [{2}]
        assert blas() == {2}


def test_dropout_and_stochastic_depth_draw_where_they_have_a_probability():
    assert draws(nn.Sequential(nn.Dropout2d(0.1))) and draws(nn.Sequential(StochasticDepth(0.1, "row")))
    assert not draws(nn.Sequential(nn.Dropout(0.0), StochasticDepth(0.0, "row"), nn.BatchNorm2d(2)))
