"""Checkpoints: safetensors weights beside a JSON sidecar, published so that a reader sees all or nothing.

Weights first, sidecar last, each by temporary file, fsync and rename; a checkpoint without a sidecar does not exist.
The sidecar holds the SHA-256 of the weights and the key of everything they were made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError

FORMAT = 1


def key(inputs: dict[str, Any]) -> str:
    """SHA-256 of everything a result depends on; equal keys mean that the work need not be done again."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def publish_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document atomically. Raises CheckpointError where the folder cannot be written."""
    _publish(path, lambda temporary: temporary.write_text(dump(document), encoding="utf-8"))


def dump(document: dict[str, Any]) -> str:
    """JSON as it is published. Raises ValueError for a number that is not finite."""
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def publish(folder: Path, model: Any, sidecar: dict[str, Any]) -> None:
    """Write `model.safetensors`, then `model.json` with the weights' hash added to `sidecar`."""
    from safetensors.torch import save

    blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    # The old sidecar goes first: at no moment does a sidecar describe other weights than those beside it.
    (folder / "model.json").unlink(missing_ok=True)
    _publish(folder / "model.safetensors", lambda temporary: temporary.write_bytes(blob))
    publish_json(folder / "model.json", {**sidecar, "weights_sha256": hashlib.sha256(blob).hexdigest()})


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The document, or None where there is none. Raises CheckpointError for one that is not ours."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable sidecar ({error}); delete it to make the result again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a sidecar of format {FORMAT}; delete it to make the result again")
    return document


def load_weights(folder: Path, sidecar: dict[str, Any], model: Any) -> None:
    """Fill the model with the folder's weights, which must be those that the sidecar names.

    Raises CheckpointError, with both hashes, for anything else: truncated, tampered with, or of another model.
    """
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
        model.load_state_dict(load(blob))
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: does not fit the model that model.json describes: {reason}") from None


def _publish(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; the earlier state is intact") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
