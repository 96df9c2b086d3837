"""Checkpoints: safetensors weights beside a JSON sidecar, published so that a reader sees all or nothing.

Both are written in full beside their places, as `.NAME.next`, and then renamed, weights first. Whoever finds
`.model.json.next` finds both files complete and finishes the two renames (`settle`). The sidecar holds the SHA-256 of
the weights and the key of everything they were made from.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dtlctl.errors import CheckpointError, one_line

FORMAT = 1


class Sidecar(BaseModel):
    """What every sidecar says; the rest of it depends on the stage."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    format: int = Field(ge=FORMAT, le=FORMAT)
    key: str = ""
    parent: dict[str, str] = {}
    metrics: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    wall_seconds: float = 0.0
    weights_sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    heads: dict[Annotated[str, Field(pattern="^[a-z_]{1,64}$")], Annotated[int, Field(ge=1, le=1_000_000)]] = {}


def key(inputs: dict[str, Any]) -> str:
    """SHA-256 of everything a result depends on; equal keys mean that the work need not be done again."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def dump(document: dict[str, Any]) -> str:
    """JSON as it is published. Raises ValueError for a number that is not finite."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def publish_json(path: Path, document: dict[str, Any]) -> None:
    """As `write`; a file that says the same already is left alone, however old it is."""
    blob = dump(document).encode()
    with suppress(OSError):  # none, or none to be read: writing will tell whether it can be replaced
        if path.read_bytes() == blob:
            return
    write(path, blob)


def publish(folder: Path, model: Any, sidecar: dict[str, Any]) -> None:
    """Publish `model.safetensors` and `model.json`, the weights' hash added to `sidecar`, or raise CheckpointError."""
    from safetensors.torch import save

    blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    document = {**sidecar, "weights_sha256": hashlib.sha256(blob).hexdigest()}
    settle(folder)
    try:
        write(folder / ".model.safetensors.next", blob)
        publish_json(folder / ".model.json.next", document)
    finally:  # of what could not be written nothing is left
        settle(folder)


def adopt(found: Path, goal: Path, model: str) -> None:
    """Publish the result whose sidecar is `found` as `goal` too, under the model's name there.

    Its weights are linked, not copied: they are only ever replaced, never written into. Others than the sidecar's are
    left where they are. Raises CheckpointError where nothing can be written.
    """
    document = {**(read_sidecar(found) or {}), "model": model}
    if "weights_sha256" not in document:
        publish_json(goal, document)
        return
    weights, next_weights = found.with_name("model.safetensors"), goal.with_name(".model.safetensors.next")
    if not weights.exists():
        return
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        settle(goal.parent)
        try:
            os.link(weights, next_weights)
        except OSError:  # another file system
            shutil.copyfile(weights, next_weights)
    except OSError as error:
        _cannot_write(goal, error)
    publish_json(goal.with_name(".model.json.next"), document)
    settle(goal.parent)


def lost(sidecar: Path) -> Path | None:
    """The weights of a model's sidecar, where they are missing."""
    weights = sidecar.with_name("model.safetensors")
    if sidecar.name != "model.json" or weights.exists():
        return None
    with suppress(CheckpointError):  # an attack's sidecar is called so too, where the dataset or the variant is
        return weights if "weights_sha256" in (read_sidecar(sidecar) or {}) else None
    return weights


def settle(folder: Path) -> None:
    """Finish a publication that was cut short, or undo it if it had not got far enough; for its owner alone."""
    weights, sidecar = folder / ".model.safetensors.next", folder / ".model.json.next"
    try:
        if sidecar.exists():
            here = weights if weights.exists() else folder / "model.safetensors"
            # The hash is for a disk that did not keep what it had said was safe.
            said = None
            with suppress(CheckpointError):
                said = (read_sidecar(sidecar) or {}).get("weights_sha256")
            if here.exists() and hashlib.sha256(here.read_bytes()).hexdigest() == said:
                if here == weights:
                    os.replace(weights, folder / "model.safetensors")
                    sync(folder)
                os.replace(sidecar, folder / "model.json")
                sync(folder)
            sidecar.unlink(missing_ok=True)
        for path in (weights, *folder.glob(".*.tmp")):
            path.unlink(missing_ok=True)
    except OSError as error:
        _cannot_write(folder, error)


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The document, or None where there is none. Raises CheckpointError for one that is not ours."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
        defaults = Sidecar.model_validate(document).model_dump(include={"key", "parent", "metrics", "history"})
        return {**document, **defaults, **document}  # in the document's order
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(ascii(part).strip("'") for part in first["loc"])[:100]
        reason = f"not a sidecar of format {FORMAT} ({place + ': ' if place else ''}{first['msg']})"
    except (OSError, ValueError, RecursionError) as error:
        reason = f"not a readable sidecar ({error})"
    raise CheckpointError(f"{path}: {reason}; delete it to make the result again")


def load_weights(folder: Path, sidecar: dict[str, Any], model: Any) -> None:
    """Fill the model with the folder's weights. Raises CheckpointError unless they are those that the sidecar names."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "model.safetensors"
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; make the checkpoint again with --force") from None
    found, expected = hashlib.sha256(blob).hexdigest(), sidecar.get("weights_sha256")
    if found != expected:
        raise CheckpointError(
            f"{path}: the file is damaged or not the one that was published\n"
            f"SHA-256 {found} where model.json says {expected}; make the checkpoint again with --force"
        )
    try:
        fill(model, load(blob))
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = one_line(error, 200)
        raise CheckpointError(f"{path}: does not fit the model that model.json describes: {reason}") from None


def fill(model: Any, tensors: dict[str, Any]) -> None:
    """Load a state dict that must have the model's names, shapes and types, and finite numbers; else ValueError."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        names = sorted(own.keys() ^ tensors.keys())
        raise ValueError(f"{len(names)} tensors are missing or unknown, {ascii(names[0])[1:-1]} among them")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            theirs, ours = ([list(t.shape), str(t.dtype)] for t in (tensor, own[name]))
            raise ValueError(f"{name} is {theirs} where the model has {ours}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")
    model.load_state_dict(tensors)


def write(path: Path, blob: bytes) -> None:
    """Write a file atomically and durably. Raises CheckpointError, the earlier file untouched, where it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(temporary):  # of a dead process with our number: in a container all have the same
            temporary.unlink()
        with open(temporary, "xb") as file:  # never through a link that somebody left there
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        _cannot_write(path, error)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _cannot_write(path: Path, error: OSError) -> NoReturn:
    raise CheckpointError(f"{path}: cannot be written: {error.strerror}; the earlier state is intact") from None


def finite(number: str) -> float:
    """NaN, Infinity and 1e999, which Python's JSON would take, are refused."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def sync(path: Path) -> None:
    """Wait until what was written to a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some shared file systems sync no folders
            raise
    finally:
        os.close(handle)
