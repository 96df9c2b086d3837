"""Bad data and bad calls: one line on stderr that says what, where and what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from dtlctl.data import cache
from dtlctl.errors import DtlError, Stopped
from dtlctl.stages import runner


def pictures(folder: Path, *, names: list[str], labels: list[int], corrupt: int | None = None) -> Path:
    """A parquet dataset of 8-pixel images, the same rows in both splits."""
    folder.mkdir()
    cells = []
    for row in range(len(labels)):
        path = folder / f"{row}.png"
        Picture.fromarray(np.full((8, 8, 3), row, np.uint8)).save(path)
        data = path.read_bytes()
        path.unlink()
        cells.append({"bytes": data[: len(data) // 2] if row == corrupt else data, "path": None})
    features = Features({"picture": Image(), "kind": ClassLabel(names=names), "note": Value("string")})
    columns = {"picture": cells, "kind": labels, "note": [""] * len(labels)}
    for split in ("train", "test"):
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith(("dtlctl ", "decode "))]


def test_a_wrong_label_column_lists_the_columns(call, recipe_file: Path, tmp_path: Path):
    data = pictures(tmp_path / "p", names=["a", "b"], labels=[0, 1] * 4)
    code, out, err = call(
        "pretrain", recipe_file, "--set", f"data.source.path={data}", "--set", "data.source.label=knd"
    )
    assert (code, out) == (4, "")
    assert "data.source.label" in err
    assert "'knd'" in err
    assert "kind" in err
    assert len(errors(err)) == 1


def test_a_class_without_images_is_named(call, recipe_file: Path, tmp_path: Path):
    data = pictures(tmp_path / "p", names=["a", "b", "lonely"], labels=[0, 1] * 4)
    code, _, err = call("pretrain", recipe_file, "--set", f"data.source.path={data}")
    assert code == 4
    assert "'lonely'" in err
    assert len(errors(err)) == 1


def test_a_corrupt_image_is_named_by_its_row(call, recipe_file: Path, tmp_path: Path):
    data = pictures(tmp_path / "p", names=["a", "b"], labels=[0, 1] * 4, corrupt=5)
    code, _, err = call("pretrain", recipe_file, "--set", f"data.source.path={data}")
    assert code == 4
    assert "row 5" in err
    assert len(errors(err)) == 1


@pytest.mark.parametrize("way", ["raised", "another error", "swallowed"])
def test_a_signal_while_a_dataset_is_opened_is_no_bad_data(call, recipe_file: Path, tmp_path: Path, monkeypatch, way):
    """Exit code 130, whatever the library makes of the exception that a signal raises inside of it."""
    data = pictures(tmp_path / "p", names=["a", "b"], labels=[0, 1] * 4)
    opened = datasets.load_dataset_builder

    def interrupted(**arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Stopped:
            if way == "raised":
                raise
            if way == "another error":
                raise ConnectionError("the connection was closed") from None
        return opened(**arguments)

    monkeypatch.setattr(datasets, "load_dataset_builder", interrupted)
    monkeypatch.setattr(cache, "_decode", lambda *_: pytest.fail("images are decoded all the same"))
    code, out, err = call("pretrain", recipe_file, "--quiet", "--set", f"data.source.path={data}")
    assert (code, out) == (130, "")
    assert err.startswith("error: stopped by a signal")


def test_a_missing_dataset_is_named_with_its_key(call, recipe_file: Path):
    code, _, err = call("pretrain", recipe_file, "--set", "data.source.path=./nowhere")
    assert code == 4
    assert "data.source.path" in err
    assert "nowhere" in err
    assert len(errors(err)) == 1


def test_data_of_the_last_stage_is_looked_at_before_the_first_trains(call, recipe_file: Path, tmp_path: Path):
    """What a run needs hours later: a piggyback dataset without a test split."""
    data = pictures(tmp_path / "p", names=["a", "b"], labels=[0, 1] * 4)
    (data / "test.parquet").unlink()
    change = f"data.piggyback.again={{path='{data}', label='kind', fraction=1.0}}"
    code, _, err = call("run", recipe_file, "--set", change)
    assert code == 4
    assert len(errors(err)) == 1 and "data.piggyback.again" in err
    assert not list((tmp_path / "runs").rglob("model.json"))


def test_a_truncated_checkpoint_stops_what_depends_on_it(call, recipe_file: Path, tmp_path: Path):
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    weights = tmp_path / "runs" / "tiny" / "pretrain" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, out, err = call("finetune", recipe_file, "--quiet", "--only", "TL")
    assert (code, out) == (4, "")
    assert "model.safetensors" in err
    assert "--force" in err
    assert len(err.splitlines()) == 2
    assert call("pretrain", recipe_file, "--quiet", "--force")[0] == 0  # the remedy works
    assert call("finetune", recipe_file, "--quiet", "--only", "TL")[0] == 0


def test_a_damaged_copy_of_the_recipe_is_made_again_or_named(call, recipe_file: Path, tmp_path: Path):
    """What is no UTF-8 is replaced; a folder cannot be. One that says the same is not written again."""
    copy = tmp_path / "runs" / "tiny" / "recipe.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"\xff\xfe")
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    assert json.loads(copy.read_bytes())["name"] == "tiny"
    before = copy.stat().st_mtime_ns
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    assert copy.stat().st_mtime_ns == before
    copy.unlink()
    copy.mkdir()
    code, _, err = call("pretrain", recipe_file, "--quiet")
    assert (code, err.count("\n")) == (4, 1)
    assert "recipe.json: cannot be written: Is a directory" in err


@pytest.mark.usefixtures("undrawn")
def test_a_terminal_that_lacks_a_letter_shows_the_table(call, recipe_file: Path):
    """The report has dashes that ASCII does not have."""
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    sys.stdout.reconfigure(encoding="ascii")
    code, out, err = call("report", "runs/tiny", "-q")
    assert (code, err) == (0, "") and " ? |\n" in out


def test_wrong_recipes_end_with_2_before_data_is_touched(call, recipe_file: Path, tmp_path: Path):
    for change in ("dispose.gc.lambda=1.5", "dispose.gc.unlearn.chunks=3", "finetune.lrr=1", "name=../x"):
        code, out, err = call("run", recipe_file, "--set", change)
        assert (code, out) == (2, ""), change
        assert len(err.splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_a_network_that_cannot_take_the_images_is_a_mistake_of_the_recipe(call, recipe_file: Path):
    recipe_file.write_text(recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4', 'arch = "alexnet"'))
    reason = "alexnet cannot take images of 32 pixels; set image_size, 224 for example"
    change = ("--set", "model={stem='imagenet', image_size=32}")
    assert call("check", recipe_file, *change) == (2, "", f"error: {recipe_file}: model: {reason}\n")
    for more in ((), ("--train",)):
        assert call("bench", "--arch", "alexnet", *more) == (2, "", f"error: bench: {reason}\n")


def test_divergence_ends_with_3(call, recipe_file: Path, tmp_path: Path):
    changes = ("--set", "pretrain.lr=100", "--set", "pretrain.steps=300", "--set", "pretrain.schedule=constant")
    code, out, err = call("pretrain", recipe_file, "--quiet", *changes)
    assert (code, out) == (3, "")
    assert "diverged at step" in err
    assert not list((tmp_path / "runs").rglob("model.json"))


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_with_its_code_and_keeps_finished_results(recipe_file: Path, signum: int, code: int):
    command = [sys.executable, "-m", "dtlctl", "run", recipe_file, "--set", "finetune.steps=1000000"]
    process = subprocess.Popen(command, cwd=recipe_file.parent, stderr=subprocess.PIPE, text=True)
    finished = recipe_file.parent / "runs" / "tiny" / "pretrain" / "model.json"
    deadline = time.monotonic() + 120
    while not finished.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "stopped by a signal" in err
    assert "Traceback" not in err
    assert finished.exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_memory_that_runs_out_is_told_with_the_job_and_its_keys(opened, monkeypatch, error):
    """A collision can hold one graph at a time; whoever does so, or has none, can only take smaller steps."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dtlctl.stages.dispose.dispose", fail)
    monkeypatch.setattr(runner.data_demands, "check", lambda *_: None)
    experiment = opened('dispose.one.unlearn={kind="gradient-collision", chunks=4, memory="recompute"}')
    smaller = "a batch_size below %d, or more processes, each on a device of its own"
    for model, ways in (
        ("gc", f'unlearn.memory = "recompute", or {smaller % 8}'),
        ("one", smaller % 32),
        ("rand", smaller % 8),
    ):
        with pytest.raises(DtlError) as caught:
            runner.run(experiment, ("dispose",), only=(model,), force=True)
        assert str(caught.value) == f"RECIPE: dispose/{model}: memory ran out\nit takes less with {ways}"
        assert caught.value.exit_code == 1
    monkeypatch.setattr("dtlctl.stages.dispose.dispose", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        runner.run(experiment, ("dispose",), only=("rand",), force=True)


def test_a_system_without_locks_is_told_where_dtlctl_runs(recipe_file: Path):
    """As on Windows, where these modules are not there: one line, not a traceback; the public API works.

    Its `import dtlctl` brings no torch; the first name that is asked for does.
    """
    code = (
        "import sys; sys.modules.update(fcntl=None, resource=None); import dtlctl; assert 'torch' not in sys.modules;"
        "dtlctl.load; assert 'torch' in sys.modules; dtlctl.collide;"
        f"sys.argv = ['dtlctl', 'finetune', {str(recipe_file)!r}]; from dtlctl.cli.app import main; main()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]  # hides filelock's word on a missing fcntl
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "Linux and macOS" in found.stderr and found.stderr.count("\n") == 1
