"""A model as it is given away: its target head alone, under its library's names of tensors, and nothing of the run."""

import glob
import io
import json
import os
import re
import shutil
import warnings
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dtlctl.errors import CheckpointError, RecipeError, one_line
from dtlctl.model import networks, weights
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint

SUFFIX = ".safetensors"


def packed(experiment: Experiment, model: str) -> tuple[bytes, dict[str, Any]]:
    """The backbone and the target head of a finished model as a safetensors file, and its description.

    Tensors have the names of the architecture's own library, so torchvision's networks load them as they are. The
    header's `dtlctl` is the description as JSON: arch, stem, width, image_size, the target's classes in the order of
    the logits, and the mean and std [3] by which an image in [0, 1] is normalised. Raises CheckpointError for a model
    that is not up to date.
    """
    from safetensors.torch import save

    tensors = experiment.trainer.load_model(model).plain_state("target")
    described = {
        **experiment.recipe.model.model_dump(mode="json", exclude={"channels_last"}),
        "classes": experiment.data.classes("target"),
    }
    # One key: several would be written in an order that differs from time to time.
    header = {"dtlctl": json.dumps(described, ensure_ascii=False)}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header), described


def export(experiment: Experiment, model: str, to: Path) -> None:
    """Write the model as one file, at a place that `refuse` has let pass. Raises RecipeError where it cannot be."""
    blob, _ = packed(experiment, model)
    try:
        checkpoint.write(to, blob)
    except CheckpointError as error:
        raise RecipeError(f"--to {error}") from None


def refuse(experiment: Experiment, to: Path) -> None:
    """Raise RecipeError for a place in the run's folder, a file of another kind, and what is not ours to replace."""
    if to.suffix[1:].isalpha() and to.suffix != SUFFIX:
        other = "ONNX stands beside the weights in a folder, with --onnx; " * (to.suffix == ".onnx")
        raise RecipeError(
            f"--to {to}: {other}a file is in safetensors: name it {to.with_suffix(SUFFIX)}, or a folder without a dot"
        )
    if Path(os.path.realpath(to)).is_relative_to(os.path.realpath(experiment.folder)):
        raise RecipeError(f"--to {to}: within the run's folder, whose files are the run's own; choose another place")
    if to.suffix == SUFFIX and os.path.isdir(to):
        raise RecipeError(f"--to {to}: is a folder; name the file, as in --to {to / f'model{SUFFIX}'}")
    if to.suffix == SUFFIX and os.path.lexists(to) and not _is_our_file(to):
        raise RecipeError(f"--to {to}: is there, and not an export; choose another name")
    if to.suffix != SUFFIX and os.path.lexists(to) and (to.is_symlink() or not is_ours(to)):
        example = to / "release" if os.path.isdir(to) else f"{to}-release"
        raise RecipeError(f"--to {to}: is there, and not only an export; name a new folder, as in --to {example}")


def load(path: Path | str) -> networks.Classifier:
    """An exported model, in eval mode: `load(path)(x)` are logits [B, classes] of x [B, 3, H, W] in [0, 1].

    Its `classes` name them. path: the file, or the folder. Raises CheckpointError for what `export` did not write.
    """
    tensors, described = weights.tensors_of(str(path))
    try:
        classes = described.pop("classes")
        model = networks.build(heads={"target": len(classes)}, **described)
        model.classes = [*classes]
        model.to(tensors[f"{model.readout}.weight"].dtype)
        names = dict(zip(model.plain_state("target"), model.state_dict(), strict=True))
        checkpoint.fill(model, {names.get(name, name): tensor for name, tensor in tensors.items()})
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a model that dtlctl exported ({error}); of a run, `dtlctl export` writes one"
        ) from None
    return model.eval()


def is_ours(folder: Path) -> bool:
    """Whether a folder holds an export and nothing else."""
    try:
        names = {path.name for path in folder.iterdir()}
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = {"README.md", "config.json", f"model{SUFFIX}"}
        return ours <= names <= {*ours, "model.onnx"} and described["made_by"] == "dtlctl"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_our_file(path: Path) -> bool:
    try:
        return "classes" in weights.tensors_of(str(path))[1]
    except CheckpointError:
        return False


def publish(files: dict[str, bytes], to: Path) -> str:
    """Write a folder, whole or not at all, in place of an earlier export. Raises RecipeError where it cannot be.

    For a place that `refuse` has let pass. What an export that was killed has left beside it is put in order.
    """
    here = Path(os.path.abspath(to))
    new, old = (here.with_name(f".{here.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        _settle(here)
        for name, blob in files.items():
            checkpoint.write(new / name, blob)
        if here.exists():
            os.replace(here, old)
        os.replace(new, here)
        checkpoint.sync(here.parent)
    except (OSError, CheckpointError) as error:
        raise RecipeError(f"--to {to}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            _settle(here)
    return str(to)


def _settle(here: Path) -> None:
    """Remove what this process, or one that died, has left beside the place.

    If it ended between the two renames, the earlier export is put back first.
    """
    from psutil import pid_exists  # on Windows, where `load` works, it is never asked

    for rest in sorted(here.parent.glob(f".{glob.escape(here.name)}.*")):
        left = re.fullmatch(r"\.(\d{1,9})\.(old|tmp)", rest.name[len(here.name) + 1 :])
        if left and (int(left[1]) == os.getpid() or not pid_exists(int(left[1]))):
            if left[2] == "old" and not os.path.lexists(here):
                os.replace(rest, here)
            shutil.rmtree(rest, ignore_errors=True)


def onnx(experiment: Experiment, model: str) -> bytes:
    """The model as an ONNX file: `image` float32 [B, 3, H, W] in [0, 1] to `logits` [B, classes], any B.

    Raises RecipeError where the packages for it are not there, or torch's exporter cannot translate the network.
    """
    try:
        for package in ("onnx", "onnxscript"):
            import_module(package)
    except ImportError as error:
        raise RecipeError(f"--onnx needs onnx and onnxscript: pip install 'dtlctl[onnx]' ({one_line(error)})") from None
    network = experiment.trainer.load_model(model).through("target").eval().float().cpu()
    network.precision, network.channels_last = "float32", False
    size = experiment.recipe.model.image_size
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (torch.zeros(2, 3, size, size),), dynamo=True, verbose=False,
                input_names=["image"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        assert program is not None
        return program.model_proto.SerializeToString()
    except Exception as error:  # of whatever part of the exporter
        raise RecipeError(f"--onnx: torch cannot translate {experiment.recipe.model.arch}: {one_line(error)}") from None


def push(files: dict[str, bytes], repository: str) -> str:
    """Put a folder's files into a repository of the Hugging Face hub; returns its address. Raises RecipeError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        operations = [CommitOperationAdd(name, blob) for name, blob in files.items()]
        api.create_commit(repository, operations, commit_message="dtlctl export")
    except Exception as error:  # of the name, the network, the login
        raise RecipeError(f"--to hf:{repository}: {one_line(error)}") from None
    return address
