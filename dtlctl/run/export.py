"""`dtlctl export`: a model as it is given away, with its target head alone and nothing of the run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError, RecipeError, suggest
from dtlctl.model import networks
from dtlctl.run.experiment import Experiment
from dtlctl.storage import checkpoint


def export(experiment: Experiment, model: str, to: Path) -> None:
    """Write the backbone and the target head of a finished model as one safetensors file.

    Tensors have the names of the architecture's own library, so torchvision's networks load them as they are. The
    header's `dtlctl` is a JSON object: arch, stem, width, image_size, the target's classes in the order of the logits,
    and the mean and std [3] by which an image in [0, 1] is normalised. Raises RecipeError for a model without a target
    head and for a place where the file cannot be or has another suffix, CheckpointError for a model that is not up to
    date.
    """
    from safetensors.torch import save

    known = [job.model for job in experiment.jobs if job.stage in ("finetune", "dispose")]
    if model not in known:
        raise RecipeError(
            f"--model {model}: {experiment.source} has no such model with a target head{suggest(model, known)}"
        )
    if os.path.isdir(to):
        raise RecipeError(f"--to {to}: is a folder; name the file, as in --to {to / f'{model}.safetensors'}")
    if to.suffix != ".safetensors":
        raise RecipeError(f"--to {to}: the file is in safetensors; name it {to.with_suffix('.safetensors')}")
    if Path(os.path.realpath(to)).is_relative_to(os.path.realpath(experiment.folder)):
        raise RecipeError(f"--to {to}: within the run's folder, whose files are the run's own; choose another place")
    tensors = experiment.trainer.load_model(model).plain_state("target")
    described = {
        **experiment.recipe.model.model_dump(mode="json", exclude={"channels_last"}),
        "classes": experiment.data.classes("target"),
        "mean": networks.MEAN,
        "std": networks.STD,
    }
    # One key: several would be written in an order that differs from time to time.
    header = {"dtlctl": json.dumps(described, ensure_ascii=False)}
    blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, header)
    try:
        checkpoint.write(to, blob)
    except CheckpointError as error:
        raise RecipeError(f"--to {error}") from None


def load(path: Path) -> networks.Classifier:
    """An exported model, in eval mode: `load(path)(x, "target")` are logits [B, classes] of x [B, 3, H, W] in [0, 1].

    Raises CheckpointError for a file that `export` did not write.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            described: dict[str, Any] = json.loads((file.metadata() or {})["dtlctl"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        spec = {name: described[name] for name in ("arch", "stem", "width", "image_size")}
        model = networks.build(heads={"target": len(described["classes"])}, **spec)
        model.to(tensors[f"{model.readout}.weight"].dtype)
        names = dict(zip(model.plain_state("target"), model.state_dict(), strict=True))
        checkpoint.fill(model, {names.get(name, name): tensor for name, tensor in tensors.items()})
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a model that dtlctl exported ({error})") from None
    return model.eval()
