"""An exported folder: loaded by others, verified, replaced whole, and honest about what was not measured."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from PIL import Image

import dtlctl
from dtlctl.data.pixels import decode
from dtlctl.errors import CheckpointError
from dtlctl.recipe.loading import load
from dtlctl.report import card
from dtlctl.report.summary import summarise
from dtlctl.run import export
from dtlctl.run.experiment import Experiment
from dtlctl.stages import runner


@pytest.fixture
def experiment(finished: Path) -> Experiment:
    """The tiny recipe with TGT, TL and attacked disposals; runs/tiny."""
    return Experiment(load(finished), finished.parent / "runs", source=str(finished), quiet=True)


def pieces(folder: Path) -> tuple[str, list[str]]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text, re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    "model",
    [
        "stem = 'imagenet'\nimage_size = 16",
        'arch = "resnet10"\nimage_size = 8',
        'arch = "resnet20"\nwidth = 4\nimage_size = 8',
    ],
)
def test_plain_torchvision_has_the_reports_accuracy_to_the_digit(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
):
    """By the card's own lines, and config.json for the preprocessing of the data's uint8 pixels.

    Either stem, also of a ResNet that torchvision has no name for, and a ResNet for CIFAR.
    """
    recipe_file.write_text(recipe_file.read_text().replace('arch = "resnet8"\nwidth = 4\nimage_size = 8', model))
    experiment = Experiment(load(recipe_file), tmp_path / "runs", source=str(recipe_file), quiet=True)
    with experiment.results.opened():
        runner.run(experiment, ("finetune",), only=("TGT",))
    document = summarise([experiment.folder])
    export.publish(card.folder(experiment, "TGT", document), tmp_path / "release")
    text, (load_it, picture_of_it) = pieces(tmp_path / "release")
    monkeypatch.chdir(tmp_path / "release")
    scope: dict[str, Any] = {}
    exec(load_it, scope)
    config = json.loads(Path("config.json").read_text())["preprocessing"]
    images = experiment.data.images("target", "test")
    x = torch.from_numpy(np.array(images.pixels)).float() / 255
    x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.no_grad():
        answers = torch.cat([scope["model"](part) for part in x.split(200)]).argmax(1).numpy()
    accuracy = 100 * float((answers == images.labels).mean())
    (row,) = [row for row in document["rows"] if row["model"] == "TGT"]
    assert accuracy == row["acc_t"] == ModelCard(text).data.eval_results[0].metric_value
    assert "It was not attacked: it never saw the source." in text
    Image.fromarray(np.array(images.pixels[0]).transpose(1, 2, 0)).save("photo.png")
    exec(picture_of_it, scope)
    size = config["size"]
    half_clear = Image.new("RGBA", (size + 4, size), (0, 90, 200, 100))
    for name, picture in [("RGBA", half_clear), ("P", half_clear.quantize()), ("L", half_clear.convert("L"))]:
        picture.save("photo.png")
        exec(picture_of_it, scope)
        read = (scope["x"][0] * torch.tensor(config["std"]).view(3, 1, 1)) + torch.tensor(config["mean"]).view(3, 1, 1)
        trained_on, *_ = decode(Path("photo.png").read_bytes(), size, name)
        assert np.abs(255 * read.numpy() - trained_on).max() < 0.1, name
    assert card.verify(Path.cwd(), experiment)["acc_t"] == accuracy


def test_a_folder_is_written_verified_and_replaced(experiment: Experiment, call):
    code, out, err = call("export", experiment.source, "--model", "TL", "--to", "given/one", "-q")
    assert (code, out, err) == (0, "given/one\n", "")
    given = Path("given/one")
    assert sorted(path.name for path in Path("given").iterdir()) == ["one"]
    assert sorted(path.name for path in given.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    text, code_blocks = pieces(given)
    assert "**It has not been disposed of" in text and "never attacked:" not in text and len(code_blocks) == 2
    assert all(line.startswith("```") for line in text.splitlines() if "```" in line)  # or Markdown goes on with code
    for private in ("pretrain/", str(experiment.folder), "builtin:"):
        assert private not in text
    x = torch.rand(4, 3, 8, 8)
    own = experiment.trainer.load_model("TL").eval()
    with torch.no_grad():
        assert torch.equal(dtlctl.load("given/one")(x, "target"), own(x, "target"))
    code, out, _ = call("verify", given, experiment.source, "--json")
    sidecar = json.loads((experiment.folder / "finetune/model.json").read_text())
    assert code == 0 and json.loads(out)["acc_t"] == sidecar["metrics"]["acc_t"]
    code, out, err = call("export", experiment.source, "--model", "rand", "--to", "given/one", "--json")
    assert code == 0 and json.loads(out) == {"model": "rand", "to": "given/one"}
    assert "rand was never attacked" in err and "**This model was never attacked" in pieces(given)[0]
    code, _, err = call("export", experiment.source, "--model", "TGT", "--to", "given/two")
    assert code == 0 and "never attacked:" not in err + (text := pieces(Path("given/two"))[0])
    assert "It was not attacked: it never saw the source." in text
    before = (given / "README.md").read_bytes()
    (given / "mine.txt").write_text("")
    code, _, err = call("export", experiment.source, "--model", "TL", "--to", "given/one", "-q")
    assert code == 2 and "not only an export" in err and (given / "README.md").read_bytes() == before


def test_limits_that_were_changed_for_the_export_are_told(experiment: Experiment, call):
    for limit, told in ((100, True), (None, False)):
        change = () if limit is None else ("--set", f"publish.price={limit}")
        code, _, err = call("export", experiment.source, "--model", "TL", "--to", f"given/{limit}", *change)
        assert code == 0, err
        assert (
            "changed after the evidence was there: price from None to 100" in pieces(Path(f"given/{limit}"))[0]
        ) == told


def test_without_a_name_it_is_what_the_verdict_recommends(experiment: Experiment, call):
    """Where nothing is known of scratch there is no verdict, and a name is asked for."""
    shutil.rmtree(experiment.folder / "piggyback/scratch")
    code, _, err = call("export", experiment.source, "--to", "release", "-q")
    assert code == 2 and "--model" in err and "TGT, TL, gc, rand" in err and err.count("\n") == 1
    shutil.rmtree(experiment.folder / "dispose/rand")  # the evidence lacks it, and no limit is missed
    code, _, err = call("export", experiment.source, "--model", "rand", "--to", "release", "--set", "publish.price=2")
    assert code == 4 and "rand has not been made yet; run: dtlctl dispose" in err
    document = {"verdict": {"recommended": "TL", "sentences": []}}
    assert card.known(experiment, None, document) == "TL"


def test_a_run_of_another_recipe_is_no_evidence(experiment: Experiment, call):
    code, _, err = call("export", experiment.source, "--model", "TL", "--to", "release", "--set", "audit.repeats=3")
    assert code == 2 and "made from other settings of audit; repeat the --set of the run, or run: dtlctl run" in err


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("config.json", b'"0"', b'"1"', "config.json: not the file of this card"),
        ("README.md", b"weights: ", b"weights: 0", "model.safetensors: not the file of this card"),
        ("README.md", b"value: ", b"value: 9", "Acc_t is"),
        ("README.md", b"dtlctl:", b"others:", "not a folder that dtlctl exported"),
        ("model.safetensors", b"dtlctl", b"dtlctx", "model.safetensors: not the file of this card"),
    ],
)
def test_verify_finds_what_was_changed(
    experiment: Experiment, tmp_path: Path, name: str, old: bytes, new: bytes, words: str
):
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    file = tmp_path / "release" / name
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=words):
        card.verify(tmp_path / "release", experiment)


@pytest.mark.parametrize(("images", "same"), [(1, True), (-1, True), (2, False), (-2, False)])
def test_verify_forgives_an_image_that_another_processor_rounds_otherwise(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, same: bool
):
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    said = card.verify(tmp_path / "release", experiment)
    here = said["acc_t_card"] + 100 * images / len(experiment.data.images("target", "test").labels)
    assert said["acc_t"] == said["acc_t_card"]
    monkeypatch.setattr(experiment.trainer, "measured", lambda *_: {"acc_t": here})
    with nullcontext() if same else pytest.raises(CheckpointError, match="Acc_t is"):
        assert card.verify(tmp_path / "release", experiment)["acc_t"] == here


def test_an_accuracy_that_is_no_number_is_another(experiment: Experiment, tmp_path: Path):
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    page = tmp_path / "release/README.md"
    page.write_text(re.sub(r"(value: )[\d.]+", r"\1.nan", page.read_text(), count=1))
    with pytest.raises(CheckpointError, match="not nan"):
        card.verify(tmp_path / "release", experiment)


def test_verify_refuses_a_network_that_the_card_does_not_know(experiment: Experiment, tmp_path: Path):
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    (tmp_path / "release/model.onnx").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"model\.onnx: not the file of this card"):
        card.verify(tmp_path / "release")


def test_a_card_has_the_audit_also_where_it_is_of_a_head_fitted_anew(experiment: Experiment):
    path = experiment.folder / "audit/gc.json"
    sidecar = json.loads(path.read_text())
    sidecar["metrics"] |= {"source_head": "never trained", "reprobe": {"loss": sidecar["metrics"]["loss"]}}
    path.write_text(json.dumps(sidecar))
    text = card.folder(experiment, "gc", summarise([experiment.folder]))["README.md"].decode()
    assert "strongest membership attack has an AUC of" in text and "no audit of this model" not in text


def test_verify_without_a_folder_is_told(call):
    code, _, err = call("verify", "nowhere", "-q")
    assert code == 4 and "not a folder that dtlctl exported" in err and err.count("\n") == 1


def test_another_classes_order_is_a_mismatch(experiment: Experiment, tmp_path: Path, monkeypatch):
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    monkeypatch.setattr(experiment.data, "classes", lambda role: tuple("9876543210"))
    with pytest.raises(CheckpointError, match="its classes are not those"):
        card.verify(tmp_path / "release", experiment)


def test_a_folder_that_cannot_be_written_leaves_nothing_and_the_old_one(experiment: Experiment, tmp_path, monkeypatch):
    files = card.folder(experiment, "TL", summarise([experiment.folder]))
    export.publish(files, tmp_path / "release")
    monkeypatch.setattr(export.checkpoint, "write", lambda *_: (_ for _ in ()).throw(CheckpointError("disk full")))
    with pytest.raises(dtlctl.errors.RecipeError, match="disk full"):
        export.publish({**files, "README.md": b""}, tmp_path / "release")
    assert (tmp_path / "release/README.md").read_bytes() == files["README.md"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".release")]


def faults(content: str) -> list[str]:
    """What the hub finds in a card's metadata, by its specification (hub-docs, modelcard.md)."""
    head = yaml.safe_load(content.split("---\n")[1])
    found = [name for name in ("library_name", "pipeline_tag") if not isinstance(head.get(name), str)]
    found += ["pipeline_tag"] * (head["pipeline_tag"] != "image-classification")
    found += ["tags"] * (not all(isinstance(tag, str) for tag in head["tags"]))
    for model in head["model-index"]:
        found += ["name"] * (not isinstance(model["name"], str))
        for result in model["results"]:
            named = {
                "task.type": result["task"]["type"],
                **{f"dataset.{k}": result["dataset"][k] for k in ("type", "name")},
            }
            found += [name for name, value in named.items() if not (isinstance(value, str) and value)]
            for metric in result["metrics"]:
                found += ["metric"] * (not (isinstance(metric["type"], str) and isinstance(metric["value"], float)))
    return found


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push asks for. It keeps the files that it is given, and refuses a card with faults."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        at, code, answer = self.path.partition("?")[0], 200, dict[str, Any]()
        if at == "/api/repos/create":
            answer = {
                "url": f"http://{self.headers['Host']}/{json.loads(asked)['organization']}/{json.loads(asked)['name']}"
            }
        elif at == "/api/validate-yaml":
            errors = faults(json.loads(asked)["content"])
            code, answer = (400 if errors else 200), {"errors": [{"message": text} for text in errors], "warnings": []}
        elif at.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(asked)["files"]
            ]
            answer = {"files": files}
        elif at.endswith("/commit/main"):
            for line in map(json.loads, asked.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1" * 40}
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub on this machine, for processes that are started under it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.files.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine", "NO_PROXY": "127.0.0.1",
                        "HF_HOME": str(tmp_path / "hub")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield address
    server.shutdown()
    server.server_close()


PUSHED = """
import sys
from dtlctl.cli.app import main
from dtlctl.run.export import push
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("accepted")
push({"README.md": sys.stdin.read().encode()}, "me/mine")
"""


def test_the_hub_gets_the_same_files_and_its_own_validation_accepts_the_card(
    experiment: Experiment, hub: str, tmp_path: Path
):
    """By a push to a server here, which huggingface_hub asks before; a card without a number is refused.

    A process of its own: huggingface_hub reads where the hub is when it is imported.
    """
    made = card.folder(experiment, "TL", summarise([experiment.folder]))
    words = ["export", experiment.source, "--model", "TL", "--to", "hf:me/mine", "-q"]
    given = re.sub(r"value: [\d.]+", "value: none", made["README.md"].decode())
    command = [sys.executable, "-c", PUSHED, *words]
    ended = subprocess.run(command, cwd=tmp_path, input=given, text=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, f"{hub}/me/mine\naccepted\n"), ended.stderr
    assert Hub.files == made
    assert "RecipeError: " in ended.stderr and "metric" in ended.stderr


def test_a_hub_that_is_out_of_reach_is_told_in_a_line(experiment: Experiment, call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("offline\nnow")))
    code, _, err = call("export", experiment.source, "--model", "TL", "--to", "hf:me/mine", "-q")
    assert (code, err) == (2, "error: --to hf:me/mine: offline now\n")


def test_an_exported_folder_is_adopted(experiment: Experiment, recipe_file: Path, tmp_path: Path):
    """As TL of another run: by the class names of its header."""
    export.publish(card.folder(experiment, "TL", summarise([experiment.folder])), tmp_path / "release")
    again = Experiment(
        load(recipe_file, [f"finetune.weights='{tmp_path / 'release'}'"]), tmp_path / "again", quiet=True
    )
    runner.run(again, ("finetune",))
    made, before = (json.loads((e.folder / "finetune/model.json").read_text()) for e in (again, experiment))
    assert made["metrics"]["acc_t"] == before["metrics"]["acc_t"]
    assert any("matched by name" in note["text"] for note in made["notes"]["weights"])
    sha, config = (
        hashlib.sha256((tmp_path / "release" / n).read_bytes()).hexdigest()
        for n in ("model.safetensors", "config.json")
    )
    assert made["weights"] == {"sha256": sha, "config_sha256": config}
    with again.results.opened():
        table = summarise([again.folder])
        text, apart = (card.folder(again, model, table)["README.md"].decode() for model in ("TL", "TGT"))
    assert f"weights from outside that TL is: `{sha}`" in text and "matched by name" not in text
    assert "from outside" not in apart  # TGT was trained here, of nothing else
    shutil.rmtree(tmp_path / "release")
    with pytest.raises(CheckpointError, match="does not exist"):
        Experiment(again.recipe, tmp_path / "again", quiet=True)
