"""What every test shares: no network, a cache of its own, and a recipe that trains in a second."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

# Before anything imports a Hugging Face library: no test may touch the network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1")

TINY = """
name = "tiny"
[model]
arch = "resnet8"
width = 4
image_size = 8
[data.source]
path = "builtin:digits"
fraction = 0.1
augment = "none"
[data.target]
path = "builtin:digits"
fraction = 0.02
augment = "crop"
[data.piggyback.again]
like = "source"
fraction = 0.03
[pretrain]
steps = 12
batch_size = 20
[finetune]
steps = 4
batch_size = 10
[dispose.gc]
init = "TL"
lambda = 0.1
steps = 6
batch_size = 8
lr = 0.02
repair = 0.5
unlearn = { kind = "gradient-collision", chunks = 2 }
retain = { kind = "distill", on = "source" }
[dispose.rand]
init = "TL"
lambda = 0.1
steps = 4
batch_size = 8
lr = 0.02
unlearn = { kind = "random-labels" }
retain = { kind = "distill", on = "source" }
[piggyback]
steps = 3
batch_size = 10
models = ["scratch", "TL", "gc"]
[audit]
attacks = ["loss"]
modes = ["as-is"]
repeats = 2
relearn_steps = 0
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, or one of them would be left alone at the end: real processes, and types."""
    items.sort(key=lambda item: "dtlctl" not in getattr(item, "fixturenames", ()) and "mypy" not in item.name)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """Decoded images are shared by all tests of a session and by nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTLCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Path:
    """The folder of the tiny recipe's finished run, without a report; made once, for whoever copies it."""
    from dtlctl.recipe.loading import load
    from dtlctl.recipe.plan import STAGES
    from dtlctl.run.experiment import Experiment
    from dtlctl.stages import runner

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(TINY)
    experiment = Experiment(load(folder / "tiny.toml"), folder, quiet=True)
    with experiment.results.opened():
        runner.run(experiment, STAGES)
    return experiment.folder


@pytest.fixture
def finished(_finished: Path, recipe_file: Path) -> Path:
    """The tiny recipe as a file, and its finished run in `runs/tiny` beside it: what a test changes is made anew."""
    shutil.copytree(_finished, recipe_file.parent / "runs" / "tiny", dirs_exist_ok=True)
    return recipe_file


@pytest.fixture
def begun(_finished: Path, tmp_path: Path) -> Path:
    """`runs/tiny` beside the tiny recipe, with pre, TL and TGT of its finished run, and nothing that comes after."""
    left_out = shutil.ignore_patterns("dispose", "piggyback", "audit")
    return shutil.copytree(_finished, tmp_path / "runs" / "tiny", ignore=left_out, dirs_exist_ok=True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are files without a drawing, which is most of what a report costs: for tests of what else is in one."""
    from dtlctl.report import figures

    def save(drawings: dict[str, Any], folder: Path) -> list[dict[str, str]]:
        for path in (folder / f"{name}.{form}" for name in drawings for form in ("png", "svg")):
            path.write_text("")
        kinds = {name: name.partition("-")[0] for name in drawings}
        return [{"kind": kinds[name], "svg": "<svg/>", "caption": text} for name, (_, text) in drawings.items()]

    monkeypatch.setattr(figures, "save", save)


COLLISION = '{kind="gradient-collision", chunks=2, memory="%s"}'
EVERY_LOSS = [
    (COLLISION % "keep", "distill"),
    (COLLISION % "batched", "distill"),
    (COLLISION % "recompute", "distill"),
    ('{kind="random-labels"}', "distill"),
    ('{kind="uniform"}', "target-ce"),
    ('{kind="negative-ce"}', "a-gem"),
    ('{kind="null-space", stages=2}', "distill"),
    ('{kind="simulated-attacker", steps=2}', "distill"),
    ('{kind="none"}', "distill"),
]
"""(unlearn, kind of retain): every loss once, and gradient collision in every way of holding graphs."""


@pytest.fixture
def opened(recipe_file: Path):
    """Open the tiny recipe, changed, with one short variant more, `one`."""
    from dtlctl.recipe.loading import load
    from dtlctl.run.experiment import Experiment

    def new_experiment(*changes: str) -> Experiment:
        recipe_file.write_text(
            recipe_file.read_text()
            + '[dispose.one]\ninit = "TL"\nlambda = 0.1\nsteps = 3\nbatch_size = 32\nclip = 1.0\n'
        )
        return Experiment(load(recipe_file, list(changes)), recipe_file.parent / "runs", quiet=True)

    return new_experiment


@pytest.fixture
def forked(tmp_path: Path):
    """Run the command line in new processes, in an empty folder; starting Python and torchrun is left out."""
    from tests.reliability.fork import command, together

    return lambda *arguments, **group: together(partial(command, *arguments), tmp_path, **group)


@pytest.fixture
def dtlctl(tmp_path: Path):
    """Run the command line as a user does, by torchrun where there are processes, in an empty folder."""

    def call(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "-m"]
        command = [*launcher, "dtlctl", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    return call


@pytest.fixture
def call(monkeypatch, capsys, tmp_path: Path):
    """Run a command in this process: (exit code, stdout, stderr)."""
    from dtlctl.cli.app import main
    from dtlctl.console import stop

    monkeypatch.chdir(tmp_path)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself printed while it made its data
        monkeypatch.setattr(sys, "argv", ["dtlctl", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    stop.listen()  # a signal of this test is none of the next one's
    for number, handler in handlers:
        signal.signal(number, handler)
