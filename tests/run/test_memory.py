"""A dataset several times larger than the memory that is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOM, SIZE = 64 << 20, 128
IMAGES = 4 * ROOM // (3 * SIZE**2) + 1

# The first run, on few images, takes what torch, threads, processes and a batch need at most; then there is ROOM more.
PROGRAM = f"""
import re, resource, sys
from pathlib import Path
import numpy as np
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment
from dtlctl.stages.runner import run

def stages(*changes):
    experiment = Experiment(load(Path("tiny.toml"), list(changes)), Path("runs"), quiet=True)
    with experiment.results.opened():
        run(experiment, ("pretrain", "piggyback", "audit"), only=("pre", "scratch"))

way = f"data.source.decode={{sys.argv[1]}}"
stages("name=few", way, "data.source.path=few")
held = int(re.search(r"VmPeak:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (held + {ROOM}, resource.RLIM_INFINITY))
try:
    np.empty(4 * {ROOM}, np.uint8)
except MemoryError:
    stages("name=large", way, "data.source.path=large")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="addresses are counted on Linux alone")
@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_a_dataset_four_times_the_addresses_left_is_trained_on_and_attacked(
    recipe_file: Path, tmp_path: Path, decode: str, monkeypatch: pytest.MonkeyPatch
):
    """The subset of the source, of its attacker and of its audit is all of it."""
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for split, count in (("large/train", IMAGES), ("large/test", 24), ("few/train", 60), ("few/test", 24)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    for old, new in (
        ("image_size = 8", f"image_size = {SIZE}"),
        ("fraction = 0.1\n", ""),
        ('like = "source"\nfraction = 0.03', 'like = "source"'),
        ("steps = 12\nbatch_size = 20", "steps = 3\nbatch_size = 8"),
        ('path = "builtin:digits"\nfraction = 0.02', 'path = "few"'),
    ):
        assert old in recipe_file.read_text()
        recipe_file.write_text(recipe_file.read_text().replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, decode]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {str(path.relative_to(tmp_path / "runs/large")) for path in (tmp_path / "runs/large").rglob("*.json")}
    assert made >= {"pretrain/model.json", "piggyback/scratch/again.json", "audit/pre.json"}
