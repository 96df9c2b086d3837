"""What a run's folder says was measured: the numbers of its sidecars, by model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from dtlctl.errors import CheckpointError
from dtlctl.recipe.plan import Job, jobs
from dtlctl.recipe.schema import REFERENCES, Recipe
from dtlctl.run import provenance
from dtlctl.storage import checkpoint

Row = dict[str, Any]

# Numbers by piggyback dataset: the sidecar's metric behind each.
ATTACKS = {"piggyback": "acc_pl", "piggyback_worst": "acc_pl_worst", "piggyback_max": "acc_pl_max"}


def recipe_of(run: Path) -> Recipe:
    """The run's recipe, every setting. Raises CheckpointError where there is none."""
    try:
        document = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        return Recipe.model_validate(document, context={"finished": True})
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{run / 'recipe.json'}: not a run's recipe ({reason})") from None


def belonging(run: Path, recipe: Recipe) -> Iterator[tuple[Job[Any], Row]]:
    """The recipe's results that are there, in order: jobs and their sidecars.

    What was made from other settings, images or weights is left out. Raises CheckpointError for a file that is no
    sidecar.
    """
    weights: dict[str, Any] = {}
    for job in jobs(recipe):
        sidecar = checkpoint.read_sidecar(run / job.path)
        if sidecar is None:
            continue
        expected = {
            **job.described(recipe),
            "precision": recipe.precision,
            "parent": {job.parent: weights.get(job.parent)} if job.parent else {},
        }
        if any(sidecar.get(name) != value for name, value in expected.items()):
            continue
        try:
            if provenance.differs(sidecar, job, recipe):
                continue
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{run / job.path}: not the data of {job.stage}; delete it") from None
        if "weights_sha256" in sidecar:
            weights[job.model] = sidecar["weights_sha256"]
        yield job, sidecar


class Measured(NamedTuple):
    """What a run's results say."""

    rows: dict[str, Row]  # numbers by model, the references first
    data: dict[str, tuple[Row, Path]]  # by role: the images that they have seen, and a sidecar that says so
    renamed: list[str]  # a sentence for every dataset that some of them call otherwise than the recipe


def measured(run: Path, recipe: Recipe) -> Measured:
    """The numbers of all results that belong to the recipe.

    Raises CheckpointError for a file that is no sidecar, and where two results have seen different data: which of
    them is that of the recipe cannot be told without the data.
    """
    rows: dict[str, Row] = {model: {"model": model, "piggyback": {}} for model in [*REFERENCES, *recipe.dispose]}
    data: dict[str, tuple[Row, Path]] = {}
    renamed: dict[tuple[str, str], dict[str, None]] = {}
    for job, sidecar in belonging(run, recipe):
        for named in provenance.renamed(sidecar, job, recipe).items():
            renamed.setdefault(named, {})[job.model] = None
        try:
            _agree(data, sidecar["data"], run / job.path)
            _add(rows[job.model], job, sidecar)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{run / job.path}: not the metrics of {job.stage}; delete it") from None
    sentences = [
        f"data.{role} for {', '.join(models)}: {text}. What saw other images is made again by dtlctl run RECIPE."
        for (role, text), models in renamed.items()
    ]
    return Measured({m: row for m, row in rows.items() if row["piggyback"] or len(row) > 2}, data, sentences)


def _add(row: Row, job: Job[Any], sidecar: Row) -> None:
    """Add the numbers of one result to its model's row. Raises what a sidecar of another form makes Python raise."""
    metrics = sidecar["metrics"]
    if job.stage == "audit":
        # Through a head that nothing has trained an attack sees noise: its 0.5 would read as forgetting.
        if metrics["source_head"] == "trained" and "loss" in metrics:
            row["audit_auc"] = float(metrics["loss"]["auc"])
    elif job.stage == "piggyback":
        name = job.dataset.partition(".")[2]
        for kind, metric in ATTACKS.items():
            if metric in metrics or kind == "piggyback":
                row.setdefault(kind, {})[name] = float(metrics[metric])
        if metrics.get("chosen") and job.settings.choose_on == "own":
            row.setdefault("held_out", {})[name] = fmean(one["val"] for one in metrics["chosen"])
        looks = [[look["step"], look["acc_pl"]] for look in sidecar["history"] if "acc_pl" in look]
        row.setdefault("curves", {})[name] = looks
    else:
        row.update({name: float(value) for name, value in metrics.items()})


def refuse_other_images(found: Iterable[Measured]) -> None:
    """Raise CheckpointError unless these runs have seen the same images; which subset of them goes with the seed."""
    shared: dict[str, tuple[Row, Path]] = {}
    for one in found:
        for role, (own, path) in one.data.items():
            _agree(shared, {role: {split: own[split] for split in ("train", "test") if split in own}}, path)


def _agree(data: dict[str, tuple[Row, Path]], seen: dict[str, Row], path: Path) -> None:
    """Keep what the result has seen, by role; raise CheckpointError where another result has seen something else."""
    for role, own in seen.items():
        other, first = data.setdefault(role, (own, path))
        if any(own[name] != other[name] for name in own.keys() & other.keys()):
            raise CheckpointError(
                f"{path}: made from other images of data.{role} than {first}; do the stages again: dtlctl run RECIPE"
            )
