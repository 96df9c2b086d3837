"""What `dtlctl check` shows: the plan of a recipe and its cost, without training or fetching anything."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dtlctl.attacks.attackers import Frozen
from dtlctl.data.cache import cached
from dtlctl.data.dataset import is_hub
from dtlctl.data.subset import balanced
from dtlctl.errors import CheckpointError, DataError
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.run.experiment import Experiment
from dtlctl.stages import data_demands
from dtlctl.stages.reference import missing
from dtlctl.storage import checkpoint

# A step of gradient collision in units of a step of plain training on the same images. The floor by operation count
# is 3; small chunks and second derivatives of small layers cost more.
COLLISION_COST = 4.0
NOTES = {"to do": "", "stale": "there, but from other settings or data; ", "unreadable": "there, but unreadable; ",
         "not checked": "there, not checked; "}  # fmt: skip


def plan(recipe: Recipe, out: Path, source: str = "RECIPE") -> dict[str, Any]:
    """{"recipe", "parameters", "data": [...], "jobs": [...], "minutes"}: counts are None where data is not decoded.

    Every job has a state: "to do"; "done"; "stale", made from other settings, data or parents; "unreadable"; or "not
    checked", a sidecar that is there while the data it was made from is not decoded. Times are rough: a few steps of
    this model on this machine's CPU or GPU, multiplied up, for what is not done. Of an audit they have the training of
    rmia's references alone. Raises RecipeError and DataError, naming the recipe's file `source`, where the network or
    decoded data lacks what the recipe asks for.
    """
    experiment = Experiment(recipe, out, source=source, quiet=True)
    data = {role: _describe(recipe, role) for role in _roles(recipe)}
    decoded = {role for role, row in data.items() if row["images"] is not None and row["test_images"] is not None}
    data_demands.check(experiment, [job for job in experiment.jobs if decoded.issuperset(job.roles)])
    parameters, seconds = _measure(recipe)
    rows = [_job(experiment, job, data, seconds) for job in experiment.jobs]
    audits = [row for row in rows if row["stage"] == "audit" and row["state"] != "done"]
    if audits:  # trained for the first, and kept for the others
        audits[0]["seconds"] = _references(experiment, data["source"], seconds)
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "recipe": recipe.name,
        "parameters": parameters,
        "data": list(data.values()),
        "jobs": rows,
        "minutes": round(sum(known) / 60, 1) if len(known) == len(rows) else None,
    }


def text(document: dict[str, Any]) -> str:
    """The plan for a person."""
    lines = [f"recipe {document['recipe']}: valid; {document['parameters']:,} parameters", "", "data"]
    for row in document["data"]:
        size = "not decoded yet" if row["images"] is None else f"{row['images']} images, {row['classes']} classes"
        lines.append(f"  {row['role']:<24} {row['path']}: {size}")
        lines += [f"  {'':<24} note: {row['problem']}"] if row["problem"] else []
    lines += ["", "stages"]
    for row in document["jobs"]:
        steps = "?" if row["steps"] is None else row["steps"]
        cost = f", about {row['seconds']:.0f} s" if row["seconds"] else ""
        work = f"{steps} steps of {row['batch_size']}{cost}"
        if not row["batch_size"]:
            work = "attack" + (f"; the references of rmia{cost}" if cost else "")
        lines.append(f"  {row['title']:<32} " + ("done" if row["state"] == "done" else NOTES[row["state"]] + work))
    total = document["minutes"]
    rough = "known once data is decoded" if total is None else f"{total} min on this machine"
    if total is not None and any(row["stage"] == "audit" and row["state"] != "done" for row in document["jobs"]):
        rough += ", without the attacks of the audit themselves"
    return "\n".join([*lines, "", f"rough time: {rough}"])


def _roles(recipe: Recipe) -> list[str]:
    return ["source", "target", *(f"piggyback.{name}" for name in recipe.data.piggyback)]


def _describe(recipe: Recipe, role: str) -> dict[str, Any]:
    dataset = recipe.data.of(role)
    try:
        train, test = (cached(dataset, split, recipe.model.image_size, role=role) for split in ("train", "test"))
    except DataError as error:
        nothing = dict.fromkeys(("images", "test_images", "classes"))
        return {"role": role, "path": dataset.path, "problem": str(error), **nothing}
    chosen = None if train is None else len(balanced(train.labels, len(train.classes), dataset.fraction, 0))
    return {
        "role": role,
        "path": dataset.path,
        "problem": "revision not pinned" if is_hub(dataset) and dataset.revision is None else None,
        "images": chosen,
        "test_images": None if test is None else len(test.labels),
        "classes": None if train is None else len(train.classes),
    }


def _measure(recipe: Recipe, rounds: int = 3) -> tuple[int, float]:
    """Number of parameters, and seconds that one image costs in a step of training here."""
    import torch
    from torch.nn.functional import cross_entropy

    from dtlctl.model import networks

    spec, batch = recipe.model, 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = networks.build(spec.arch, {"source": 100}, stem=spec.stem, width=spec.width, image_size=spec.image_size).to(
        device
    )
    x = torch.rand(batch, 3, spec.image_size, spec.image_size, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        cross_entropy(model(x, "source"), y).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sum(p.numel() for p in model.parameters()), min(times) / batch


def _state(experiment: Experiment, job: Job[Any], data: dict[str, Any]) -> str:
    """One of those that `plan` names. No data is decoded and no engine started for it."""
    path = experiment.folder / job.path
    if not path.exists():
        return "to do"
    try:
        checkpoint.read_sidecar(path)
    except CheckpointError:
        return "unreadable"
    roles = {*job.roles, *(("source", "target") if job.parent else ())}
    if any(data[role][count] is None for role in roles for count in ("images", "test_images")):
        return "not checked"
    with suppress(CheckpointError):  # of a parent: missing, stale or unreadable
        return "done" if experiment.results.done(job) else "stale"
    return "stale"


def _references(experiment: Experiment, source: dict[str, Any], seconds: float) -> float | None:
    """Seconds that the missing references take; each sees half of the source's images, its test split among them."""
    count, settings = experiment.recipe.audit.references, experiment.recipe.pretrain
    if not count:
        return 0.0
    if source["images"] is None or source["test_images"] is None:
        return None
    half = (source["images"] + source["test_images"]) // 2
    return missing(experiment, count) * settings.total_steps(half) * min(settings.batch_size, half) * seconds


def _job(experiment: Experiment, job: Job[Any], data: dict[str, Any], seconds: float) -> dict[str, Any]:
    images = data[job.dataset]["images"]
    size = getattr(job.settings, "batch_size", None)
    asked = getattr(job.settings, "steps", None)  # else so many epochs of the images
    steps = asked if images is None or size is None else job.settings.total_steps(images)
    cost = None if images is None or size is None else steps * min(size, images) * seconds
    if cost is not None and job.stage == "dispose" and job.settings.unlearn.chunks > 1:
        share = 1 - job.settings.repair
        cost *= 1 + share * (COLLISION_COST - 1)
    if cost is not None and job.stage == "piggyback":
        trained = [(a, len(a.lr) + 1) for a in job.settings.attackers if not isinstance(a, Frozen)]
        fits = sum(count * a.steps * min(a.batch_size, images) for a, count in trained)
        cost += job.settings.attack_seeds * fits * seconds
    state = _state(experiment, job, data)
    return {
        "title": job.title,
        "stage": job.stage,
        "state": state,
        "steps": steps,
        "batch_size": size and (size if images is None else min(size, images)),
        "seconds": 0.0 if size is None or state == "done" else cost,
    }
