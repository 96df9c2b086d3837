"""Weights from outside: a file, one of our exports, torchvision's registry. Read, checked, put into a classifier."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from dtlctl.errors import CheckpointError, one_line, suggest
from dtlctl.model.networks import Classifier, outline

REGISTRY = "torchvision:"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COUNT = "num_batches_tracked"
"""Of a batch norm. Files from before torch 0.4.1 lack it, and nothing here depends on it."""


class Given(NamedTuple):
    """What a file or a registry holds of a network."""

    backbone: dict[str, Tensor]
    head: tuple[Tensor, Tensor] | None
    """Weight [classes, features] and bias [classes]."""
    classes: list[str] | None
    """Names of the head's outputs, where they are told."""
    notes: list[str]
    """What of it is not as the recipe has it, and is no mistake."""


def identity(weights: str, arch: str) -> dict[str, str]:
    """What tells these weights from others: {"sha256": of the file}, or {"torchvision": name, "url": address}.

    "config_sha256" too of a folder with a config.json, as that may name classes and preprocessing. Nothing is fetched.
    Raises CheckpointError for no file or registry's entry that could be used.
    """
    if weights.startswith(REGISTRY):
        entry = _entry(weights, arch)
        return {"torchvision": str(entry), "url": entry.url}
    files = {"sha256": _file(weights)} | ({"config_sha256": config} if (config := _config(weights)) else {})
    try:
        stats = {name: (path, path.stat()) for name, path in files.items()}
        return {name: _sha256(path, stat.st_size, stat.st_mtime_ns) for name, (path, stat) in stats.items()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None


def read(weights: str, network: dict[str, Any], classes: Sequence[str] | None = None) -> Given:
    """The tensors, checked against the network, and what is said of classes and preprocessing; or CheckpointError.

    network: arguments of `networks.build` but for the heads. classes: in place of the names that the file has.
    """
    tensors, said = _from_registry(weights, network["arch"]) if weights.startswith(REGISTRY) else tensors_of(weights)
    try:
        notes = _compared(said, network)
        backbone, head = _fitted(tensors, network, notes)
        names = list(classes or said.get("classes") or []) or None
        if names and head and len(names) != len(head[1]):
            raise ValueError(f"its head has {len(head[1])} outputs, and {len(names)} classes are named")
        if names and (twice := [name for name in names if names.count(name) > 1]):
            raise ValueError(f"class {twice[0]!r} is named twice")
    except (AttributeError, TypeError, ValueError) as error:  # a header may hold anything
        raise CheckpointError(f"{weights}: {one_line(error, 500)}") from None
    return Given(backbone, head, names, notes)


def fill_head(model: Classifier, name: str, given: Given, classes: Sequence[str]) -> str:
    """Give the model this head, its outputs in the order of `classes`; in words how they match, or ValueError."""
    if given.head is None:
        raise ValueError(f"it has no head ({model.readout}.weight, {model.readout}.bias)")
    known, outputs = given.classes, len(given.head[1])
    if known is None and outputs != len(classes):
        raise ValueError(f"its head has {outputs} outputs; data.{name} has {len(classes)} classes")
    if known and (lacking := [one for one in classes if one not in known]):
        raise ValueError(f"its head has no class {lacking[0]!r}, which data.{name} has")
    rows = [known.index(one) for one in classes] if known else [*range(outputs)]
    model.add_head(name, len(classes), (given.head[0][rows], given.head[1][rows]))
    if known is None:
        return f"the head's outputs are taken in the order of data.{name}'s classes; nothing names them"
    left = f"; {outputs - len(rows)} others are left out" * (outputs > len(rows))
    return f"the head's outputs are matched by name{', and reordered' * (rows != sorted(rows))}{left}"


def _fitted(
    tensors: Mapping[str, Tensor], network: dict[str, Any], notes: list[str]
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
    """The backbone's tensors and the head's. Raises ValueError for those of another network."""
    like = outline(*(network[name] for name in ("arch", "stem", "width", "image_size")))
    own, names = like.backbone.state_dict(), [f"{like.readout}.weight", f"{like.readout}.bias"]
    anchor = next(iter(own))
    wrapper = next((name.removesuffix(anchor) for name in tensors if name.endswith(f".{anchor}")), "")
    if wrapper and all(name.startswith(wrapper) for name in tensors):  # module. of DDP, _orig_mod. of torch.compile
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
        notes.append(f"the names of its tensors begin with {wrapper}, which is taken off")
    heads = sorted(name for name in tensors if name.startswith("heads."))
    of_a_run = any(name.startswith("backbone.") for name in tensors)
    if of_a_run and len(heads) == 2:  # one head's bias and weight
        renamed = dict(zip(heads, reversed(names), strict=True))
        tensors = {renamed.get(name, name.removeprefix("backbone.")): tensor for name, tensor in tensors.items()}
    backbone = {name: tensor for name, tensor in tensors.items() if name not in names}
    head = [tensors[name] for name in names if name in tensors]
    shapes = {"missing": [name for name in own if name not in backbone and not name.endswith(COUNT)]}
    shapes["unknown"] = [name for name in backbone if name not in own]
    shapes["of another shape"] = [
        f"{name} {[*backbone[name].shape]}, not {[*own[name].shape]}"
        for name in own
        if name in backbone and backbone[name].shape != own[name].shape
    ]
    if len(head) == 1 or (head and [*head[0].shape] != [len(head[1]), like.features]):
        shapes["of another shape"] += names
    if wrong := {kind: found for kind, found in shapes.items() if found}:
        said = "; ".join(f"{len(found)} {kind} ({_three(found)})" for kind, found in wrong.items())
        first = [*tensors["conv1.weight"].shape[2:]] if "conv1.weight" in tensors else []
        stem = {7: "imagenet", 3: "small"}.get(first[0]) if first else None
        hint = f'; its first layer is that of stem = "{stem}"' if stem not in (None, network["stem"]) else ""
        if of_a_run and len(heads) > 2:
            hint = "; it is of a run, and has two heads: give what dtlctl export makes of it, or pre, which has one"
        if [*wrong] == ["unknown"] and all(name.startswith(f"{like.readout}.") for name in wrong["unknown"]):
            hint = _of_layers(like.readout, wrong["unknown"])
        raise ValueError(f"tensors do not fit {network['arch']}: {said}{hint}")
    floats = {name for name in tensors if name in names or own[name].is_floating_point()}
    if other := [name for name in sorted(floats) if tensors[name].dtype not in FLOATS]:
        told = f"{len(other)} tensors are {tensors[other[0]].dtype} ({_three(other)}), as if quantised"
        raise ValueError(f"{told}; save the network in float32, float16 or bfloat16")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(bad)} tensors hold numbers that are not finite ({_three(bad)})")
    if kinds := {str(t.dtype) for t in tensors.values() if t.is_floating_point()} - {"torch.float32"}:
        notes.append(f"tensors of {', '.join(sorted(kinds))} are converted to the run's type")
    return backbone, (head[0], head[1]) if head else None


def _of_layers(readout: str, names: Sequence[str]) -> str:
    """What to do about a head of several modules, such as a dropout and a linear layer, by the names of its tensors."""
    layer, *others = sorted({name.rpartition(".")[0] for name in names})
    if others:
        return "; its head has several layers: leave them out of the file, and a head of one is fitted to the source"
    return f"; its head is {layer}: if only dropout stands beside it, rename {layer}.* to {readout}.*"


def _three(names: Sequence[str]) -> str:
    return ", ".join(ascii(name)[1:-1][:120] for name in names[:3]) + ", ..." * (len(names) > 3)


def _compared(said: dict[str, Any], network: dict[str, Any]) -> list[str]:
    """What is told of the images it was trained on, beside the recipe's. ValueError where that is a mistake."""
    if (arch := said.get("arch", network["arch"])) != network["arch"]:
        raise ValueError(f"it is a {arch}, and the recipe's network a {network['arch']}; set model.arch")
    for key in ("mean", "std"):
        theirs, ours = ([round(float(x), 6) for x in table.get(key, network[key])] for table in (said, network))
        if theirs != ours:
            raise ValueError(f"its images were normalised by {key} {theirs}; write {key} = {theirs} under [model]")
    size, own = said.get("image_size"), network["image_size"]
    told = ", ".join(filter(None, ["" if size in (None, own) else f"{size} pixels", said.get("resize")]))
    return [f"its images were of {told}; the recipe's are cut square, {own} pixels, bicubic"] if told else []


def tensors_of(weights: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what `dtlctl export` or timm says of them, if anything."""
    from safetensors import SafetensorError, safe_open

    path = _file(weights)
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("dtlctl", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if not isinstance(said, dict):
            raise ValueError("its header is not one of ours")
    except (OSError, SafetensorError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{weights}: not a safetensors file that can be read ({one_line(error)})") from None
    if not said and (config := _config(weights)):
        try:
            said = _of_timm(_Config.model_validate_json(config.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{config}: {one_line(f'{key}: ' * bool(key) + first['msg'])}; mend it") from None
        except OSError as error:
            raise CheckpointError(f"{config}: {error.strerror}") from None
    return tensors, said


def _config(weights: str) -> Path | None:
    """timm's, beside the weights, where a folder is given that has one."""
    path = Path(os.path.expanduser(weights)) / "config.json"
    return path if path.is_file() else None


class _Pretrained(BaseModel):
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    input_size: tuple[int, PositiveInt, PositiveInt] | None = None
    crop_pct: Any = None
    interpolation: Any = None


class _Config(BaseModel):
    """What is read of timm's config.json, in a folder from the hub."""

    architecture: str | None = None
    label_names: list[str] | None = None
    pretrained_cfg: _Pretrained = _Pretrained()


def _of_timm(config: _Config) -> dict[str, Any]:
    """What it says of the network, classes and preprocessing."""
    told = config.pretrained_cfg
    said: dict[str, Any] = {name: list(numbers) for name in ("mean", "std") if (numbers := getattr(told, name))}
    said |= {"classes": config.label_names} | ({"timm": config.architecture} if config.architecture else {})
    if told.input_size:
        side = told.input_size[-1]
        said |= {"side": side, "resize": f"{side} pixels (crop_pct {told.crop_pct}, {told.interpolation})"}
    return said


def _file(weights: str) -> Path:
    path = Path(os.path.abspath(os.path.expanduser(weights)))
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{weights}: a pickle can run any code, and is not opened. Convert it, where it may do no harm:\n"
            "import torch, safetensors.torch as st\n"
            f"state = torch.load({path.name!r}, map_location='cpu', weights_only=True)\n"
            "state = state.get('model', state.get('state_dict', state))  # of a larger checkpoint\n"
            f"st.save_file({{k: v.contiguous() for k, v in state.items()}}, {f'{path.stem}.safetensors'!r})"
        )
    if path.is_dir():
        path /= "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{weights}: does not exist (looked for {path})")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{weights}: not a .safetensors file, an exported folder, or {REGISTRY}NAME")
    return path


def _entry(weights: str, arch: str) -> Any:
    """torchvision's entry for `torchvision:NAME`, which is the name of an entry with or without its class."""
    from torchvision import models

    name = weights.removeprefix(REGISTRY)
    try:
        entries = models.get_model_weights(arch)
    except ValueError:
        raise CheckpointError(f"{weights}: torchvision has no weights of {arch}") from None
    class_name, _, last = name.rpartition(".")
    if last not in entries.__members__ or class_name not in ("", entries.__name__):
        raise CheckpointError(f"{weights}: no such weights of {arch}{suggest(name, entries.__members__)}")
    return entries[last]


def _from_registry(weights: str, arch: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, fetched unless they are in torch's cache, and how the registry says images are prepared."""
    entry = _entry(weights, arch)
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib's, the disk's, a hash that is wrong
        raise CheckpointError(f"{weights}: {entry.url} could not be downloaded ({one_line(error)})") from None
    prepared = entry.transforms()
    resize = f"{prepared.crop_size[0]} pixels, cut from {prepared.resize_size[0]} ({prepared.interpolation.value})"
    return tensors, {"classes": entry.meta["categories"], "mean": prepared.mean, "std": prepared.std, "resize": resize}


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file, read again when it has changed."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
