"""What `dtlctl check` shows: the plan of a recipe and its cost, without training or fetching anything."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dtlctl.console import devices
from dtlctl.console.machine import busy
from dtlctl.data import overlap, subset
from dtlctl.data.dataset import Rows, Split
from dtlctl.data.entry import Images
from dtlctl.data.tensors import Batch
from dtlctl.errors import CheckpointError, DataError
from dtlctl.model import networks
from dtlctl.objectives.disposal import Disposal
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.run.experiment import Experiment
from dtlctl.stages import attack_costs, data_demands
from dtlctl.stages.reference import missing
from dtlctl.storage import checkpoint

SPLITS: tuple[Split, ...] = ("train", "test")
MOST = 64
"""Images of a step that is timed: larger batches take as long an image, and `check` should be quick."""


def plan(
    recipe: Recipe, out: Path, source: str = "RECIPE", *, decode: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """{"recipe", "parameters", "stages", "data", "jobs", "minutes"}: counts are None where nothing cheap tells them.

    decode: what a run would decode, first, with progress unless `quiet`; then all is known.
    Every job has a state: "to do"; "done"; "stale", made from other settings, data or parents; "unreadable"; or "not
    checked", a sidecar that is there while the data it was made from is not decoded. Times are pairs of seconds,
    from the quickest and the slowest of a few real steps on this machine, for what is not done. Raises RecipeError and
    DataError, naming the recipe's file `source`, where the network or decoded data lacks what the recipe asks for.
    """
    experiment, roles = Experiment(recipe, out, source=source, quiet=quiet), recipe.data.roles
    if decode:
        for role in roles:
            experiment.data.identity(role)
    data = {role: _describe(experiment, role) for role in roles}
    decoded = {role for role, row in data.items() if row["decoded"]}
    pairs = {role: (experiment.data.images(role, "train"), experiment.data.images(role, "test")) for role in decoded}
    for role, notes in overlap.across(pairs).items():
        with suppress(DataError):  # `data_demands.check` raises it
            notes[:0] = overlap.within(role, *pairs[role])
        data[role]["notes"] += [note.text for note in notes]
    data_demands.check(experiment, [job for job in experiment.jobs if decoded.issuperset(job.roles)])
    clock, spec = Clock(recipe), recipe.model
    rows = [_job(experiment, job, data, clock) for job in experiment.jobs]
    audits = [row for row in rows if row["stage"] == "audit" and row["state"] != "done"]
    if audits:  # trained for the first, and kept for the others
        each = attack_costs.audit(recipe.audit, data["source"], data["target"], clock)
        for row in audits:
            row["seconds"] = None if each is None else each.tolist()
        if each is not None:
            audits[0]["seconds"] = (each + _references(experiment, data["source"], clock)).tolist()
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "recipe": recipe.name,
        "parameters": clock.parameters,
        "stages": networks.shares(networks.outline(spec.arch, spec.stem, spec.width, spec.image_size).backbone),
        "data": list(data.values()),
        "jobs": rows,
        "minutes": (np.sum(known, 0) / 60).round(1).tolist() if len(known) == len(rows) else None,
    }


def text(document: dict[str, Any]) -> str:
    """The plan for a person."""
    said: set[str] = set()
    for row in document["data"]:  # roles that share a dataset share its notes
        row["fresh"] = [note for note in row["notes"] if note not in said]
        said.update(row["notes"])
    return rendered("check.txt.j2", {**document, "words": words, "busy": busy()})


def rendered(name: str, told: dict[str, Any]) -> str:
    """A template of this folder, filled in."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    read = jinja2.Environment(loader=here, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return read.get_template(name).render(told)


def words(pair: Sequence[float], unit: str) -> str:
    """A pair of numbers as a person would say it."""
    low, high = (f"{end:.0f}" if end >= 10 or unit == "s" else f"{end:.1f}" for end in pair)
    return f"about {low} {unit}" if low == high else f"{low} to {high} {unit}"


def _describe(experiment: Experiment, role: str) -> dict[str, Any]:
    """What is known of a role's data: decoded, or by the names of files; nothing is decoded for it."""
    dataset = experiment.recipe.data.of(role)
    told: dict[str, Any] = {"role": role, "path": dataset.path, "decoded": False, "notes": []}
    told |= dict.fromkeys(("images", "test_images", "classes"))
    source = experiment.data.source(role)
    if source.kind == "hub" and dataset.revision is None:
        told["notes"].append("revision not pinned")
    found: dict[Split, Images | Rows] = {}
    for split in SPLITS:
        if opened := experiment.data.cached(role, split) or source.listed(split):
            found[split] = opened
    if train := found.get("train"):
        counts = np.bincount(train.labels[train.labels >= 0], minlength=len(train.classes)).tolist()
        told["images"] = sum(subset.sizes(counts, dataset.fraction, dataset.balance))
        told["classes"] = len(train.classes)
        limited = subset.imbalance(counts, train.classes, dataset.fraction, dataset.balance)
        told["notes"] += [limited.text] if limited else []
    if test := found.get("test"):
        told["test_images"] = int((test.labels >= 0).sum())
    told["decoded"] = len(found) == 2 and all(isinstance(one, Images) for one in found.values())
    told["notes"] += [note.text for one in found.values() for note in one.notes]
    return told


class Clock:
    """How long an image takes here in a step of training, and in a step of a variant's disposal: [2] seconds.

    Each is measured once, when it is asked for: whole steps of this network on noise, on the device and with the
    threads that a run would have, in batches of at most `MOST` images. It is the quickest and the slowest of some.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.device = recipe, torch.device(devices.kind())
        network = self.network()
        self.parameters = sum(p.numel() for p in network.parameters())
        self.features, self.stages = network.features, len(networks.stages(network.backbone)) + 1
        self.image = cache(self._image)

    def _image(self, variant: str = "") -> np.ndarray:
        """Of an image in training; in a variant's disposal, of an image of the source and all that goes with it."""
        settings: Any = self.recipe.dispose[variant] if variant else self.recipe.pretrain
        chunks = settings.unlearn.chunks if variant else 1
        size = min(settings.batch_size, max(MOST, 2 * chunks)) // chunks * chunks
        loss, times = self._loss(variant, size), list[float]()
        while len(times) < 4 or (sum(times) < 1.0 and len(times) < 20):
            started = devices.clock(self.device)
            loss().backward()
            times.append(devices.clock(self.device) - started)
        return np.array([min(times[1:]), max(times[1:])]) / size  # the first is not counted

    def network(self) -> networks.Classifier:
        spec = self.recipe.model
        model = networks.build(heads={"source": 100, "target": 10}, **spec.model_dump(exclude={"channels_last"}))
        model.precision, model.channels_last = self.recipe.precision, spec.channels_last
        return model.to(self.device)

    def noise(self, size: int) -> Batch:
        x = torch.rand(size, 3, *2 * [self.recipe.model.image_size], device=self.device)
        return Batch(x, torch.zeros(size, dtype=torch.int64, device=self.device), torch.arange(size))

    def _loss(self, variant: str, size: int) -> Callable[[], Tensor]:
        student, batch = self.network(), self.noise(size)
        if not variant:
            return lambda: cross_entropy(student(batch.x, "source"), batch.y)
        settings, teacher = self.recipe.dispose[variant], self.network().eval().requires_grad_(False)
        unlearn, retain, lam = settings.unlearn, settings.retain, settings.lam or 0.5
        fixed: Any = {"batch_norm": "train", "images": size, "label_seed": 0}
        disposal = Disposal(lam, unlearn, retain, student, teacher, chunks=unlearn.chunks, **fixed)
        return lambda: disposal(batch, batch if retain.needs_target else None, True)[0]


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
    if not all(data[role]["decoded"] for role in roles):
        return "not checked"
    with suppress(CheckpointError):  # of a parent: missing, stale or unreadable
        return "done" if experiment.results.done(job) else "stale"
    return "stale"


def _references(experiment: Experiment, source: dict[str, Any], clock: Clock) -> np.ndarray:
    """What the missing references take; each sees half of the source's images, its test split among them."""
    count, settings = experiment.recipe.audit.references, experiment.recipe.pretrain
    if not count:
        return np.zeros(2)
    half = (source["images"] + source["test_images"]) // 2
    images = settings.total_steps(half) * min(settings.batch_size, half)
    return clock.image() * missing(experiment, count) * images


def _job(experiment: Experiment, job: Job[Any], data: dict[str, Any], clock: Clock) -> dict[str, Any]:
    images, state = data[job.dataset]["images"] if job.roles else None, _state(experiment, job, data)
    size, asked = (None if job.weights else getattr(job.settings, key, None) for key in ("batch_size", "steps"))
    steps = asked if images is None or size is None else job.settings.total_steps(images)
    seconds: list[float] | None = [0.0, 0.0]
    if size is not None and state != "done":
        known = data[job.dataset]
        tests, classes = known["test_images"] or 0, known["classes"]
        seconds = None if images is None else cost(job, images, clock, tests, classes).tolist()
    return {
        "title": job.title,
        "stage": job.stage,
        "state": state,
        "weights": job.weights,
        "steps": steps,
        "batch_size": size and (size if images is None else min(size, images)),
        "seconds": seconds,
    }


def cost(job: Job[Any], images: int, clock: Clock, tests: int = 0, classes: int = 10) -> np.ndarray:
    """Seconds [2] that a job that trains takes on so many images of so many classes; tests: of its test split."""
    settings = job.settings
    seen = settings.total_steps(images) * min(settings.batch_size, images)
    if job.stage == "dispose":
        return ((1 - settings.repair) * clock.image(job.model) + settings.repair * clock.image()) * seen
    if job.stage == "piggyback":
        return clock.image() * seen + attack_costs.attackers(settings, images, tests, classes, clock)
    return clock.image() * seen
