"""theta_pre = TRAIN(theta_0, L(theta; D_s)): learn the source from scratch (section 3.1)."""

from dtlctl.objectives.supervised import cross_entropy
from dtlctl.recipe.plan import Job
from dtlctl.recipe.settings import Pretrain
from dtlctl.run.experiment import Experiment


def pretrain(experiment: Experiment, job: Job[Pretrain]) -> None:
    model = experiment.trainer.new_model({"source": len(experiment.data.classes("source"))}, "pretrain/init")
    batches = experiment.trainer.batches_of(job, "pretrain/batches")
    objective = cross_entropy(model, "source", batches, job.settings.label_smoothing)
    history, metrics = experiment.trainer.train(job, model, objective, batches, {"acc_s": ("source", "source")})
    experiment.results.publish(job, metrics, history, model)
