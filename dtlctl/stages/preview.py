"""What `dtlctl check` shows: the plan of a recipe and its cost, without training or fetching anything."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dtlctl.console.machine import busy
from dtlctl.data import overlap, subset
from dtlctl.data.entry import Images
from dtlctl.errors import CheckpointError, counted
from dtlctl.model import networks
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.run.experiment import Experiment
from dtlctl.stages import costs, data_demands
from dtlctl.stages.reference import SPLITS, missing
from dtlctl.storage import checkpoint


def plan(
    recipe: Recipe, out: Path, source: str = "RECIPE", *, decode: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """{"recipe", "parameters", "stages", "data", "jobs", "busy", "minutes"}: counts are None where nothing cheap tells.

    decode: what a run would decode, first, with progress unless `quiet`; then all is known. Every job has a state: "to
    do"; "done"; "stale", made from other settings, data or parents; "unreadable"; or "not checked", its data not being
    decoded. Times are pairs of seconds, by the quickest and the slowest of some steps, for what is not done. Raises
    RecipeError and DataError where the network or decoded data lacks what the recipe asks for.
    """
    experiment, roles = Experiment(recipe, out, source=source, quiet=quiet), recipe.data.roles
    if decode:
        for role in roles:
            experiment.data.identity(role)
    data = {role: _describe(experiment, role) for role in roles}
    decoded = tuple(role for role, row in data.items() if row["decoded"])
    for role, notes in experiment.data.notes(decoded).items():
        data[role]["notes"] = list(dict.fromkeys([*data[role]["notes"], *(note.text for note in notes)]))
    data_demands.check(experiment, [job for job in experiment.jobs if {*job.roles} <= {*decoded}])
    crowded, clock = costs.crowded(), costs.Clock(recipe)
    rows = [_job(experiment, job, data, clock) for job in experiment.jobs]
    audits = [row for row in rows if row["stage"] == "audit" and row["state"] != "done"]
    if audits:
        each = costs.audit(recipe.audit, data["source"], data["target"], clock)
        for row in audits:
            row["seconds"] = None if each is None else each.tolist()
        if each is not None:  # references are trained for the first, and kept for the others
            audits[0]["seconds"] = (each + _references(experiment, data["source"], clock)).tolist()
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "recipe": recipe.name,
        "parameters": clock.parameters,
        "stages": networks.shares(networks.outline(*recipe.model.shape).backbone),
        "data": list(data.values()),
        "jobs": rows,
        "busy": crowded or busy(),
        "minutes": (np.sum(known, 0) / 60).round(1).tolist() if len(known) == len(rows) else None,
    }


def text(document: dict[str, Any]) -> str:
    said: set[str] = set()
    for row in document["data"]:  # roles that share a dataset share its notes
        row["fresh"] = [note for note in row["notes"] if note not in said]
        said.update(row["notes"])
    return rendered("check.txt.j2", {**document, "words": words})


def rendered(name: str, told: dict[str, Any]) -> str:
    """A template of this folder, filled in."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    read = jinja2.Environment(loader=here, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return read.get_template(name).render(told, counted=counted)


def words(pair: Sequence[float], unit: str) -> str:
    """A pair of numbers as a person would say it."""
    low, high = (f"{end:.0f}" if end >= 10 or unit == "s" else f"{end:.1f}" for end in pair)
    return f"about {low} {unit}" if low == high else f"{low} to {high} {unit}"


def _describe(experiment: Experiment, role: str) -> dict[str, Any]:
    """What is known of a role's data: decoded, or by the names of files; nothing is decoded for it."""
    dataset, source = experiment.recipe.data.of(role), experiment.data.source(role)
    notes = [overlap.SAME] if role == "target" and source.identity == experiment.data.source("source").identity else []
    notes += ["revision not pinned"] if source.kind == "hub" and dataset.revision is None else []
    known: dict[str, Any] = dict.fromkeys(("images", "test_images", "classes"))
    train, test = found = [experiment.data.cached(role, split) or source.listed(split) for split in SPLITS]
    if train:
        counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes)).tolist()
        known["images"] = sum(subset.sizes(counts, dataset.fraction, dataset.balance))
        known["classes"] = len(train.classes)
        if limited := subset.imbalance(counts, train.classes, dataset.fraction, dataset.balance):
            notes.append(limited.text)
    if test:
        known["test_images"] = int((test.labels >= 0).sum())
    notes += [note.text for one in found if one for note in one.notes]
    decoded = all(isinstance(one, Images) for one in found)
    return {"role": role, "path": dataset.path, "decoded": decoded, "notes": notes, **known}


def _job(experiment: Experiment, job: Job[Any], data: dict[str, Any], clock: costs.Clock) -> dict[str, Any]:
    known: dict[str, Any] = data[job.dataset] if job.roles else {"images": None}
    state = _state(experiment, job, data)
    size, steps = (None if job.weights else getattr(job.settings, key, None) for key in ("batch_size", "steps"))
    images = known["images"]
    seconds: np.ndarray | None = np.zeros(2)
    if size is not None and images is not None:
        size, steps = min(size, images), job.settings.total_steps(images)
    if size is not None and state != "done":
        tests, classes = known["test_images"] or 0, known["classes"]
        seconds = None if images is None else costs.training(job, images, clock, tests, classes)
    return {
        "title": job.title,
        "stage": job.stage,
        "state": state,
        "weights": job.weights,
        "steps": steps,
        "batch_size": size,
        "draws": getattr(job.settings, "most_draws", 1),
        "seconds": None if seconds is None else seconds.tolist(),
    }


def _state(experiment: Experiment, job: Job[Any], data: dict[str, Any]) -> str:
    """One of those that `plan` names. No data is decoded and no engine started for it."""
    path = experiment.folder / job.path
    if not path.exists() or checkpoint.lost(path):
        return "to do"
    try:
        checkpoint.read_sidecar(path)
    except CheckpointError:
        return "unreadable"
    roles = {*job.roles, *(("source", "target") if job.parent else ())}
    if not all(data[role]["decoded"] for role in roles):
        return "not checked"
    with suppress(CheckpointError):  # of a parent: missing, stale or unreadable
        return "done" if experiment.results.done(job) else "stale"
    return "stale"


def _references(experiment: Experiment, source: dict[str, Any], clock: costs.Clock) -> np.ndarray:
    """What the missing references take; each sees half of the source's images, its test split among them."""
    count, settings = experiment.recipe.audit.references, experiment.recipe.pretrain
    if not count:
        return np.zeros(2)
    if source["decoded"]:  # else their key is not known, and all are counted
        count = missing(experiment, count)
    half = (source["images"] + source["test_images"]) // 2
    return clock.image() * count * settings.total_steps(half) * min(settings.batch_size, half)
