"""Results that other runs of the recipe have made, found by key: the same key is the same result."""

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dtlctl.errors import CheckpointError
from dtlctl.recipe.plan import Job
from dtlctl.run.experiment import Experiment
from dtlctl.run.results import REFERENCES
from dtlctl.storage import checkpoint

FORMS = ("pretrain/*.json", "target-only/*.json", "finetune/*.json", "dispose/*/*.json", "piggyback/*/*.json",
         "audit/*.json", "reference/*/*.json")  # fmt: skip
"""Where in a run's folder there are sidecars."""
KINDS = ("-sweep", "-compare")
"""What the folder of many runs of one recipe has after the recipe's name."""


def relatives(out: Path, name: str) -> list[Path]:
    """Folders of the recipe's runs, plain, swept or compared; out: where runs are, or that of a sweep or comparison."""
    for kind in KINDS:
        if out.name.endswith(kind):
            out, name = out.parent, out.name.removesuffix(kind)
            break
    return [out / name, *(path for kind in KINDS for path in sorted(out.glob(f"{name}{kind}/*/")))]


class Earlier:
    """What is finished in some runs' folders. It is looked up once; `Earlier` anew sees what has come since."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(folders)
        self.known: dict[str, Path] = {}
        for path in (path for folder in self.folders for form in FORMS for path in sorted(folder.glob(form))):
            with suppress(CheckpointError, OSError):
                if not checkpoint.lost(path):
                    self.known[_key_in(path, path.stat().st_mtime_ns)] = path

    def find(self, experiment: Experiment, job: Job[Any]) -> Path | None:
        """The sidecar of the job's result; None, too, where its parent is not up to date."""
        with suppress(CheckpointError):
            return self.known.get(experiment.results.key(job))
        return None

    def take(self, experiment: Experiment, job: Job[Any]) -> Path | None:
        """Publish the job's result, if somebody has made it, in the run's folder; returns the sidecar it comes from.

        Of an audit that nobody has made, the reference models' answers are taken, if there are any.
        """
        found = self.find(experiment, job)
        if found is not None:
            checkpoint.adopt(found, experiment.results.path(job), job.model)
            experiment.results.tidy(job)
        elif job.stage == "audit" and experiment.recipe.audit.references:
            for folder in self.folders:
                experiment.results.reference_answers().adopt(folder / REFERENCES)
        return found


@cache
def _key_in(sidecar: Path, changed: int) -> str:
    """The key of a result, read again when it has changed; there may be hundreds, and they are long."""
    return (checkpoint.read_sidecar(sidecar) or {}).get("key", "")
