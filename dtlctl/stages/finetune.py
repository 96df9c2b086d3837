"""theta_tl = TRAIN(theta_pre, L(theta; D_t)): adapt to the target (section 3.1); without a parent, TGT."""

from __future__ import annotations

from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Finetune
from dtlctl.run.experiment import Experiment


def finetune(lab: Experiment, job: Job[Finetune]) -> None:
    classes = len(lab.classes("target"))
    measures = {"acc_t": ("target", "target")}
    if job.parent:
        model = lab.load_model(job.parent)
        lab.attach_head(model, "target", classes, "finetune/head")
        measures["acc_s"] = ("source", "source")
    else:
        model = lab.new_model({"target": classes}, "target-only/init")
    batches = lab.batches("target", job.settings.batch_size, "finetune/batches")
    objective = cross_entropy(model, "target", batches)
    history, metrics = lab.train(job, model, objective, batches, measures)
    lab.publish(job, metrics, history, model)
