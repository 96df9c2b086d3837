"""Networks of timm, where it is installed: `pip install 'dtlctl[timm]'`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dtlctl.errors import CheckpointError
from dtlctl.model import networks, weights
from dtlctl.report import card
from dtlctl.run import export

SPEC: dict[str, Any] = {"stem": "imagenet", "width": None, "image_size": 32}


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="the extra timm is not installed")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timms_own_network_loads_it_by_the_cards_lines_and_answers_the_same(
    timm: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Last layers fc, head.fc, head and classifier; the transformer is built for images of 32 pixels."""
    described = {"arch": f"timm:{name}", **SPEC}
    torch.manual_seed(1)
    model = networks.build(heads={"target": 3}, **described).eval()
    header = {"dtlctl": json.dumps({**described, "classes": ["a", "b", "c"]})}
    save_file({n: t.contiguous() for n, t in model.plain_state("target").items()}, tmp_path / card.WEIGHTS, header)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(card._code({**described, "classes": [*"abc"]}), scope)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        answers = model(x, "target")
        assert torch.allclose(scope["model"]((x - model.mean) / model.std), answers, atol=1e-5)
        assert torch.equal(export.load(card.WEIGHTS)(x, "target"), answers)
    assert sum(networks.shares(model.backbone).values()) == pytest.approx(1)
    assert len(networks.stages(model.backbone)) >= 3


def test_a_folder_from_the_hub_brings_classes_and_normalisation(timm: Any, tmp_path: Path):
    """timm's config.json: a mean other than the recipe's is refused with what to write; then classes go by name."""
    theirs = timm.create_model("resnet18", num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    told = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "input_size": [3, 224, 224], "interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": told, "label_names": ["b", "a", "c"]}))
    network = {"arch": "timm:resnet18", **SPEC, "mean": networks.MEAN, "std": networks.STD}
    with pytest.raises(CheckpointError, match=r"write mean = \[0.5, 0.5, 0.5\]"):
        weights.read(str(tmp_path), network)
    given = weights.read(str(tmp_path), {**network, "mean": told["mean"], "std": told["std"]})
    assert given.classes == ["b", "a", "c"] and "224 pixels" in given.notes[0]
    model = networks.build(heads={}, **{"arch": "timm:resnet18", **SPEC})
    model.backbone.load_state_dict(given.backbone, strict=False)
    assert "reordered" in weights.fill_head(model, "target", given, ("a", "b", "c"))
    assert torch.equal(model.heads["target"].bias, theirs.state_dict()["fc.bias"][[1, 0, 2]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"pretrained_cfg": null}', "config.json: pretrained_cfg: "),
        ('{"pretrained_cfg": {"mean": [0.5, 0.5]}}', "config.json: pretrained_cfg.mean"),
        ('{"pretrained_cfg": {"std": [1, 1, 0]}}', "config.json: pretrained_cfg.std.2: .* greater than 0"),
        ('{"architecture": ["resnet18"]}', "config.json: architecture: "),
        ('{"label_names": {"a": 1}}', "config.json: label_names: "),
        ("{not", "config.json: Invalid JSON"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(tmp_path: Path, text: str, words: str):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        weights.tensors_of(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("resnet19", {}, "no network 'resnet19'; did you mean 'resnet18'"),
        ("deit_tiny_distilled_patch16_224", {}, "more than one linear layer"),
        ("resnet18", {"stem": "small"}, 'needs stem = "imagenet"'),
        ("vit_tiny_patch16_224", {"image_size": 40}, "cannot take images of 40 pixels"),
        ("hf-hub:timm/resnet18", {}, "no network"),
    ],
)
def test_what_timm_cannot_be_is_told(timm: Any, name: str, changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        networks.check(f"timm:{name}", **{**SPEC, **changes})


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install 'dtlctl\[timm\]'"):
        networks.check("timm:resnet18", "imagenet", None, 32)


def test_patches_of_one_size_both_ways_are_known(timm: Any):
    """XCiT tells 16, where others tell (16, 16)."""
    networks.check("timm:xcit_nano_12_p16_224", **{**SPEC, "image_size": 32})
    with pytest.raises(ValueError, match="cannot take images of 40 pixels"):
        networks.check("timm:xcit_nano_12_p16_224", **{**SPEC, "image_size": 40})
