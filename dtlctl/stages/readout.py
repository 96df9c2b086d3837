"""Readouts of forgetting: how unsure the source head is, how fast it relearns (section 2.3), where the source still is.

None is an attack: the owner takes them, with all of his source data. A high entropy may come from a ruined head,
so the steps that it takes to come back stand beside it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtlctl.attacks import features
from dtlctl.attacks.signals import Observation, entropy
from dtlctl.data.dataset import Split
from dtlctl.data.tensors import Batch
from dtlctl.model.networks import Classifier
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.settings import Audit, Training
from dtlctl.run.experiment import Experiment
from dtlctl.training.failures import check_finite

SHARE = 0.95
"""Restored means this share of the pre-trained model's Acc_s."""
POINTS = 10
"""How often the accuracy is looked at."""


@torch.no_grad()
def seen(
    experiment: Experiment, role: str, split: Split, rows: np.ndarray | None, see: Callable[[Batch], Tensor]
) -> Tensor:
    """What is seen of these images, in order on any number of processes; DivergedError where it is not finite."""
    parts = [see(batch) for batch in experiment.trainer.split(role, split, rows)]
    found = experiment.engine.gather(torch.cat(parts)).cpu()
    check_finite(found)
    return found


def fit_head(experiment: Experiment, model: Classifier, head: str, sides: Sequence[tuple[Split, np.ndarray]]) -> int:
    """Fit a head on the frozen features of some of its images, given by split and rows; returns how many."""
    model.eval()
    embeddings = [seen(experiment, head, *side, lambda batch: model.embed(batch.x)) for side in sides]
    labels = np.concatenate([experiment.data.images(head, split).labels[rows] for split, rows in sides])
    classes = len(experiment.data.classes(head))
    features.refit(model, head, torch.cat(embeddings), torch.from_numpy(labels), classes)
    return len(labels)


def uncertainty(experiment: Experiment, model: Classifier) -> dict[str, float]:
    """Mean entropy of the source head on the source's test split, in nats and as a share of log K (1: it is mute)."""
    head = model.through("source")

    def unsure(batch: Batch) -> Tensor:
        return -entropy(Observation(head, [(batch.x, batch.y)]))["entropy"]

    mean = float(seen(experiment, "source", "test", None, unsure).double().mean())
    return {"nats": mean, "share_of_log_k": mean / math.log(max(2, model.outputs["source"]))}


def relearning(experiment: Experiment, name: str, settings: Audit) -> dict[str, Any]:
    """Train the model on the source again and count steps until 95 % of the Acc_s of `pre`, if any, or TL is back.

    Acc_s is that of at most 500 fixed test images. {"goal", "steps" (None: not within the budget), "budget", "curve":
    [[step, Acc_s], ...]}, accuracies in %.
    """
    whole = "pre" if "pre" in experiment.recipe.references else "TL"
    goal = SHARE * experiment.results.require(whole)["metrics"]["acc_s"]
    model = experiment.trainer.load_model(name)
    plan = Training(steps=settings.relearn_steps, batch_size=64, lr=settings.relearn_lr, schedule="constant")
    batches = experiment.trainer.batches("source", plan.batch_size, "audit/relearn")
    objective = cross_entropy(model, "source", batches)
    test = len(experiment.data.images("source", "test").labels)
    rows = np.sort(np.random.default_rng(experiment.recipe.stream("audit/relearn/test")).permutation(test)[:500])

    def accuracy(step: int) -> dict[str, float]:
        return {"acc_s": 100 * float(experiment.trainer.right(model, "source", "test", rows).mean())}

    curve, steps = [[0, accuracy(0)["acc_s"]]], settings.relearn_steps
    if curve[0][1] < goal:
        with experiment.processes.progress(f"audit/{name} relearn", steps) as bar:
            size = batches.batch_size
            history = experiment.engine.train(model, objective, plan, steps, size, bar, accuracy, reports=POINTS)
        curve += [[int(row["step"]), row["acc_s"]] for row in history.rows]
    reached = next((step for step, value in curve if value >= goal), None)
    return {"goal": goal, "steps": reached, "budget": steps, "curve": curve}


def similarity(experiment: Experiment, name: str) -> dict[str, dict[str, float]]:
    """Linear CKA of each stage with that of `TL`, `TGT`, `pre` and a new network, by model and stage.

    Of the means of stages' maps and of the embedding, on at most 1,000 test images of the source, the same for all.
    """
    test = len(experiment.data.images("source", "test").labels)
    rows = np.sort(np.random.default_rng(experiment.recipe.stream("audit/cka")).permutation(test)[:1000])

    def read(model: Classifier) -> dict[str, np.ndarray]:
        # Whole on every process: shares would have to be put back into order.
        return features.read(model.eval(), (batch.x for batch in experiment.trainer.whole("source", "test", rows)))

    known, load = experiment.recipe.references, experiment.trainer.load_model
    others: dict[str, Callable[[], Classifier]] = {m: partial(load, m) for m in ("TL", "TGT", "pre") if m in known}
    others["scratch"] = partial(experiment.trainer.new_model, {}, "audit/cka/scratch")
    own = read(load(name))
    found = {model: read(make()) for model, make in others.items() if model != name}
    return {m: {stage: features.linear_cka(own[stage], v) for stage, v in found[m].items()} for m in found}
