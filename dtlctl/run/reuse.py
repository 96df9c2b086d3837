"""Results that were made before in another run: the same key means the same settings, seed, data and parents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError
from dtlctl.recipe.plan import Job
from dtlctl.run.experiment import Experiment
from dtlctl.stages.reference import kept
from dtlctl.storage import checkpoint

RESULTS = ("pretrain/*.json", "target-only/*.json", "finetune/*.json", "dispose/*/*.json", "piggyback/*/*.json",
           "audit/*.json")  # fmt: skip


def relatives(out: Path, name: str) -> list[Path]:
    """Folders of the recipe's runs, plain, swept or compared: what is done there need not be done again."""
    return [out / name, *(path for kind in ("sweep", "compare") for path in sorted(out.glob(f"{name}-{kind}/*/")))]


def results(folders: Iterable[Path]) -> dict[str, Path]:
    """The sidecars of all results in these runs' folders, by key."""
    known: dict[str, Path] = {}
    for folder in folders:
        for path in (path for form in RESULTS for path in sorted(folder.glob(form))):
            with suppress(CheckpointError, OSError):
                known[_key_in(path, path.stat().st_mtime_ns)] = path
    return known


def key(lab: Experiment, job: Job[Any]) -> str | None:
    """The job's key, or None where its parent is not up to date."""
    with suppress(CheckpointError):
        return lab.key(job)
    return None


def take_over(lab: Experiment, job: Job[Any], known: Mapping[str, Path]) -> Path | None:
    """Publish the job's result if it is known, in the run's folder, which this process owns; whence, or None."""
    own = key(lab, job)
    found = known.get(own) if own else None
    if found is None:
        return None
    checkpoint.adopt(found, lab.folder / job.path, job.model)
    lab.tidy(job)
    return found


def take_over_references(lab: Experiment, folders: Iterable[Path]) -> None:
    """Copy into the run's folder, which this process owns, what other runs' references of rmia said, if they fit."""
    if lab.recipe.audit.references and key(lab, lab.job("pre")):
        ours = kept(lab)
        for folder in folders:
            ours.adopt(folder / "audit" / "references")


@cache
def _key_in(sidecar: Path, changed: int) -> str:
    """The key of a result, read again when it has changed; there may be hundreds, and they are long."""
    return (checkpoint.read_sidecar(sidecar) or {}).get("key", "")
