"""Tuned attackers: what each kind does to a model, how a setting is chosen, and that the test split chooses nothing."""

from __future__ import annotations

import copy
import json
import math
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dtlctl.attacks import attackers, features, tuning
from dtlctl.attacks.attackers import Compressed, Full, Knn, LastBlock, Lora, Norms, Renorm
from dtlctl.attacks.features import logistic
from dtlctl.attacks.tuning import Evaluation, Setting, Trial
from dtlctl.data.tensors import Batch
from dtlctl.errors import DataError, RecipeError
from dtlctl.model import networks
from dtlctl.recipe.loading import load
from dtlctl.recipe.plan import jobs
from dtlctl.run.experiment import Experiment
from dtlctl.stages import piggyback
from dtlctl.stages.piggyback import Repetition
from dtlctl.stages.runner import run
from dtlctl.storage.parts import Parts

ATTACKERS = (
    'piggyback.attackers=[{kind="full", lr=[0.01, 0.1], steps=4}, {kind="full", optimizer="adam", lr=[0.01], steps=4}, '
    '{kind="probe", C=[0.1, 1.0]}, {kind="last-block", lr=[0.05], steps=4}, {kind="renorm", lr=[0.05], steps=4}, '
    '{kind="renorm-probe", C=[1.0]}, {kind="norms", lr=[0.05], steps=4}, {kind="lora", lr=[0.05], rank=[1], steps=4}, '
    '{kind="self-training", augment="resized-crop-flip", lr=[0.05], steps=4}, '
    '{kind="compressed", bits=[4], prune=[], C=[1.0]}, {kind="knn", k=[1]}]'
)


def pair() -> tuple[networks.Classifier, networks.Classifier]:
    torch.manual_seed(0)
    old, new = (networks.build("resnet8", {"piggyback": 4}, width=4) for _ in range(2))
    with torch.no_grad():
        for p in old.parameters():
            p.mul_(3)
    return old, new


def test_the_held_out_part_is_balanced_and_needs_two_of_a_class():
    """4, 8 and 6 images: a quarter of the smallest class is one of each; two a class hold out one a class."""
    labels = np.repeat([0, 1, 2], [4, 8, 6])
    train, held = tuning.hold_out(labels, 0.25, 7)
    assert sorted(labels[held]) == [0, 1, 2]
    assert sorted([*train, *held]) == list(range(18))
    train, held = tuning.hold_out(np.array([0, 0, 1, 1]), 0.9, 0)
    assert (sorted(np.array([0, 0, 1, 1])[train]), len(held)) == ([0, 1], 2)
    assert [list(tuning.hold_out(labels, 0.25, s)[1]) for s in (1, 1)] == [
        list(tuning.hold_out(labels, 0.25, 1)[1])
    ] * 2
    with pytest.raises(DataError, match="2 or more of every class"):
        tuning.hold_out(np.array([0, 0, 1]), 0.5, 0)


def test_the_schedule_rises_then_falls_to_zero():
    """10 steps, 20 % warm-up: 1/3, 2/3, then cos from 1; half-way through the 8 others it is one half."""
    values = [tuning.factor(step, 10, 0.2) for step in range(10)]
    assert values[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert values[6] == pytest.approx(0.5)
    assert values[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


def trial(accuracy: float, loss: float, step: int = 1) -> Trial:
    return Trial(Setting("full", "sgd", 0.1), 0, [Evaluation(step, accuracy, loss)])


def test_the_choice_is_the_best_on_held_out_images():
    """A tie in accuracy goes to the smaller loss; a diverged trial never wins. No trial knows its test accuracy."""
    worse, better, tied = trial(50, 0.5), trial(60, 1.0), trial(60, 0.9)
    diverged = Trial(Setting("full", "sgd", 100.0), 0, [])
    assert tuning.choose([diverged, worse, better]) is better
    assert tuning.choose([better, tied, worse]) is tied
    assert tuning.choose([diverged]) is None
    looks = [Evaluation(10, 50.0, 1.0), Evaluation(20, 70.0, 2.0), Evaluation(30, 70.0, 2.0)]
    assert Trial(Setting("full", "sgd", 0.1), 0, looks).best == looks[1]


def test_full_changes_nothing_and_last_block_only_the_last_stages():
    old, new = pair()
    before = copy.deepcopy(old.state_dict())
    Full().prepare(old, new, [torch.rand(5, 3, 16, 16)])
    assert all(torch.equal(before[k], v) for k, v in old.state_dict().items())
    fresh = new.state_dict()
    for amount, anew in ((1, ("backbone.stages.2.",)), (2, ("backbone.stages.1.", "backbone.stages.2."))):
        LastBlock().prepare(old, new, [torch.rand(5, 3, 16, 16)], amount)
        changed = {k for k, v in old.state_dict().items() if not torch.equal(before[k], v)}
        assert all(k.startswith(anew) and torch.equal(old.state_dict()[k], fresh[k]) for k in changed)
        assert {k for k in before if k.startswith(tuple(f"{path}conv" for path in anew))} <= changed
    assert [s.amount for s in LastBlock(stages=[1, 3], lr=[0.1, 1.0]).grid()] == [1, 1, 3, 3]


@pytest.mark.parametrize("arch", ["resnet10", "resnet50", "vgg11", "mobilenet_v2", "densenet121", "vit_b_32"])
def test_the_last_stage_of_torchvision_models_is_found(arch: str):
    with torch.device("meta"):
        model = networks.build(arch, {"a": 2}, stem="imagenet", image_size=64)
    stage = [p for block in networks.stages(model.backbone)[-1].modules for p in block.parameters()]
    assert 0 < sum(p.numel() for p in stage) < sum(p.numel() for p in model.backbone.parameters())


def test_last_block_refuses_a_network_whose_stages_are_not_known():
    unknown = networks.Classifier(torch.nn.Sequential(torch.nn.Flatten()), 3, {"a": 2})
    with pytest.raises(ValueError, match="1 of the last stages of Sequential, but 0 are known"):
        LastBlock().prepare(unknown, unknown, [torch.rand(5, 3, 1, 1)], 1)


def test_renorm_gives_new_norms_the_same_function_and_the_images_statistics():
    """With batch normalisation, a rescaled convolution computes the same (up to its eps) in train mode."""
    old, new = pair()
    x = torch.rand(40, 3, 16, 16)
    before = copy.deepcopy(old).train().embed(x)
    Renorm().prepare(old, new, [x])
    for ours, theirs in zip(old.backbone.modules(), new.backbone.modules(), strict=True):
        if isinstance(ours, torch.nn.Conv2d):
            assert ours.weight.norm().item() == pytest.approx(theirs.weight.norm().item(), rel=1e-5)
    stem = old.backbone.get_submodule("stem")
    assert isinstance(stem, torch.nn.Sequential)
    first = stem[0]((x - old.mean) / old.std)
    assert torch.allclose(stem[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(stem[1].running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert stem[1].momentum == 0.1
    assert torch.allclose(old.train().embed(x), before, rtol=0.02, atol=0.02)
    with pytest.raises(RecipeError, match="needs a model with batch normalisation"):
        plain = networks.outline("vgg11", "imagenet", None, 32)
        Renorm().prepare(plain, plain, [x])


def test_renorm_leaves_squeeze_and_excitation_alone():
    """Its convolutions have no batch normalisation behind them: rescaled, the model is another one."""
    torch.manual_seed(0)
    old, new = (networks.build("mobilenet_v3_small", {"a": 2}, stem="imagenet", image_size=32) for _ in range(2))
    weights = {name: module for name, module in old.backbone.named_modules() if isinstance(module, torch.nn.Conv2d)}
    with torch.no_grad():
        for module in weights.values():
            module.weight.mul_(3)
    before = {name: module.weight.clone() for name, module in weights.items()}
    Renorm().prepare(old, new, [torch.rand(8, 3, 32, 32)])
    alone = {name for name, weight in before.items() if torch.equal(weights[name].weight, weight)}
    assert alone == {name for name in weights if ".fc" in name} and len(alone) == 18


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**70])
def test_renorm_undoes_a_scale_of_any_size(factor: float):
    """The square of 2^-100 is 0 in float32, that of 2^70 infinite. A power of two changes no digit: all stays equal."""
    (old, new), x = pair(), torch.rand(40, 3, 16, 16)
    scaled = copy.deepcopy(old)
    for module in scaled.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.mul_(factor)
    for model in (old, scaled):
        Renorm().prepare(model, new, [x])
    found = scaled.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in old.state_dict().items())


def test_features_that_are_not_finite_make_a_failed_trial_and_wrong_answers(recipe_file: Path):
    """scikit-learn refuses them. What the attacker cannot fit is a trial without a look; what judges him, a miss."""
    experiment = Experiment(load(recipe_file, ['piggyback.attackers=[{kind="probe"}]']), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (probe,) = Repetition(experiment, job, 0), job.settings.attackers
    setting = probe.grid()[0]
    trial = repetition.attempt(probe, setting)
    before, (features, _) = repetition.finish(probe, trial).acc_pl, repetition.seen(probe)["test"]
    features = features["embedding"]
    features[: len(features) // 2] = np.nan
    assert 0 < repetition.finish(probe, trial).acc_pl < before
    features[:] = np.inf
    assert repetition.finish(probe, trial).acc_pl == 0
    repetition.seen(probe)["train"][0]["embedding"][repetition.train[0]] = np.inf
    failed = repetition.attempt(probe, setting)
    assert failed.evaluations == [] and tuning.choose([failed, trial]) is trial


def test_a_renorm_probe_sees_through_running_statistics(recipe_file: Path):
    """Running means of 10,000 silence every unit for the probe; with the images' own statistics nothing has changed."""

    def own(features: Any) -> np.ndarray:
        return features["train"][0]["embedding"]

    change = 'piggyback.attackers=[{kind="probe"}, {kind="renorm-probe"}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (probe, renorm_probe) = Repetition(experiment, job, 0), job.settings.attackers
    first = [own(repetition.seen(attacker)) for attacker in (probe, renorm_probe)]
    repetition.features.clear()
    for module in repetition.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(1e4)

    plain, renormalised = (own(repetition.seen(attacker)) for attacker in (probe, renorm_probe))
    assert first[0].std(0).max() > 0.01
    assert plain.std(0).max() < 1e-6
    assert np.allclose(renormalised, first[1], atol=1e-5)
    assert renormalised.std(0).max() > 0.01


def test_what_a_late_stage_hides_an_early_one_gives_away(recipe_file: Path):
    """Late stages of zeros leave nothing in the embedding: one answer for all ten digits. The first stage is whole."""
    table = '[{kind="probe"}, {kind="probe", stage="embedding"}, {kind="knn"}, {kind="knn", stage="embedding"}]'
    changes = ("model.width=16", "data.piggyback.again.fraction=0.3", f"piggyback.attackers={table}")
    experiment = Experiment(load(recipe_file, list(changes)), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    start = piggyback.start

    def destroyed(*arguments: Any, **options: Any) -> networks.Classifier:
        model = start(*arguments, **options)
        for tensor in (t for s in networks.stages(model.backbone)[1:] for b in s.modules for t in b.parameters()):
            tensor.data.zero_()
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piggyback, "start", destroyed)
        repetition = Repetition(experiment, job, 0)
    found = []
    for attacker in job.settings.attackers:
        tried = [repetition.attempt(*point) for point in repetition.grid if point[0] is attacker]
        best = tuning.choose(tried)
        assert best
        found.append((best.setting.stage, repetition.finish(attacker, best).acc_pl))
    for (stage, accuracy), (last, hidden) in (found[:2], found[2:]):
        assert (stage, last) == ("stage1", "embedding")
        assert accuracy > 40 and hidden < 12


def test_rounding_and_pruning_by_hand():
    """4 bits: a row's largest is 7 steps, 0.45 of it 3.15 of them. 8 bits: 57.15 of 127. Half: 3 of all 6 stay."""
    layer = torch.nn.Linear(3, 2, bias=False)
    rows = {4: [1, -3 / 7, 2 / 7], 8: [1, -57 / 127, 38 / 127], 0.5: [1, -0.45, 0.3]}
    for amount, first in rows.items():
        layer.weight.data = torch.tensor([[1.0, -0.45, 0.3], [0.02, 0.0, -0.0101]])
        Compressed().prepare(SimpleNamespace(backbone=layer), None, [], amount)
        assert layer.weight[0].tolist() == pytest.approx(first, abs=1e-6)
        last = {4: -4 * 0.02 / 7, 8: -64 * 0.02 / 127, 0.5: 0}[amount]
        assert layer.weight[1].tolist() == pytest.approx([0.02 * (amount > 1), 0, last], abs=1e-6)


def test_compression_brings_back_what_a_small_weight_hides():
    """One feature, 1 · signal + 0.01 · noise with a noise of 10,000: 4 bits or half of the weights leave the signal."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    z = np.stack([np.where(y, 1.0, -1.0), rng.normal(0, 1e4, 200), np.zeros(200)], 1)
    accuracies = {}
    for amount in (None, *Compressed(prune=[0.67]).amounts()):
        linear = torch.nn.Linear(3, 1, bias=False)
        linear.weight.data = torch.tensor([[1.0, 0.01, 0.0]])
        model = networks.Classifier(torch.nn.Sequential(torch.nn.Flatten(), linear), 1, {})
        if amount:
            Compressed().prepare(model, model, [], amount)
        images = torch.from_numpy(z).float()[:, :, None, None] * model.std + model.mean
        (found,) = features.read(model.eval(), [images]).values()
        fitted = Compressed().fit(found[:100].astype(float), y[:100], 1.0)
        accuracies[amount] = tuning.evaluate_probe(fitted, found[100:].astype(float), y[100:]).accuracy
    assert accuracies[None] < 65 and accuracies[8] < 65
    assert accuracies[4] == accuracies[0.67] == 100


def test_the_nearest_by_cosine_by_hand():
    """Standardised, (3, 0.1) points nearest to (1, 0), although (0, 1) is closer; of three neighbours two outvote."""
    x, y = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), np.array([5, 6, 7, 8])
    assert Knn().fit(x, y, 1).predict(np.array([[3, 0.1], [0.1, -3], [0.02, 0.1]])).tolist() == [5, 8, 7]
    # At 10, -10 and 0 degrees, with quarter turns: scales of one. At 4.9, 1 / 4.9² < 1 / 5.1² + 1 / 14.9².
    angles = np.deg2rad(np.concatenate([np.array([10, -10, 0]) + turn for turn in (0, 90, 180, 270)]))
    x, query = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([[np.cos(0.0855), np.sin(0.0855)]])
    near, more = (Knn().fit(x, np.array([0, 0, 1] + [2] * 9), k) for k in (1, 3))
    assert (near.predict(query), more.predict(query)) == (1, 0)


def test_norms_and_lora_train_nothing_else_of_the_backbone():
    """One step: convolutions stay, or change by a matrix of the rank; at first the network answers as it did."""
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    for attacker, amount in ((Norms(), None), (Lora(rank=[2]), 2)):
        start, old = pair()
        before, answer = copy.deepcopy(old), old.eval()(x)
        attacker.prepare(old, start, [x], amount)
        assert torch.equal(old(x), answer)
        optimizer = torch.optim.SGD([p for p in old.parameters() if p.requires_grad], 0.01, 0.9)
        for _ in range(2):
            torch.nn.functional.cross_entropy(old(x), y).backward()
            optimizer.step()
        norms = [[m for m in one.modules() if isinstance(m, torch.nn.BatchNorm2d)] for one in (old, before)]
        moved = [not torch.equal(ours.weight, theirs.weight) for ours, theirs in zip(*norms, strict=True)]
        convolutions = zip(attackers.weighted(old.backbone), attackers.weighted(before.backbone), strict=True)
        ranks = {int(torch.linalg.matrix_rank((a.weight - b.weight).flatten(1), atol=1e-5)) for a, b in convolutions}
        assert ranks == ({2} if amount else {0})
        assert any(moved) == (amount is None)
        assert not torch.equal(old.heads["piggyback"].weight, before.heads["piggyback"].weight)


def total(model: torch.nn.Module):
    """In cross-entropy's place, a loss whose gradient is one everywhere."""
    return lambda logits, y: sum(p.sum() for p in model.parameters())


def test_a_layered_attacker_steps_as_far_as_each_stage_may(monkeypatch: pytest.MonkeyPatch):
    """AdamW's first step is a weight's rate, whatever its gradient: here 0.01 for the head, half for the last of three
    stages, and so on; the stem's is 0.01 / 16. Without layer_decay it is 0.01 for all."""
    for decay, base in ((0.5, 0.5), (None, 1.0)):
        model, _ = pair()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        monkeypatch.setattr(tuning.F, "cross_entropy", total(model))
        batch = Batch(torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), torch.arange(2))
        setting = Setting("full", "adamw", 0.01)
        tuning.train(model.through("piggyback"), [batch], setting, steps=1, warmup=0, weight_decay=0, layer_decay=decay)
        stages = networks.stages(model.backbone)
        places = {id(p): k for k, stage in enumerate(stages) for m in stage.modules for p in m.parameters()}
        for name, p in model.named_parameters():
            rate = 0.01 if name.startswith("heads") else 0.01 * base ** (3 - places.get(id(p), -1))
            torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, rate), rtol=2e-2, atol=1e-6)
    with pytest.raises(ValueError, match=r"layer_decay = 0\.5 is for optimizer"):
        Full(layer_decay=0.5)


def test_training_keeps_the_best_look_and_survives_divergence():
    """Held-out labels that contradict the training make later looks worse. At rate 1e30 no look is finite; no error."""
    from dtlctl.data.tensors import Batches, evaluation_batches

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 255, (16, 3, 16, 16), dtype=np.uint8), np.arange(16) % 4
    batches = Batches(pixels, labels, np.arange(16), batch_size=8, augment="none", seed=0, device=torch.device("cpu"))
    held = partial(evaluation_batches, pixels, (labels + 1) % 4, device=torch.device("cpu"))
    for rate, length in ((0.05, 10), (1e30, 0)):
        model = pair()[1]
        looks = tuning.train(model, batches, Setting("full", "sgd", rate), steps=20, warmup=0.1, held_out=held)
        assert len(looks) == length
        if looks:
            best = max(looks, key=lambda look: look.merit)
            assert best.step < 20
            assert tuning.evaluate(model, held(), best.step) == pytest.approx(best)


class Points:
    """All of some points in every batch."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y = x, y

    def __getitem__(self, step: int) -> Any:
        return self


def self_trained(x: torch.Tensor, y: torch.Tensor, more: bool) -> float:
    """% of points [N, 2] with labels that a linear classifier tells, of which it knew two, and saw the others or not.

    The two lie at (-0.3, 0.9) and (0.3, -0.9), so that by them alone the classes are told by x - 3 y.
    """
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    known: Any = Points(torch.tensor([[-0.3, 0.9], [0.3, -0.9]]), torch.tensor([0, 1]))
    others: Any = Points(x, torch.full_like(y, -1))  # no label is read, or the cross-entropy would refuse it
    setting = Setting("self-training", "sgd", 0.2)
    extra: Any = {"unlabelled": others, "threshold": 0.8} if more else {}
    tuning.train(model, known, setting, steps=300, warmup=0.1, **extra)
    return tuning.evaluate(model, [known.__class__(x, y)], 300).accuracy


def test_self_training_finds_the_gap_between_clusters_and_nothing_in_noise(monkeypatch: pytest.MonkeyPatch):
    """Two clusters at x = -1 and 1 with deviations of 0.25: two points leave the tenth wrong that has |y| above 1/3.

    That is 1.3 deviations. By its own answers where it is sure, the classifier gets all. Of labels that nothing in the
    images tells it gets half, as before. Shuffled answers teach nothing.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    clusters = torch.stack([2.0 * y - 1, 0.0 * y], 1) + 0.25 * torch.randn(400, 2, generator=generator)
    alone, both = self_trained(clusters, y, False), self_trained(clusters, y, True)
    assert 80 < alone < 95 and both > 99.5
    noise = torch.randn(400, 2, generator=generator)
    assert abs(self_trained(noise, y, True) - 50) < 8 and abs(self_trained(noise, y, False) - 50) < 8

    def shuffled(logits: torch.Tensor, threshold: float) -> torch.Tensor:
        likelihood, labels = logits.detach().softmax(1).max(1)
        labels = labels[torch.randperm(len(labels), generator=generator)]
        return (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * (likelihood >= threshold)).mean()

    monkeypatch.setattr(tuning, "pseudo_labelled", shuffled)
    assert self_trained(clusters, y, True) < 95


def test_only_answers_that_are_sure_count_as_labels():
    """Probabilities of 0.9 and 0.6: of the mean over two images the first has -log 0.9 / 2, the second nothing."""
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
    assert float(tuning.pseudo_labelled(logits, 0.8)) == pytest.approx(-math.log(0.9) / 2)
    assert float(tuning.pseudo_labelled(logits, 0.5)) == pytest.approx(-(math.log(0.9) + math.log(0.6)) / 2)


def test_self_training_sees_what_the_subset_leaves_out_and_no_label_of_it(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """30 of 1,000 digits are his: 970 are without labels for him. A dataset that is his as a whole leaves none."""
    change = 'piggyback.attackers=[{kind="self-training", lr=[0.1], steps=4}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, seen = Repetition(experiment, job, 0), []
    train = tuning.train
    monkeypatch.setattr(tuning, "train", lambda *a, **k: seen.append((a[1], k)) or train(*a, **k))
    trial = repetition.attempt(*repetition.grid[0])
    ((own, options),) = seen
    rows = options["unlabelled"].rows.tolist()
    assert options["threshold"] == 0.8 and len(rows) == 970
    assert set(rows).isdisjoint(experiment.data.index("piggyback.again").tolist())
    assert set(own.rows.tolist()) < set(experiment.data.index("piggyback.again").tolist())
    options["unlabelled"].labels.fill_(-1)  # the cross-entropy refuses it
    assert repetition.attempt(*repetition.grid[0]) == trial
    whole = load(recipe_file, [change, "data.piggyback.again.fraction=1.0"])
    with pytest.raises(DataError, match=r"^RECIPE: data\.piggyback\.again\.fraction: .*self-training"):
        run(Experiment(whole, recipe_file.parent, quiet=True), ("piggyback",), only=("scratch",))


def test_a_head_that_is_fitted_starts_as_the_probe_of_the_embedding(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """After no step the model answers as a logistic regression with C = 1 does; then all its weights are trained."""
    change = 'piggyback.attackers=[{kind="full", head="fitted", augment="none", lr=[0.1], steps=2}, {kind="probe"}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (full, probe) = Repetition(experiment, job, 0), job.settings.attackers
    (x, y), test = ((read["embedding"].astype(float), labels) for read, labels in repetition.seen(probe).values())
    answers, train = [], tuning.train

    def look(model: Any, batches: Any, *rest: Any, **options: Any) -> Any:
        assert all(parameter.requires_grad for parameter in model.parameters()) and batches.augment == "none"
        answers.append(tuning.evaluate(model, repetition.whole("test"), 0))
        return train(model, batches, *rest, **options)

    monkeypatch.setattr(tuning, "train", look)
    repetition.attempt(full, full.grid()[0])
    expected = tuning.evaluate_probe(logistic(x[repetition.train], y[repetition.train], 1.0), *test)
    assert answers[0].accuracy == pytest.approx(expected.accuracy, abs=0.3)
    assert answers[0].loss == pytest.approx(expected.loss, rel=1e-3)


def test_a_linear_probe_separates_what_is_separable():
    """Two clusters at -1 and +1 of one feature, the other feature constant: all right, whatever C."""
    x, y = np.array([[-1.0, 3], [-0.9, 3], [0.9, 3], [1.0, 3]]), np.array([0, 0, 1, 1])
    look = tuning.evaluate_probe(logistic(x, y, 1.0), x, y)
    assert look.accuracy == 100
    assert 0 < look.loss < math.log(2)
    assert tuning.evaluate_probe(logistic(x, y, 1.0), x, 1 - y).accuracy == 0


def test_every_attacker_leaves_its_trials_and_one_thread_equals_two(recipe_file: Path):
    """2 + 1 settings of full, 2 of probe on 3 stages, 2 of last-block, 1 each of 4, 3 each of 3: 24 a seed."""
    documents = []
    for name, threads in (("one", 1), ("two", 2)):
        experiment = Experiment(
            load(recipe_file, [ATTACKERS, "piggyback.attack_seeds=2", f"name={name}"]), recipe_file.parent, quiet=True
        )
        run(experiment, ("pretrain", "finetune"), only=("pre", "TL"))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        run(experiment, ("piggyback",), only=("TL",))
        torch.set_num_threads(before)
        documents.append(json.loads((experiment.folder / "piggyback/TL/again.json").read_text())["metrics"])
    metrics, other = (
        {k: v for k, v in d.items() if k not in ("trials_per_minute", "attack_seconds")} for d in documents
    )
    assert metrics == other
    assert len(metrics["trials"]) == 48
    stages = {t["stage"] for t in metrics["trials"] if t["kind"] == "probe"}
    assert stages == {"stage1", "stage2", "embedding"}  # the third stage's mean is the embedding
    assert {t["amount"] for t in metrics["trials"] if t["kind"] == "last-block"} == {1, 2}
    kinds = [
        "full",
        "probe",
        "last-block",
        "renorm",
        "renorm-probe",
        "norms",
        "lora",
        "self-training",
        "compressed",
        "knn",
    ]
    assert [final["kind"] for final in metrics["attackers"]] == kinds * 2
    for seed in (0, 1):
        finals = [s for s in metrics["attackers"] if s["seed"] == seed]
        mine = [t for t in metrics["trials"] if t["seed"] == seed]
        for final in finals:
            assert final["val"] == max(t["val"] for t in mine if t["kind"] == final["kind"])
        assert metrics["chosen"][seed]["val"] == max(t["val"] for t in mine)
    assert metrics["acc_pl_worst"] == pytest.approx(sum(c["acc_pl"] for c in metrics["chosen"]) / 2)
    assert metrics["acc_pl_max"] >= max(metrics["acc_pl_worst"], metrics["acc_pl"])


def test_who_is_trained_on_is_not_looked_at_and_nobody_sees_the_test_split(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three images a class: two to train on and one to look at, and at last all three, for the chosen steps."""
    change = 'piggyback.attackers=[{kind="full", lr=[0.1], steps=20}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, seen = Repetition(experiment, job, 0), []
    train = tuning.train
    monkeypatch.setattr(tuning, "train", lambda *a, **k: seen.append((a[1], k)) or train(*a, **k))
    (attacker,) = job.settings.attackers
    trial = repetition.attempt(attacker, attacker.grid()[0])
    repetition.finish(attacker, trial)
    (tried, looking), (again, last) = seen
    pixels = torch.from_numpy(experiment.data.images("source", "train").pixels[:]).float() / 255
    held = sorted(set(experiment.data.index("piggyback.again").tolist()) - set(tried.rows.tolist()))
    assert (len(tried.rows), len(held), len(again.rows)) == (20, 10, 30)
    assert torch.allclose(torch.cat([batch.x for batch in looking["held_out"]()]), pixels[held])
    assert trial.best
    assert (looking["steps"], last["steps"], last["until"]) == (20, 20, trial.best.step)


def test_a_probe_is_fitted_to_the_training_part_and_judged_by_the_held_out(recipe_file: Path):
    """C = 100 knows its 20 images by heart, and not the 10 held-out ones; then it is fitted to all 30."""
    change = 'piggyback.attackers=[{kind="probe", stage="embedding", C=[100.0]}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (attacker,) = Repetition(experiment, job, 0), job.settings.attackers
    trial = repetition.attempt(attacker, attacker.grid()[0])
    (x, y), test = ((read["embedding"].astype(float), labels) for read, labels in repetition.seen(attacker).values())
    train, (split, held) = repetition.train, repetition.held
    assert (split, len(train), len(held), len(test[1])) == (
        "train",
        20,
        10,
        len(experiment.data.images("source", "test").labels),
    )
    fitted = logistic(x[train], y[train], 100.0)
    assert tuning.evaluate_probe(fitted, x[train], y[train]).accuracy == 100
    assert trial.best == tuning.evaluate_probe(fitted, x[held], y[held])
    assert trial.best.accuracy < 100
    assert repetition.finish(attacker, trial).acc_pl == tuning.evaluate_probe(logistic(x, y, 100.0), *test).accuracy


def test_fresh_images_choose_where_the_recipe_says_test(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """All 30 own images train; of the test split, the same number of every class chooses, and the rest judges."""
    table = '[{kind="probe", stage="embedding", C=[100.0]}, {kind="full", lr=[0.1], steps=20}]'
    experiment = Experiment(load(recipe_file, ['piggyback.choose_on="test"', f"piggyback.attackers={table}"]),
                     recipe_file.parent, quiet=True)  # fmt: skip
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (probe, full), labels = (
        Repetition(experiment, job, 0),
        job.settings.attackers,
        experiment.data.images("source", "test").labels,
    )
    split, held = repetition.held
    assert split == "test" and list(repetition.train) == list(range(30))
    assert sorted([*held, *repetition.judges]) == list(range(len(labels)))
    assert set(np.bincount(labels[held])) == {min(np.bincount(labels)) // 2}
    assert len(repetition.judges) > len(labels) // 2  # as the sidecar says
    (x, y), (tests, answers) = ((read["embedding"].astype(float), y) for read, y in repetition.seen(probe).values())
    fitted = logistic(x, y, 100.0)
    trial = repetition.attempt(probe, probe.grid()[0])
    assert trial.best == tuning.evaluate_probe(fitted, tests[held], answers[held])
    assert (
        repetition.finish(probe, trial).acc_pl
        == tuning.evaluate_probe(fitted, tests[repetition.judges], answers[repetition.judges]).accuracy
    )

    seen, judged = [], []
    train, evaluate = tuning.train, tuning.evaluate
    monkeypatch.setattr(tuning, "train", lambda *a, **k: seen.append((a[1].rows, k)) or train(*a, **k))
    tried = repetition.attempt(full, full.grid()[0])
    monkeypatch.setattr(tuning, "evaluate", lambda m, b, n: judged.extend(b := list(b)) or evaluate(m, b, n))
    repetition.finish(full, tried)
    pixels = torch.from_numpy(experiment.data.images("source", "test").pixels[:]).float() / 255
    assert [len(rows) for rows, _ in seen] == [30, 30]
    assert torch.allclose(torch.cat([batch.x for batch in seen[0][1]["held_out"]()]), pixels[held])
    assert torch.allclose(torch.cat([batch.x for batch in judged]), pixels[repetition.judges])


def test_the_worst_case_is_the_best_on_held_out_images(recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    """full has 60 % held out and 20 % in the test, probe 70 % and 10 %: probe's 10 % is quoted; 55 is the one setting.

    The maximum is then 55, and the median of 20 and 10 is 15.
    """
    change = 'piggyback.attackers=[{kind="full", lr=[1.0]}, {kind="probe", C=[1.0]}]'
    experiment = Experiment(load(recipe_file, [change]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    held_out, tested = {"full": 60.0, "probe": 70.0}, {"full": 20.0, "probe": 10.0}

    class Fake:
        stop, model, seed, judges = threading.Event(), torch.nn.Identity(), 0, range(7)

        def __init__(self, experiment: Experiment, *_: object):
            self.experiment = experiment
            self.grid = [(one, setting) for one in job.settings.attackers for setting in one.grid()]

        def attempt(self, attacker: Any, setting: Setting) -> Trial:
            return Trial(setting, 0, [Evaluation(1, held_out[setting.kind], 1.0)])

        def finish(self, attacker: Any, trial: Trial) -> Trial:
            assert attacker.kind == trial.setting.kind
            return trial._replace(acc_pl=tested[attacker.kind])

    monkeypatch.setattr(piggyback, "Repetition", Fake)
    metrics = piggyback._tuned(experiment, job, Parts(experiment.results.scratch(job), "key"), 55.0)
    assert [metrics[f"acc_pl_{name}"] for name in ("worst", "median", "max")] == [10.0, 15.0, 55.0]
    assert [final["kind"] for final in metrics["chosen"]] == ["probe"] and metrics["judges"] == 7


def test_an_attacker_whose_last_training_diverges_is_left_out(recipe_file: Path):
    """On held-out images he is the best; his weights then end as nan, of which argmax would make class 0."""
    attackers = 'piggyback.attackers=[{kind="full", lr=[1.0], steps=2}, {kind="probe", C=[1.0]}]'
    experiment = Experiment(load(recipe_file, [attackers]), recipe_file.parent, quiet=True)
    (job,) = [job for job in experiment.jobs if job.title == "piggyback/scratch/again"]
    repetition, (full, _) = Repetition(experiment, job, 0), job.settings.attackers
    wild = Trial(Setting("full", "sgd", 1e30), 0, [Evaluation(2, 100.0, 0.0)])
    final = repetition.finish(full, wild)
    assert final.acc_pl is None and final.document(final=True)["acc_pl"] is None

    class Fake(Repetition):
        def attempt(self, attacker: Any, setting: Setting) -> Trial:
            return wild if attacker.kind == "full" else Trial(setting, 0, [Evaluation(0, 50.0, 0.0)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piggyback, "Repetition", Fake)
        metrics = piggyback._tuned(experiment, job, Parts(experiment.results.scratch(job), "key"), 5.0)
    assert [one["kind"] for one in metrics["chosen"]] == ["probe"]
    assert [one["acc_pl"] for one in metrics["attackers"]] == [None, metrics["acc_pl_worst"]]
    assert metrics["acc_pl_median"] == metrics["acc_pl_worst"] > 0


def test_an_attacker_may_be_for_some_datasets_only(recipe_file: Path):
    """Where nobody tunes himself, the result is that of a recipe without attackers, and so is its key."""
    more = "data.piggyback.other={like='target'}"
    here = load(recipe_file, [more, 'piggyback.attackers=[{kind="probe", datasets=["other"]}, {kind="full"}]'])
    kinds = {job.path: [a.kind for a in job.settings.attackers] for job in jobs(here) if job.model == "TL"
             and job.stage == "piggyback"}  # fmt: skip
    assert kinds == {"piggyback/TL/again.json": ["full"], "piggyback/TL/other.json": ["probe", "full"]}
    elsewhere = '{kind="probe", datasets=["other"]}'
    described = [
        [job.described(recipe) for job in jobs(recipe) if job.path == "piggyback/TL/again.json"]
        for recipe in (load(recipe_file, [f"piggyback.attackers=[{listed}]", more]) for listed in ("", elsewhere))
    ]
    assert described[0] == described[1]
    with pytest.raises(RecipeError, match=r"attackers.0.datasets: unknown dataset 'agin'; did you mean 'again'"):
        load(recipe_file, ['piggyback.attackers=[{kind="probe", datasets=["agin"]}]'])


def test_the_single_setting_does_not_change_beside_tuned_attackers(recipe_file: Path):
    accuracies = []
    for name, extra in (("plain", []), ("tuned", [ATTACKERS])):
        experiment = Experiment(load(recipe_file, [f"name={name}", *extra]), recipe_file.parent, quiet=True)
        run(experiment, ("piggyback",), only=("scratch",))
        document = json.loads((experiment.folder / "piggyback/scratch/again.json").read_text())
        assert ("attackers" in document["settings"]) == bool(extra)
        accuracies.append(document["metrics"]["acc_pl"])
    assert accuracies[0] == accuracies[1]


def test_one_image_a_class_cannot_tune_and_that_is_told_before_anything_trains(recipe_file: Path):
    """1,000 digits: a hundredth is one of each of ten classes."""
    experiment = Experiment(
        load(recipe_file, [ATTACKERS, "data.piggyback.again.fraction=0.01"]), recipe_file.parent, quiet=True
    )
    which = r"data\.piggyback\.again\.fraction: 0\.01: images are held out: .*"
    reason = which + r'; make it larger, or write piggyback\.choose_on = "test"'
    with pytest.raises(DataError, match=f"^RECIPE: {reason}$"):
        run(experiment, ("pretrain", "finetune", "piggyback"))
    assert not experiment.folder.exists()


def test_no_remedy_is_named_that_does_not_help(recipe_file: Path, monkeypatch):
    """Both splits have one image a class: neither a larger fraction nor the test split helps."""
    words = [ATTACKERS, "data.piggyback.again.fraction=0.5"]
    experiment = Experiment(load(recipe_file, words), recipe_file.parent, quiet=True)
    images = experiment.data.images
    monkeypatch.setattr(experiment.data, "images", lambda *one: images(*one)._replace(labels=np.arange(1000)))
    reason = r"data\.piggyback\.again\.fraction: 0\.5: .* are needed; leave data\.piggyback\.again out, or have"
    with pytest.raises(DataError, match=f"^RECIPE: {reason} no attackers$"):
        run(experiment, ("piggyback",))


def test_a_test_split_too_small_to_choose_by_is_told_before_anything_trains(recipe_file: Path, monkeypatch):
    experiment = Experiment(
        load(recipe_file, [ATTACKERS, 'piggyback.choose_on="test"']), recipe_file.parent, quiet=True
    )
    images = experiment.data.images

    def one_of_each(role: str, split: str) -> Any:
        found = images(role, split)
        return found if split == "train" else found._replace(labels=np.arange(10), rows=np.arange(10))

    monkeypatch.setattr(experiment.data, "images", one_of_each)
    reason = r"piggyback\.choose_on: data\.piggyback\.again\.test: .* 2 or more of every class .*; "
    with pytest.raises(DataError, match=rf'^RECIPE: {reason}write piggyback\.choose_on = "own"$'):
        run(experiment, ("pretrain", "finetune", "piggyback"))
    assert not experiment.folder.exists()


def test_two_processes_share_the_trials(recipe_file: Path, forked):
    """Trials are whole on one process each, so they are the same to the last digit."""
    result = forked("piggyback", recipe_file, "--only", "scratch", "--set", ATTACKERS, "--set", "name=two", processes=2)
    assert result.returncode == 0, result.stderr
    experiment = Experiment(load(recipe_file, [ATTACKERS, "name=one"]), recipe_file.parent / "runs", quiet=True)
    run(experiment, ("piggyback",), only=("scratch",))
    one, two = (
        json.loads((recipe_file.parent / f"runs/{name}/piggyback/scratch/again.json").read_text())
        for name in ("one", "two")
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"]["trials"] == two["metrics"]["trials"]
    assert one["metrics"]["attackers"] == two["metrics"]["attackers"]
