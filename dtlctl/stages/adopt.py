"""A model that exists already, in place of one that the run would train: `pre`, TGT, TL, or a reference."""

import math
import time
from functools import partial
from typing import Any

import numpy as np

from dtlctl.data.dataset import Note
from dtlctl.errors import CheckpointError, counted
from dtlctl.model import weights
from dtlctl.model.networks import Classifier
from dtlctl.recipe.plan import Job
from dtlctl.run.experiment import Experiment
from dtlctl.stages import readout
from dtlctl.training.engine import History

FITTED = "one was fitted on its frozen features"
HEADS = {"pre": ("source",), "TGT": ("target",), "TL": ("target", "source")}
"""What each needs, that of its own task first. A reference is attacked through its features alone."""


def adopt(experiment: Experiment, job: Job[Any]) -> None:
    """Publish the weights as the run's model, and measure what they can do; nothing is trained but a missing head.

    The first head is the weights' own, matched to the data by class names or by shape; a source head that there is not
    is fitted on frozen features. Raises CheckpointError for weights that do not fit, or have no head for the target.
    """
    started, where = time.perf_counter(), job.weights or ""
    network = experiment.recipe.model.model_dump(exclude={"channels_last"})
    read = partial(weights.read, where, network, getattr(job.settings, "classes", None))
    if where.startswith(weights.REGISTRY):
        experiment.processes.by_main(read)  # one process downloads what all read
    given = read()
    model = experiment.trainer.new_model({}, "load")
    model.backbone.load_state_dict(given.backbone, strict=False)  # all that counts was checked
    said, metrics = list(given.notes), dict[str, Any]()
    if roles := " and ".join(f"data.{role}" for role in job.roles):
        said.append(f"taken as trained on the train split of {roles}, and not on the test split: audits rest on that")
    for role in job.roles:
        if not isinstance(share := experiment.recipe.data.of(role).test, str):
            drawn = f"data.{role}.test = {share:g} is drawn here: a network that was trained on all of the folder has"
            said.append(f"{drawn} seen these images, and accuracies and audits mean little")
    for head in HEADS.get(job.model, ()):
        try:
            said.append(_head(experiment, job, model, given, head))
        except ValueError as error:
            raise CheckpointError(f"{experiment.source}: {job.title}: {where}: {error}") from None
        metrics |= experiment.trainer.measured(model, {f"acc_{head[0]}": (head, head)})
        if FITTED not in said[-1]:
            said += _by_chance(metrics[f"acc_{head[0]}"], experiment.data.images(head, "test").labels)
    for text in said:
        experiment.processes.say(f"{job.title}: {text}")
    notes = [Note("fitted-head" if FITTED in text else "weights", 1, text) for text in said]
    experiment.results.publish(job, metrics, History(seconds=time.perf_counter() - started), model, notes)


def _by_chance(accuracy: float, labels: np.ndarray) -> list[str]:
    """What to look at where answers are right as seldom as guessed ones: within two standard deviations, or less."""
    share = float(np.bincount(labels[labels >= 0]).max()) / (count := int((labels >= 0).sum()))
    if accuracy / 100 > share + 2 * math.sqrt(share * (1 - share) / count):
        return []
    wrong = "image_size, mean or std under [model] may be wrong, or the order of its classes"
    return [f"{accuracy:.1f} % is no better than chance: {wrong}"]


def _head(experiment: Experiment, job: Job[Any], model: Classifier, given: weights.Given, head: str) -> str:
    """Give the model a head; in words, where it comes from."""
    own, other = HEADS[job.model][0] == head, ""
    if own and (given.head or head == "target"):
        try:
            return weights.fill_head(model, head, given, experiment.data.classes(head))
        except ValueError as error:
            if head == "target" or not given.classes:
                raise
            other = f"; {error}"
    experiment.processes.say(f"{job.title}: fitting a {head} head on the frozen features")
    count = readout.fit_head(experiment, model, head, [("train", experiment.data.index(head))])
    return f"no head for the {head} in it{other}: {FITTED} of {counted(count, 'image')}"
