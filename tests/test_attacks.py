"""Known answers: a network that learnt random labels by heart must be caught by every attack, a new one by none."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from dtlctl import models
from dtlctl.attacks import adversarial, gradients, membership, probe, reference, signals, whitebox
from dtlctl.attacks.registry import ATTACKS, Attack
from dtlctl.attacks.signals import View
from dtlctl.data.tensors import Batch
from dtlctl.models import Classifier
from dtlctl.recipe import Audit

CLASSES, EACH, SIZE = 4, 60, 8
HEAD = 20
"""Images of each group, of the above, that only the head of reprobe mode is fitted on."""
SETTINGS = Audit(adv_steps=20)


@pytest.fixture(scope="module")
def images() -> tuple[Batch, Batch]:
    """Members and others: noise with labels that nothing but memory can tell."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2 * EACH, 3, SIZE, SIZE, generator=generator)
    y = torch.randint(CLASSES, (2 * EACH,), generator=generator)
    rows = torch.arange(EACH)
    return Batch(x[:EACH], y[:EACH], rows), Batch(x[EACH:], y[EACH:], rows)


def network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return models.build("resnet8", {"source": CLASSES, "target": 3}, width=8, image_size=SIZE)


def learn(model: Classifier, batch: Batch, steps: int = 60) -> Classifier:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x, "source"), batch.y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def overfitted(images) -> Classifier:
    model = learn(network(), images[0])
    assert model(images[0].x, "source").argmax(1).eq(images[0].y).all()
    assert model(images[1].x, "source").argmax(1).eq(images[1].y).float().mean() < 0.5
    return model


@pytest.fixture(scope="module")
def untrained() -> Classifier:
    return network().eval().requires_grad_(False)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.x[rows], batch.y[rows], batch.rows[rows])


def results(attack: Attack, name: str, model: Classifier, groups, sign: int = 1) -> dict[str, dict]:
    """The attack's numbers; `sign` = -1 turns an attack that trains nothing upside down."""
    seen = [attack.observe(View(model, [batch]), SETTINGS) for batch in groups]
    members, others = ({k: sign * v.double().numpy() for k, v in s.items()} for s in seen)
    repeats = 2 if attack.slow else 10
    if attack.attacker is not membership.single:
        return {name: membership.trial(members, others, attack.attacker, repeats, 0)}
    return {
        k: membership.trial({k: members[k]}, {k: others[k]}, attack.attacker, repeats, 0) for k in members
    }


def rmia(images) -> Attack:
    """Eight references on noise of their own: every image here is unknown to all of them."""
    generator = torch.Generator().manual_seed(1)
    out = [torch.zeros(EACH), torch.zeros(EACH)]
    for number in range(8):
        x = torch.rand(EACH, 3, SIZE, SIZE, generator=generator)
        y = torch.randint(CLASSES, (EACH,), generator=generator)
        model = learn(network(number + 1), Batch(x, y, torch.arange(EACH)), 15)
        for place, batch in enumerate(images):
            out[place] += model(batch.x, "source").softmax(1).gather(1, batch.y[:, None])[:, 0] / 8

    def observe(view: View, _: Audit) -> dict[str, Tensor]:
        whose = next(i for i, batch in enumerate(images) if batch.x is view.batches[0].x)
        return reference.rmia(view, out[whose])

    return Attack(observe, membership.single)


def chosen(name: str, images) -> Attack:
    return rmia(images) if name == "rmia" else ATTACKS[name]


@pytest.mark.parametrize("name", [*ATTACKS, "rmia"])
def test_a_network_that_knows_its_images_by_heart_is_caught(name, images, overfitted):
    for result, numbers in results(chosen(name, images), name, overfitted, images).items():
        assert numbers["auc"] > 0.9, (result, numbers)
        assert numbers["balanced_accuracy"] > 0.8, (result, numbers)
        assert numbers["auc_low"] > 0.5, (result, numbers)


@pytest.mark.parametrize("name", [*ATTACKS, "rmia"])
def test_a_network_that_never_saw_an_image_gives_none_away(name, images, untrained):
    for result, numbers in results(chosen(name, images), name, untrained, images).items():
        assert numbers["auc_low"] <= 0.5 <= numbers["auc_high"], (result, numbers)
