"""What docs/reliability.md promises, one promise a test; test_faults.py breaks things at random."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dtlctl.console import stop
from dtlctl.console.progress import Progress
from dtlctl.console.stop import SIGNALS
from dtlctl.data import cache
from dtlctl.data.dataset import Dataset
from dtlctl.data.sources import Source
from dtlctl.errors import CheckpointError, RecipeError, Stopped
from dtlctl.model import networks
from dtlctl.recipe.loading import load
from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Training
from dtlctl.storage import checkpoint, lock
from dtlctl.training.engine import Engine
from dtlctl.training.resume import StateFile
from tests.conftest import TINY
from tests.reliability.fork import together

ROOT = Path(__file__).parents[2]


@pytest.fixture
def listening():
    """Signals are taken as the command line takes them."""
    handlers = [(number, signal.getsignal(number)) for number in SIGNALS]
    stop.listen()
    yield
    stop.listen()
    for number, handler in handlers:
        signal.signal(number, handler)


class Dropping(nn.Module):
    """A model that draws random numbers of its own at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path, listening, capsys, schedule: str):
    """Stopped after 4 and after 7 of 10 steps: weights, buffers, history as without. Random numbers, momentum and the
    learning rate all matter: leaving any of them out of the state makes this fail. What is 1 in five steps, and is not
    reported after them, has a mean of 1 up to a row at step 5."""
    engine = Engine()
    x, y = torch.randn(10, 8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3

    def train(stops: list[int]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        torch.manual_seed(0)
        model = Dropping()

        def objective(step: int):
            if stops and step == stops[0]:
                stops.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            loss = F.cross_entropy(model(x[step]), y)
            return loss, {"loss": loss.detach(), **({"early": torch.tensor(1.0)} if step < 5 else {})}

        plan = Training(steps=10, batch_size=8, schedule=schedule)
        memory = StateFile(tmp_path / "state.safetensors", "key")
        bar = Progress("work", 10)
        history = engine.train(model, objective, plan, 10, 8, bar, lambda _: {}, reports=3, also=(5,), resume=memory)
        memory.forget()
        return model.state_dict(), history.rows

    whole, rows = train([])
    stops = [3, 6]
    for _ in range(2):
        with pytest.raises(Stopped):
            train(stops)
        stop.listen()
    capsys.readouterr()
    resumed, again = train([])
    said = r"work: goes on from step 7 of 10, saved at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.dumps(rows) == json.dumps(again)
    assert [(row["step"], row.get("early")) for row in again] == [(3, 1), (5, 1), (6, None), (9, None), (10, None)]


def test_how_often_state_is_saved_is_no_part_of_a_result(call, recipe_file: Path):
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    _, _, err = call("pretrain", recipe_file, "--set", "checkpoint_minutes=1.5")
    assert "everything is up to date" in err


def test_a_second_run_on_a_folder_is_refused_and_names_the_first(call, recipe_file: Path, tmp_path: Path):
    with lock.held(tmp_path / "runs" / "tiny"):
        code, _, err = call("pretrain", recipe_file)
        assert (code, err.count("\n")) == (4, 1)
        assert f"in use by process {os.getpid()} on " in err
        assert call("check", recipe_file)[0] == 0  # looking is free
    assert not (tmp_path / "runs" / "tiny" / ".lock").exists()


def test_a_stale_lock_is_explained_and_taken_over(call, recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text('{"pid": 4194304, "host": "gone", "since": "2026-01-01T00:00:00Z"}')
    code, _, err = call("pretrain", recipe_file)
    assert code == 0
    assert "process 4194304 on gone since 2026-01-01T00:00:00Z ended without letting go" in err


@pytest.mark.parametrize("name", ["", "pretrain", "pretrain/model.resume", "dispose", "report"])
def test_a_link_out_of_the_run_folder_is_refused(call, recipe_file: Path, tmp_path: Path, name: str):
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "runs" / "tiny" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    code, _, err = call("pretrain", recipe_file)
    assert code == 4
    assert "leads out of the run's folder" in err
    assert not list(outside.iterdir())


def test_half_written_files_are_swept_at_start(call, recipe_file: Path, tmp_path: Path):
    folder = tmp_path / "runs" / "tiny" / "pretrain"
    resume = folder / "model.resume"
    resume.mkdir(parents=True)
    for name in (".model.json.7.tmp", ".model.safetensors.next", "..model.safetensors.next.7.tmp"):
        (folder / name).write_bytes(b"half")
    (resume / ".state.safetensors.7.tmp").write_bytes(b"half")
    assert call("finetune", recipe_file, "--only", "TGT", "--quiet")[0] == 0
    assert list(folder.iterdir()) == [resume]
    assert not list(resume.iterdir())


def test_a_half_written_file_of_a_dead_process_with_our_number_is_in_nobodys_way(tmp_path: Path):
    """In a container every process may have the same. A link that lies there is removed, not followed."""
    temporary, outside = tmp_path / f".state.{os.getpid()}.tmp", tmp_path / "outside"
    temporary.write_bytes(b"half")
    checkpoint.write(tmp_path / "state", b"whole")
    temporary.symlink_to(outside)
    checkpoint.write(tmp_path / "state", b"again")
    assert (tmp_path / "state").read_bytes() == b"again"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def killed_while_it_decodes() -> None:
    cache._decode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cache.load(Source(Dataset(path="builtin:digits")), "train", 8)


def test_a_dead_process_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DTLCTL_CACHE", str(tmp_path / "cache"))
    assert together(killed_while_it_decodes, tmp_path).returncode == -9
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".tmp"}
    cache.load(Source(Dataset(path="builtin:digits")), "train", 8)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [""]


@pytest.mark.parametrize(("weights", "sidecar", "found"), [
    (False, False, "old"), (True, False, "old"), (True, True, "new"), ("placed", True, "new"), ("broken", True, "old"),
])  # fmt: skip
def test_an_unfinished_publication_is_finished_or_undone(
    tmp_path: Path, weights: bool | str, sidecar: bool, found: str
):
    """Whatever of the two `.next` files a crash has left: the old checkpoint or the new one, whole."""
    old, new = (networks.build("resnet8", {"source": 2}, width=4) for _ in range(2))
    checkpoint.publish(tmp_path, old, {"format": 1, "key": "old"})
    other = tmp_path / "other"
    other.mkdir()
    checkpoint.publish(other, new, {"format": 1, "key": "new"})
    if weights:
        place = "model.safetensors" if weights == "placed" else ".model.safetensors.next"
        blob = (other / "model.safetensors").read_bytes()
        (tmp_path / place).write_bytes(blob[:-1] if weights == "broken" else blob)
    if sidecar:
        (tmp_path / ".model.json.next").write_bytes((other / "model.json").read_bytes())
    checkpoint.settle(tmp_path)
    document = checkpoint.read_sidecar(tmp_path / "model.json")
    assert document is not None and document["key"] == found
    checkpoint.load_weights(tmp_path, document, old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors", "other"]


def test_no_file_of_a_stranger_runs_code(call, recipe_file: Path, tmp_path: Path):
    """A pickle that leaves a canary behind, in the place of everything that is read."""
    canary = tmp_path / "canary"
    blob = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    assert call("pretrain", recipe_file, "--quiet")[0] == 0
    folder = tmp_path / "runs" / "tiny" / "pretrain"
    (tmp_path / "images" / "train" / "a").mkdir(parents=True)
    (tmp_path / "data.parquet").write_bytes(blob)
    (tmp_path / "images" / "train" / "a" / "1.png").write_bytes(blob)
    for arguments, place in (
        (("finetune", recipe_file, "--only", "TL"), folder / "model.safetensors"),
        (("finetune", recipe_file, "--only", "TL"), folder / "model.json"),
        (("pretrain", recipe_file, "--force"), folder / "model.resume" / "state.safetensors"),
        (("pretrain", recipe_file, "--set", "name=x", "--set", "data.source.path=./data.parquet"), None),
        (("pretrain", recipe_file, "--set", "name=x", "--set", "data.source.path=./images"), None),
        (("check", tmp_path / "other.toml"), tmp_path / "other.toml"),
    ):
        if place:
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(blob)
        code, _, err = call(*arguments, *(() if arguments[0] == "check" else ("--quiet",)))
        assert code in (2, 4), (arguments, err)
        assert "Traceback" not in err
    assert not canary.exists()
    import pickle

    pickle.loads(blob)
    assert canary.exists()  # it would have sung


def test_only_a_hub_id_touches_the_network(call, recipe_file: Path, tmp_path: Path, monkeypatch):
    tried: list[object] = []

    def refuse(*arguments: object) -> None:
        tried.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda _, address: refuse(address))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    from PIL import Image

    for shade, path in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / "images" / path).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (8, 8), (number, shade, 3)).save(tmp_path / "images" / path / f"{number}.png")
    local = ("--set", "data.source.path=./images", "--set", "data.source.fraction=1.0", "--set", "name=local")
    assert call("pretrain", recipe_file, "--quiet", *local)[0] == 0
    assert not tried
    hub = ("--set", "data.source.path=nobody/nothing", "--set", "name=hub")
    code, _, err = call("pretrain", recipe_file, "--quiet", *hub)
    assert (code, "could not be loaded" in err) == (4, True)
    assert not tried  # HF_HUB_OFFLINE is set, and respected


DAMAGE = st.lists(
    st.tuples(st.integers(0, len(TINY)), st.integers(0, 6), st.text(max_size=3) | st.sampled_from('[]{}="\n.,#0')),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DAMAGE)
def test_a_damaged_recipe_is_a_recipe_or_a_recipe_error(tmp_path: Path, damage: list[tuple[int, int, str]]):
    """Cut out and put in at random; the message is one or two printable lines."""
    text = TINY
    for place, cut, put in damage:
        text = text[:place] + put + text[place + cut :]
    file = tmp_path / "r.toml"
    file.write_bytes(text.encode("utf-8", "replace"))
    try:
        assert isinstance(load(file), Recipe)
    except RecipeError as error:
        lines = str(error).split("\n")
        assert len(lines) <= 2 and all(line.isprintable() for line in lines), error


def test_a_sidecar_that_lies_about_types_is_refused(tmp_path: Path):
    path = tmp_path / "model.json"
    for change in ({"key": 1}, {"parent": []}, {"heads": {"a.b": 1}}, {"heads": {"a": 10**9}}, {"weights_sha256": "x"}):
        path.write_text(json.dumps({"format": 1, **change}))
        with pytest.raises(CheckpointError, match="not a sidecar of format 1"):
            checkpoint.read_sidecar(path)
