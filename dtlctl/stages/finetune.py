"""theta_tl = TRAIN(theta_pre, L(theta; D_t)): adapt to the target (section 3.1); without a parent, TGT."""

from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Finetune
from dtlctl.run.experiment import Experiment


def finetune(experiment: Experiment, job: Job[Finetune]) -> None:
    classes = len(experiment.data.classes("target"))
    measures = {"acc_t": ("target", "target")}
    if job.parent:
        model = experiment.trainer.load_model(job.parent)
        experiment.trainer.attach_head(model, "target", classes, "finetune/head")
        measures["acc_s"] = ("source", "source")
    else:
        model = experiment.trainer.new_model({"target": classes}, "target-only/init")
    batches = experiment.trainer.batches_of(job, "finetune/batches")
    objective = cross_entropy(model, "target", batches, job.settings.label_smoothing)
    history, metrics = experiment.trainer.train(job, model, objective, batches, measures)
    experiment.results.publish(job, metrics, history, model)
