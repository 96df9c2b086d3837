"""Weights from outside: what fits, what does not, and what is never opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from dtlctl.errors import CheckpointError
from dtlctl.model import networks, weights

TINY = {"arch": "resnet8", "stem": "small", "width": 4, "image_size": 8, "mean": networks.MEAN, "std": networks.STD}
LARGE = {**TINY, "arch": "resnet18", "stem": "imagenet", "width": None, "image_size": 32}


def built(network: dict[str, Any], classes: int) -> networks.Classifier:
    torch.manual_seed(1)
    return networks.build(heads={"source": classes}, **network).eval()


def saved(path: Path, network: dict[str, Any] = TINY, **said: Any) -> dict[str, Tensor]:
    """A file with torchvision's names, as if somebody else had written it, or with our header."""
    tensors = {name: t.clone() for name, t in built(network, 3).plain_state("source").items()}
    save_file(tensors, path, {"dtlctl": json.dumps(said)} if said else None)
    return tensors


def test_torchvisions_own_file_becomes_a_classifier_that_answers_the_same(tmp_path: Path):
    """A plain state dict of torchvision's network; the two normalise alike."""
    torch.manual_seed(2)
    theirs = torchvision.models.resnet18(weights=None, num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    given = weights.read(str(tmp_path / "theirs.safetensors"), LARGE)
    ours = networks.build(heads={}, **LARGE).eval()
    ours.backbone.load_state_dict(given.backbone, strict=False)
    said = weights.fill_head(ours, "target", given, ("a", "b", "c"))
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (networks.MEAN, networks.STD))
    with torch.no_grad():
        assert torch.allclose(theirs((x - mean) / std), ours(x, "target"), atol=1e-5)
    assert "nothing names them" in said


def test_outputs_follow_the_names_of_classes(tmp_path: Path):
    """The file's order is b, a, c; the data's a, b: its rows 1 and 0, and c is left out."""
    tensors = saved(tmp_path / "named.safetensors", classes=["b", "a", "c"])
    given = weights.read(str(tmp_path / "named.safetensors"), TINY)
    model = built(TINY, 3)
    said = weights.fill_head(model, "source", given, ("a", "b"))
    assert torch.equal(model.heads["source"].weight, tensors["fc.weight"][[1, 0]])
    assert torch.equal(model.heads["source"].bias, tensors["fc.bias"][[1, 0]])
    assert "reordered" in said and "1 others" in said
    with pytest.raises(ValueError, match="no class 'd'"):
        weights.fill_head(model, "source", given, ("a", "d"))
    by_recipe = weights.read(str(tmp_path / "named.safetensors"), TINY, ["a", "b", "c"])
    assert "reordered" not in weights.fill_head(model, "source", by_recipe, ("a", "b", "c"))


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_outputs_as_classes_where_nothing_names_them(tmp_path: Path, count: int):
    saved(tmp_path / "plain.safetensors")
    given = weights.read(str(tmp_path / "plain.safetensors"), TINY)
    with pytest.raises(ValueError, match=f"3 outputs; data.source has {count} classes"):
        weights.fill_head(built(TINY, 3), "source", given, [*"abcd"[:count]])


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_files_without_a_head_or_counts_of_batches_are_whole(tmp_path: Path):
    """torch's batch norms count batches since 0.4.1 only."""
    tensors = saved(tmp_path / "a.safetensors")
    counts = [name for name in tensors if name.endswith("num_batches_tracked")]
    assert counts
    save_file(without(tensors, "fc.weight", "fc.bias", *counts), tmp_path / "a.safetensors")
    given = weights.read(str(tmp_path / "a.safetensors"), TINY)
    model = built(TINY, 2)
    model.backbone.load_state_dict(given.backbone, strict=False)
    assert given.head is None and torch.equal(model.backbone.stem[0].weight, tensors["stem.0.weight"])


def of_a_run(tensors: dict[str, Tensor], *heads: str) -> dict[str, Tensor]:
    """Under the names that a run gives them."""
    own = {f"backbone.{name}": tensor for name, tensor in without(tensors, "fc.weight", "fc.bias").items()}
    return own | {
        f"heads.{head}.{kind}": tensors[f"fc.{kind}"].clone() for head in heads for kind in ("weight", "bias")
    }


def in_a_sequence(tensors: dict[str, Tensor], *places: str) -> dict[str, Tensor]:
    """With the head as a torch.nn.Sequential has it, of dropouts and linear layers, at these places of it."""
    heads = {f"fc.{place}.{kind}": tensors[f"fc.{kind}"].clone() for place in places for kind in ("weight", "bias")}
    return without(tensors, "fc.weight", "fc.bias") | heads


def test_a_run_s_model_with_one_head_is_taken_as_it_is(tmp_path: Path):
    tensors = saved(tmp_path / "a.safetensors")
    save_file(of_a_run(tensors, "source"), tmp_path / "pre.safetensors")
    plain, given = (weights.read(str(tmp_path / f"{name}.safetensors"), TINY) for name in ("a", "pre"))
    assert plain.head and given.head and given.backbone.keys() == plain.backbone.keys()
    assert all(torch.equal(given.backbone[name], tensor) for name, tensor in plain.backbone.items())
    assert all(map(torch.equal, given.head, plain.head))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, "stem.0.weight", "fc.bias"), r"1 missing \(stem.0.weight\).*fc.weight, fc.bias"),
        (lambda t: {**t, **{f"x{n}": t["fc.bias"].clone() for n in range(4)}}, r"4 unknown \(x0, x1, x2, ...\)$"),
        (lambda t: {**t, "stem.0.weight": torch.zeros(8, 3, 3, 3)}, r"\(stem.0.weight \[8, 3, 3, 3\], not \[4, 3"),
        (lambda t: {**t, "fc.weight": torch.zeros(3, 7)}, r"2 of another shape \(fc.weight, fc.bias\)"),
        (lambda t: {**t, "fc.bias": torch.full((3,), torch.nan)}, r"1 tensors .* not finite \(fc.bias\)"),
        (lambda t: {**t, "fc.bias": t["fc.bias"].to(torch.int8)}, r"1 tensors are torch.int8 \(fc.bias\), as if quant"),
        (
            lambda t: {**t, "stem.0.weight": t["stem.0.weight"].to(torch.float8_e4m3fn)},
            r"float8_e4m3fn \(stem.0.weight",
        ),
        (
            lambda t: of_a_run(t, "source", "target"),
            r"; it is of a run, and has two heads: give what dtlctl export makes of it, or pre, which has one$",
        ),
        (
            lambda t: in_a_sequence(t, "1"),
            r"2 unknown \(fc.1.bias, fc.1.weight\); its head is fc.1: if only dropout .* fc.1.\* to fc.\*$",
        ),
        (lambda t: in_a_sequence(t, "0", "3"), r"; its head has several layers: leave them out of the file, "),
        (lambda t: {"é\n": torch.zeros(1)}, r"missing \(.*, \.\.\.\); 1 unknown \(\\xe9\\n\)"),
    ],
)
def test_tensors_that_do_not_fit_are_told_in_one_line(tmp_path: Path, change: Any, words: str):
    path = tmp_path / "a.safetensors"
    save_file(change(saved(path)), path)
    with pytest.raises(CheckpointError, match=words) as told:
        weights.read(str(path), TINY)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"arch": "resnet20"}, "it is a resnet20"),
        ({"mean": [0.5, 0.5, 0.5]}, r"write mean = \[0.5, 0.5, 0.5\] under \[model\]"),
        ({"std": "no"}, "could not convert"),
        ({"classes": ["a", "b"]}, "3 outputs, and 2 classes"),
        ({"classes": ["a", "b", "a"]}, "'a' is named twice"),
        ({"classes": 3}, "not iterable"),
    ],
)
def test_a_header_that_contradicts_the_recipe_is_refused(tmp_path: Path, said: dict[str, Any], words: str):
    path = tmp_path / "a.safetensors"
    saved(path, **said)
    with pytest.raises(CheckpointError, match=words):
        weights.read(str(path), TINY)


def test_the_other_stem_is_named(tmp_path: Path):
    saved(tmp_path / "a.safetensors", LARGE)
    with pytest.raises(CheckpointError, match='that of stem = "imagenet"'):
        weights.read(str(tmp_path / "a.safetensors"), {**LARGE, "stem": "small"})


def test_another_image_size_and_type_are_told(tmp_path: Path):
    tensors = saved(tmp_path / "a.safetensors", image_size=224)
    given = weights.read(str(tmp_path / "a.safetensors"), TINY)
    assert len(given.notes) == 1 and "224 pixels" in given.notes[0]
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, tmp_path / "h.safetensors"
    )
    given = weights.read(str(tmp_path / "h.safetensors"), TINY)
    assert len(given.notes) == 1 and "float16" in given.notes[0]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.net."])
def test_what_a_wrapper_puts_before_every_name_is_taken_off(tmp_path: Path, wrapper: str):
    """DistributedDataParallel, torch.compile and training frameworks save a network as a part of their own."""
    tensors = saved(tmp_path / "plain.safetensors")
    save_file({wrapper + name: tensor for name, tensor in tensors.items()}, tmp_path / "wrapped.safetensors")
    plain, wrapped = (weights.read(str(tmp_path / f"{name}.safetensors"), TINY) for name in ("plain", "wrapped"))
    assert wrapped.backbone.keys() == plain.backbone.keys()
    assert wrapped.head and torch.equal(wrapped.head[0], tensors["fc.weight"])
    assert any(wrapper in note for note in wrapped.notes) and not plain.notes


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".BIN"])
def test_a_pickle_is_not_opened_and_four_lines_convert_it(tmp_path: Path, monkeypatch, suffix: str):
    """The four lines are run, on a file that torch wrote: the tensors, or a training script's checkpoint."""
    (tmp_path / f"bomb{suffix}").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="weights_only=True"):
        weights.identity(str(tmp_path / f"bomb{suffix}"), "resnet8")
    tensors = saved(tmp_path / "x.safetensors")
    wrapped = {".pth": {"state_dict": tensors, "epoch": 3}, ".pt": {"model": tensors, "epoch": 3}}
    torch.save(wrapped.get(suffix, tensors), tmp_path / f"mine{suffix}")
    with pytest.raises(CheckpointError) as told:
        weights.read(str(tmp_path / f"mine{suffix}"), TINY)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(str(told.value).splitlines()[1:]))
    assert weights.read(str(tmp_path / "mine.safetensors"), TINY).head is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [("none.safetensors", "does not exist"), ("", "not a .safetensors file|does not exist"), ("a.txt", "not a .safet"),
     ("bad.safetensors", "not a safetensors file"), ("torchvision:DEFAULT", "no weights of resnet8")],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, monkeypatch, name: str, words: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(CheckpointError, match=words):
        weights.read(name, TINY)


def test_what_a_folder_below_home_says_is_read(tmp_path: Path, monkeypatch):
    """By ~ as by its whole path: else no class names, and no word of a normalisation that is not the recipe's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    save_file({"fc.bias": torch.zeros(2)}, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text('{"label_names": ["b", "a"]}')
    assert weights.tensors_of("~/hub")[1] == weights.tensors_of(str(tmp_path / "hub"))[1] == {"classes": ["b", "a"]}


def test_torchvisions_registry(monkeypatch):
    """Names with and without the class; offline the failure is one line; what it gives is fetched without pickles."""
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"):
        assert weights.identity(f"torchvision:{name}", "resnet18") == {"torchvision": str(entry), "url": entry.url}
    for name in ("IMAGENET1K_V9", "ResNet50_Weights.IMAGENET1K_V1", "", "mro"):
        with pytest.raises(CheckpointError, match="no such weights of resnet18"):
            weights.identity(f"torchvision:{name}", "resnet18")
    asked: dict[str, Any] = {}

    def fetch(self: Any, **options: Any) -> dict[str, Tensor]:
        asked.update(options)
        if not asked.get("there"):
            raise OSError("no\nroute")
        torch.manual_seed(3)
        return torchvision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr(type(entry), "get_state_dict", fetch)
    with pytest.raises(CheckpointError, match="could not be downloaded") as told:
        weights.read("torchvision:DEFAULT", LARGE)
    assert "\n" not in str(told.value) and asked["weights_only"] is True
    asked["there"] = True
    given = weights.read("torchvision:DEFAULT", LARGE)
    assert given.classes and len(given.classes) == 1000 and given.classes[0] == "tench"
    assert len(given.notes) == 1 and "224" in given.notes[0] and "bilinear" in given.notes[0]


def test_a_config_of_other_classes_makes_other_weights(tmp_path: Path):
    """It names the head's outputs: what was made by the old names must not be taken for up to date."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"of no matter")
    alone = weights.identity(str(folder), "resnet8")
    assert alone == weights.identity(str(folder / "model.safetensors"), "resnet8")
    found = [alone]
    for classes in ('["a", "bc"]', '["b", "c"]'):
        (folder / "config.json").write_text(f'{{"label_names": {classes}}}')
        found.append(weights.identity(str(folder), "resnet8"))
        assert weights.identity(str(folder / "model.safetensors"), "resnet8") == alone
    assert len({json.dumps(one) for one in found}) == 3
