"""theta_pl = TRAIN(theta, L(theta; D_p)) and its test accuracy Acc_pl: what an attacker gets out (Eq. 14)."""

from __future__ import annotations

from dtlctl.experiment import Experiment
from dtlctl.objectives.supervised import cross_entropy
from dtlctl.plan import Job
from dtlctl.recipe import Piggyback


def piggyback(lab: Experiment, job: Job[Piggyback]) -> None:
    """Full fine-tuning of all weights under a new head. Head, batches and augmentation are the same for all models."""
    classes = len(lab.classes(job.dataset))
    tag = f"piggyback/{job.dataset}"
    model = lab.load_model(job.parent) if job.parent else lab.new_model({}, f"{tag}/init")
    lab.attach_head(model, "piggyback", classes, f"{tag}/head")
    batches = lab.batches(job.dataset, job.settings.batch_size, f"{tag}/batches")
    objective = cross_entropy(model, "piggyback", batches)
    history, metrics = lab.train(job, model, objective, batches, {"acc_pl": ("piggyback", job.dataset)})
    lab.publish(job, metrics, history)
