"""Two real processes (torchrun, gloo on the CPU) make what one process makes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dtlctl.errors import RecipeError
from dtlctl.objectives.unlearn import Uniform
from dtlctl.recipe.settings import Dispose
from dtlctl.stages.data_demands import local_chunks
from tests.reliability.fork import together
from tests.training.wait_in_processes import restore, wait

# Retaining losses that need target batches, beside the tiny recipe's own two variants.
MORE = """dispose={
    kd = {lambda=0.1, steps=4, batch_size=8, lr=0.02, retain={kind="distill", on="target"}},
    gem = {lambda=0.1, steps=4, batch_size=8, lr=0.02, retain={kind="a-gem"}}
}""".replace("\n", "")


def sidecar(folder: Path, job: str) -> dict:
    return json.loads((folder / job / "model.json").read_text())


def differences(runs: Path, job: str) -> dict[str, float]:
    """Relative, of each tensor of runs/one, made by one process, to that of runs/two, made by two."""
    assert (sidecar(runs / "one", job)["processes"], sidecar(runs / "two", job)["processes"]) == (1, 2)
    ours, theirs = (load_file(runs / name / job / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    return {
        name: float((tensor.double() - theirs[name].double()).norm() / tensor.double().norm().clamp(min=1e-3))
        for name, tensor in ours.items()
        if tensor.is_floating_point()  # the rest counts forward passes
    }


@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("float32", 1e-4, marks=pytest.mark.slow), ("float64", 1e-10)]
)
def test_two_processes_equal_one(recipe_file: Path, dtlctl, call, precision: str, tolerance: float):
    """After a chain of stages only the order of additions differs, by so much."""
    runs, changes = recipe_file.parent / "runs", ("--set", MORE, "--set", f'precision="{precision}"')
    for stage in ("pretrain", "finetune", "dispose"):
        code, _, err = call(stage, recipe_file, *changes, "--set", "name=one", "--quiet")
        assert code == 0, err
    two = dtlctl("run", recipe_file, *changes, "--set", "name=two", processes=2)
    assert two.returncode == 0, two.stderr
    assert "on 2 processes" in two.stderr
    assert two.stdout.count("| Model ") == 2  # the two tables, from the main process only
    for job in ("pretrain", "target-only", "finetune", "dispose/gc", "dispose/rand", "dispose/kd", "dispose/gem"):
        for name, difference in differences(runs, job).items():
            assert difference < tolerance, f"{job}: {name} differs by {difference:.1e}"


def test_two_processes_equal_one_with_a_norm_that_is_not_torchs(recipe_file: Path, forked, call):
    """timm's batch norm with an activation: for long each process took the statistics of its own images."""
    pytest.importorskip("timm", reason="the extra timm is not installed")
    network = 'arch = "timm:test_efficientnet"\nstem = "imagenet"\nimage_size = 32'
    recipe_file.write_text(recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4\nimage_size = 8', network))
    changes = ("--set", 'precision="float64"', "--set", "pretrain.steps=3", "--quiet")
    code, _, err = call("pretrain", recipe_file, *changes, "--set", "name=one")
    assert code == 0, err
    done = forked("pretrain", recipe_file, *changes, "--set", "name=two", processes=2)
    assert done.returncode == 0, done.stderr
    assert max(differences(recipe_file.parent / "runs", "pretrain").values()) < 1e-10


def test_two_processes_take_a_step_in_bfloat16_as_one_does(recipe_file: Path, forked, call):
    """A single step, since rounding to 8 bits grows. Batch statistics are sums in float32 on both sides, though of
    activations in bfloat16: only the order of additions differs."""
    changes = ("--set", 'precision="bfloat16"', "--set", "pretrain.steps=1", "--set", "dispose.gc.unlearn.cosine=0.1")
    code, _, err = call("pretrain", recipe_file, *changes, "--set", "name=one")
    assert code == 0, err
    done = forked("pretrain", recipe_file, *changes, "--set", "name=two", processes=2)
    assert done.returncode == 0, done.stderr
    for name, difference in differences(recipe_file.parent / "runs", "pretrain").items():
        assert difference < (1e-5 if "running" in name else 1e-3), f"{name} differs by {difference:.1e}"


def test_what_launchers_on_two_machines_tell_makes_what_one_process_makes(recipe_file: Path, forked, call):
    changes = ("--set", 'precision="float64"')
    code, _, err = call("pretrain", recipe_file, *changes, "--set", "name=one", "--quiet")
    assert code == 0, err
    two = forked("pretrain", recipe_file, *changes, "--set", "name=two", processes=2, machines=2)
    assert two.returncode == 0 and two.stderr.count("on 2 processes of 2 machines") == 1, two.stderr
    assert max(differences(recipe_file.parent / "runs", "pretrain").values()) < 1e-10


@pytest.mark.slow
def test_two_machines_over_loopback_do_what_one_does(recipe_file: Path, call):
    """Each "machine" is a launcher of its own that knows the other by an address alone, as under SLURM."""
    changes = ("--set", 'precision="float64"')
    code, _, err = call("pretrain", recipe_file, *changes, "--set", "name=one", "--quiet")
    assert code == 0, err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "-m", "dtlctl", "pretrain"]
    machines = [
        subprocess.Popen(
            [*launcher, recipe_file, *changes, "--set", "name=two"], cwd=recipe_file.parent, stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = "".join(machine.communicate(timeout=300)[1] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert said.count("on 2 processes of 2 machines") == 1
    assert max(differences(recipe_file.parent / "runs", "pretrain").values()) < 1e-10


def test_chunks_that_processes_cannot_share_are_refused_before_anything_trains(recipe_file: Path, forked):
    changes = ("--set", "dispose.gc.unlearn.chunks=3", "--set", "dispose.gc.batch_size=9")
    result = forked("run", recipe_file, *changes, processes=2)
    assert result.returncode != 0
    assert "dispose/gc: unlearn.chunks = 3 cannot be shared by 2 processes (rest 1)" in result.stderr
    assert not list((recipe_file.parent / "runs").rglob("model.json"))


def test_a_batch_without_chunks_is_shared_equally_or_not_at_all():
    """Else three processes would train on 63 images of 64, each batch after the first on others than one process."""
    plain = Dispose(steps=1, batch_size=64, unlearn=Uniform())
    assert [local_chunks(plain, processes, "dispose/unif") for processes in (1, 2, 4)] == [1, 1, 1]
    with pytest.raises(RecipeError, match=r"dispose/unif: batch_size = 64 cannot be shared equally by 3 .*rest 1"):
        local_chunks(plain, 3, "dispose/unif")


def test_processes_wait_for_days_where_others_work_and_not_where_they_hang(tmp_path: Path):
    """Decoding and trials take four seconds of one process; a step and an agreement six. The limit is two seconds."""
    works = ("decoding", "trials", "step", "agreement")
    for work in works:
        (tmp_path / work).mkdir()
    with ThreadPoolExecutor(len(works)) as pairs:
        ended = list(pairs.map(lambda work: together(partial(wait, work), tmp_path / work, 2), works))
    for work, found in zip(works, ended, strict=True):
        assert found.returncode == 0, found.stderr
        first, second = sorted(found.stdout.splitlines())
        if work in ("decoding", "trials"):
            assert (first, second) == ("process 0 of 2 goes on", "process 1 of 2 goes on"), work
        else:  # the one that is late may see its own message through
            assert first == "process 0 of 2 waited in vain: True" and second.startswith("process 1 of 2 "), work


def test_a_state_that_one_process_alone_has_is_refused_by_all(tmp_path: Path):
    """Of folders that are not shared. The main process, whose message is read first, would go on to wait in vain."""
    done = together(restore, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    told = "safetensors: not the same on all processes; they must share the run's folder"
    assert sorted(done.stdout.splitlines()) == [f"process {rank}: {rank}.{told}" for rank in (0, 1)]
