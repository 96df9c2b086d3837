"""What `dtlctl export` gives away: the target's network as torchvision has it, and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dtlctl.errors import CheckpointError, RecipeError
from dtlctl.model import networks
from dtlctl.recipe.loading import load
from dtlctl.run import export
from dtlctl.run.experiment import Experiment
from dtlctl.stages import runner

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
"""ImageNet's, as torchvision documents them."""


@pytest.fixture
def experiment(finished: Path) -> Experiment:
    """The tiny recipe's finished run, but for one disposal, that somebody has taken away."""
    shutil.rmtree(finished.parent / "runs/tiny/dispose/gc")
    return Experiment(load(finished), finished.parent / "runs", source=str(finished), quiet=True)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "alexnet", "densenet121"])
def test_torchvisions_own_network_loads_it_and_answers_the_same(arch: str):
    """resnet18's last layer is fc, mobilenet's classifier.3, AlexNet's classifier.6, densenet's classifier."""
    model = networks.build(arch, {"source": 7, "target": 3}, stem="imagenet", image_size=64).eval()
    theirs = torchvision.models.get_model(arch, weights=None, num_classes=3)
    theirs.load_state_dict(model.plain_state("target"), strict=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()((x - MEAN) / STD), model(x, "target"), atol=1e-5)


def test_the_tutorials_recipient_gets_it(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's two ways of loading, of an untrained network: ours and torchvision's answer alike."""
    ours_alone = 'arch = "resnet8"\nwidth = 4\nimage_size = 8'
    torchvisions = 'arch = "resnet18"\nstem = "imagenet"\nimage_size = 32'
    recipe_file.write_text(recipe_file.read_text().replace(ours_alone, torchvisions))
    experiment = Experiment(load(recipe_file, ["target-only={steps=1, batch_size=4}"]), tmp_path / "runs", quiet=True)
    runner.run(experiment, ("finetune",), only=("TGT",))
    for name in ("digits", "photographs"):
        export.export(experiment, "TGT", tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/tutorial.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Give a model away\n")
    ways: list[dict[str, Any]] = [{}, {}]
    for scope, block in zip(ways, re.findall(r"```python\n(.*?)```", section, re.DOTALL), strict=True):
        exec(block, scope)
    ours, theirs = (scope["network"] for scope in ways)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()((x - MEAN) / STD), ours(x, "target"), atol=1e-5)


def test_an_exported_model_answers_as_the_runs_own_does(experiment: Experiment, call):
    code, out, err = call("export", experiment.source, "--model", "rand", "--to", "given/rand.safetensors", "--quiet")
    assert (code, out, err) == (0, "given/rand.safetensors\n", "")
    x, own = torch.rand(4, 3, 8, 8), experiment.trainer.load_model("rand").eval()
    theirs = export.load(Path(out.strip()))
    assert theirs.classes == [str(digit) for digit in range(10)]
    with torch.no_grad():
        assert torch.equal(theirs(x), own(x, "target")) and not theirs.training
        assert not torch.equal(theirs(x, "target"), experiment.trainer.load_model("TL").eval()(x, "target"))


def test_nothing_of_the_source_is_in_the_file(experiment: Experiment, tmp_path: Path):
    """No tensor of the source head, under any name, and no word of the run in the header."""
    path = tmp_path / "rand.safetensors"
    export.export(experiment, "rand", path)
    own = experiment.trainer.load_model("rand").state_dict()
    given = load_file(path)
    assert len(given) == len(own) - 2
    for head in ("heads.source.weight", "heads.source.bias"):
        assert not any(t.shape == own[head].shape and torch.equal(t, own[head]) for t in given.values())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["dtlctl"]) == {
            "arch": "resnet8",
            "stem": "small",
            "width": 4,
            "image_size": 8,
            "classes": [str(digit) for digit in range(10)],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    again = tmp_path / "again.safetensors"
    export.export(experiment, "rand", again)
    assert path.read_bytes() == again.read_bytes()


def test_float64_stays_float64(recipe_file: Path, tmp_path: Path):
    experiment = Experiment(load(recipe_file, ["precision=float64"]), tmp_path / "runs", quiet=True)
    runner.run(experiment, ("finetune",), only=("TGT",))
    export.export(experiment, "TGT", tmp_path / "double.safetensors")
    assert next(export.load(tmp_path / "double.safetensors").parameters()).dtype == torch.float64


def test_a_model_that_was_not_disposed_of_is_told(experiment: Experiment, call):
    code, _, err = call("export", experiment.source, "--model", "TL", "--to", "tl.safetensors")
    assert code == 0 and "TL has not been disposed of: it holds all that it learned from the source\n" in err


@pytest.mark.parametrize("words", ["export recipe.toml --to x.safetensors", "report runs/tiny", "verify release"])
def test_a_launcher_is_refused(call, monkeypatch: pytest.MonkeyPatch, words: str):
    """Each of its processes would write the same files, or print the same."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(*words.split())
    assert (code, err) == (2, f"error: {words.split(maxsplit=1)[0]}: start it as one process, without a launcher\n")


@pytest.mark.parametrize(
    ("model", "to", "code", "message"),
    [
        ("pre", "a.safetensors", 2, "has no such model with a target head (valid: TGT, TL, gc, rand)"),
        ("ran", "a.safetensors", 2, "did you mean 'rand'? (valid: TGT, TL, gc, rand)"),
        ("gc", "a.safetensors", 4, "gc has not been made yet; run: dtlctl dispose"),
        ("rand", "runs/tiny/dispose/rand/model.safetensors", 2, "within the run's folder"),
        ("rand", "a.toml/b.safetensors", 2, "--to a.toml/b.safetensors: cannot be written: "),
        ("rand", f"{'a' * 300}.safetensors", 2, "cannot be written: File name too long"),
        ("rand", ".", 2, "--to .: is there, and not only an export; name a new folder, as in --to release\n"),
        ("rand", "..", 2, "name a new folder, as in --to ../release\n"),
        ("rand", "runs/", 2, "--to runs: is there, and not only an export; name a new folder"),
        ("rand", "", 2, "is there, and not only an export"),
        ("rand", "a.txt", 2, "--to a.txt: a file is in safetensors: name it a.safetensors, or a folder"),
        ("rand", "a.onnx", 2, "with --onnx"),
        ("rand", "a.pth", 2, "a file is in safetensors"),
        ("rand", "tiny.toml", 2, "a file is in safetensors"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    experiment: Experiment, call, model: str, to: str, code: int, message: str
):
    Path("a.toml").write_text("")
    weights = experiment.folder / "dispose/rand/model.safetensors"
    before = weights.read_bytes()
    found, out, err = call("export", experiment.source, "--model", model, "--to", to, "--quiet")
    assert (found, out) == (code, "") and message in err and err.count("\n") == 1
    assert weights.read_bytes() == before and not Path("a.safetensors").exists()


def test_only_an_export_is_replaced_and_it_is_said(experiment: Experiment, call):
    """Weights of somebody's own, or another run's, may lie at the place."""
    Path("own.safetensors").write_bytes((experiment.folder / "dispose/rand/model.safetensors").read_bytes())
    code, _, err = call("export", experiment.source, "--model", "rand", "--to", "own.safetensors", "--quiet")
    assert (code, err) == (2, "error: --to own.safetensors: is there, and not an export; choose another name\n")
    for to in ("twice.safetensors", "twice"):
        said = [call("export", experiment.source, "--model", model, "--to", to) for model in ("TGT", "rand")]
        assert [(code, f"export: it replaces an earlier one in {to}\n" in err) for code, _, err in said] == [
            (0, False),
            (0, True),
        ]


@pytest.mark.parametrize("spoil", ["cut", "other", "arch", "tensor"])
def test_a_file_that_export_did_not_write_is_refused(experiment: Experiment, tmp_path: Path, spoil: str):
    path = tmp_path / "rand.safetensors"
    export.export(experiment, "rand", path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif spoil == "other":
        save_file(tensors, path)
    elif spoil == "arch":
        save_file(tensors, path, {"dtlctl": header["dtlctl"].replace("resnet8", "resnet20")})
    else:
        tensors.pop("fc.bias")
        save_file(tensors, path, header)
    with pytest.raises(CheckpointError, match=r"not a (model that dtlctl exported|safetensors file that can be read)"):
        export.load(path)


def test_onnx_answers_as_the_network_does_for_any_number_of_images(experiment: Experiment, call, tmp_path: Path):
    """By onnx's own evaluator. The folder can be checked, and replaced; a damaged file is told."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed; it is in the extra `onnx`")
    reference = pytest.importorskip("onnx.reference", reason="onnx is not installed; it is in the extra `onnx`")
    words = ("export", experiment.source, "--model", "TL", "--to", "release", "--onnx", "-q")
    code, out, err = call(*words)
    assert (code, out, err) == (0, "release\n", "")
    network, own = reference.ReferenceEvaluator("release/model.onnx"), experiment.trainer.load_model("TL").eval()
    for count in (1, 5):
        x = torch.rand(count, 3, 8, 8)
        with torch.no_grad():
            assert network.run(["logits"], {"image": x.numpy()})[0] == pytest.approx(own(x, "target").numpy(), abs=1e-5)
    code, out, _ = call("verify", "release")
    assert code == 0 and "onnx_sha256" in out
    Path("release/model.onnx").write_bytes(b"")
    code, _, err = call("verify", "release")
    assert code == 4 and "release/model.onnx: not the file of this card" in err
    assert call(*words[:-2], "-q")[0] == 0 and not Path("release/model.onnx").exists()


def test_onnx_without_its_packages_or_in_a_file_is_one_line(experiment: Experiment, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for to, words in (("release", "pip install 'dtlctl[onnx]'"), ("a.safetensors", "in a folder")):
        code, out, err = call("export", experiment.source, "--model", "TL", "--to", to, "--onnx", "-q")
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err
        assert not Path(to).exists()


@pytest.mark.parametrize("number", [2**22 + 1, os.getpid()], ids=["another", "this process"])
def test_what_a_killed_export_left_is_put_in_order(tmp_path: Path, monkeypatch, number: int):
    """It dies between its two renames; the next one dies before it has written anything, and the earlier is back.

    Linux numbers processes up to 2**22; in a container the next one may well have the number of the dead one.
    """
    release, files = tmp_path / "release", {"config.json": b"new"}
    for kind in ("old", "tmp"):
        (tmp_path / f".release.{number}.{kind}").mkdir()
        (tmp_path / f".release.{number}.{kind}/config.json").write_text(kind)
    (tmp_path / ".release.backup").mkdir()  # somebody's own
    with monkeypatch.context() as patch:
        patch.setattr(export.checkpoint, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(RecipeError, match="No space left"):
            export.publish(files, release)
    assert (release / "config.json").read_text() == "old"
    export.publish(files, release)
    assert (release / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".release.backup", "release"]
