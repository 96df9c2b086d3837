"""Known answers: a network that learnt random labels by heart must be caught by every attack, a new one by none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from dtlctl.attacks import features, membership, signals, whitebox
from dtlctl.attacks.registry import ATTACKS, REFERENCED, Attack
from dtlctl.attacks.signals import Observation
from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.model.networks import Classifier
from dtlctl.recipe.settings import Audit

CLASSES, EACH, SIZE = 4, 60, 8
HEAD = 20
"""Images of each group, of the above, that only the head of reprobe mode is fitted on."""
STEPS = 20  # of the search for adversarial examples


def drawn(seed: int) -> tuple[Batch, Batch]:
    """Members and others: noise with labels that nothing but memory can tell."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2 * EACH, 3, SIZE, SIZE, generator=generator)
    y = torch.randint(CLASSES, (2 * EACH,), generator=generator)
    rows = torch.arange(EACH)
    return Batch(x[:EACH], y[:EACH], rows), Batch(x[EACH:], y[EACH:], rows)


@pytest.fixture(scope="module")
def images() -> tuple[Batch, Batch]:
    return drawn(0)


def network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return networks.build("resnet8", {"source": CLASSES, "target": 3}, width=8, image_size=SIZE)


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
    seen = [attack.observe(Observation(model.through("source"), [(batch.x, batch.y)]), STEPS) for batch in groups]
    members, others = ({k: sign * v.double().numpy() for k, v in s.items()} for s in seen)
    repeats = 2 if attack.slow else 10
    if attack.attacker is not membership.single:
        return {name: membership.trial(members, others, attack.attacker, repeats, 0)}
    return {k: membership.trial({k: members[k]}, {k: others[k]}, attack.attacker, repeats, 0) for k in members}


@lru_cache
def references() -> list[Classifier]:
    """Eight of them, on noise of their own."""
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(8):
        x = torch.rand(EACH, 3, SIZE, SIZE, generator=generator)
        y = torch.randint(CLASSES, (EACH,), generator=generator)
        found.append(learn(network(number + 1), Batch(x, y, torch.arange(EACH)), 15))
    return found


def referenced(images, score: Callable[[Observation, Tensor], dict[str, Tensor]]) -> Attack:
    """Every image here is unknown to all references."""
    out = [torch.stack([signals.scaled(m(b.x, "source"), b.y) for m in references()], 1) for b in images]

    def observe(view: Observation, _: Audit) -> dict[str, Tensor]:
        whose = next(i for i, batch in enumerate(images) if batch.x is next(iter(view.batches))[0])
        return score(view, out[whose])

    return Attack(observe, membership.single)


def chosen(name: str, images) -> Attack:
    scores = {"rmia": signals.rmia, "lira": partial(signals.lira, variance=1.0)}
    return ATTACKS.get(name) or referenced(images, scores[name])


@pytest.mark.parametrize("name", [*ATTACKS, *REFERENCED])
def test_a_network_that_knows_its_images_by_heart_is_caught(name, images, overfitted):
    for result, numbers in results(chosen(name, images), name, overfitted, images).items():
        assert numbers["auc"] > 0.9, (result, numbers)
        assert numbers["balanced_accuracy"] > 0.8, (result, numbers)
        assert numbers["auc_low"] > 0.5, (result, numbers)


@pytest.mark.parametrize("name", [*ATTACKS, *REFERENCED])
def test_a_network_that_never_saw_an_image_gives_none_away(name):
    """Intervals of 95 % cover 0.5 in at least eight of ten draws: seven are fewer than 1.2 % would give by chance."""
    covered: Counter[str] = Counter()
    for seed in range(10):
        groups, model = drawn(seed), network(100 + seed).eval().requires_grad_(False)
        for result, numbers in results(chosen(name, groups), name, model, groups).items():
            covered[result] += numbers["auc_low"] <= 0.5 <= numbers["auc_high"]
    assert min(covered.values()) >= 8, covered


@pytest.mark.parametrize(
    "name", [*(n for n, attack in ATTACKS.items() if attack.attacker is membership.single), *REFERENCED]
)
def test_a_score_with_its_sign_flipped_catches_nobody(name, images, overfitted):
    """The mirror image of being caught: the AUC is one minus what it was, and no threshold helps."""
    straight = results(chosen(name, images), name, overfitted, images)
    for result, numbers in results(chosen(name, images), name, overfitted, images, sign=-1).items():
        assert numbers["auc"] == pytest.approx(1 - straight[result]["auc"])
        assert numbers["auc"] < 0.1


# The head fitted anew -----------------------------------------------------------------------------------------------


def reprobed(model: Classifier, images, ruin: bool) -> Classifier:
    """A copy whose source head is, if asked, ruined, and then fitted on the first HEAD images of both groups."""
    copy = network()
    copy.load_state_dict(model.state_dict())
    copy.eval()
    if ruin:
        nn.init.zeros_(copy.heads["source"].weight)
        nn.init.zeros_(copy.heads["source"].bias)
    embeddings = torch.cat([copy.embed(batch.x[:HEAD]) for batch in images])
    labels = torch.cat([batch.y[:HEAD] for batch in images])
    features.refit(copy, "source", embeddings, labels, CLASSES)
    return copy


def test_reprobe_catches_what_a_ruined_head_hides(images, overfitted):
    """With a head of zeros every loss is log 4, so the AUC is 0.5; the features still group members by their label."""
    ruined = network()
    ruined.load_state_dict(overfitted.state_dict())
    ruined.eval().requires_grad_(False)
    for parameter in ruined.heads["source"].parameters():
        parameter.zero_()
    rest = [part(batch, slice(HEAD, None)) for batch in images]
    assert results(ATTACKS["loss"], "loss", ruined, rest)["loss"]["auc"] == 0.5
    again = reprobed(overfitted, images, ruin=True)
    assert results(ATTACKS["loss"], "loss", again, rest)["loss"]["auc"] > 0.9


def test_reprobe_finds_nothing_in_features_that_never_saw_the_images(images, untrained):
    rest = [part(batch, slice(HEAD, None)) for batch in images]
    numbers = results(ATTACKS["loss"], "loss", reprobed(untrained, images, ruin=False), rest)["loss"]
    assert numbers["auc_low"] <= 0.5 <= numbers["auc_high"]


def test_the_new_head_is_scikit_learns_logistic_regression(images, overfitted):
    """Same objective, standardised features, C = 1: the same probabilities."""
    x, y = images[1].x, images[1].y
    with torch.no_grad():
        seen = overfitted.embed(x)
    standard = ((seen - seen.mean(0)) / seen.std(0).clamp(min=1e-6)).numpy()
    oracle = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(standard, y.numpy())
    model = network()
    features.refit(model, "source", seen, y, CLASSES)
    ours = model.heads["source"](seen).softmax(1).numpy()
    np.testing.assert_allclose(ours, oracle.predict_proba(standard), atol=5e-3)


# The single attacks -------------------------------------------------------------------------------------------------


def test_per_image_gradients_by_pixels_are_those_of_a_loop(images, overfitted):
    batch = part(images[1], slice(0, 7))
    found = whitebox.by_pixels(overfitted.through("source"), batch.x, batch.y)
    for place in range(7):
        x = batch.x[place : place + 1].clone().requires_grad_()
        loss = F.cross_entropy(overfitted(x, "source"), batch.y[place : place + 1])
        torch.testing.assert_close(found[place], torch.autograd.grad(loss, x)[0][0], rtol=2e-3, atol=1e-6)


def test_per_image_gradients_are_not_rounded_to_bfloat16(images, overfitted):
    """Whatever precision the model trains in, they are those in float32; its answers stay as they were."""
    batch = part(images[0], slice(0, 5))
    model = network()
    model.load_state_dict(overfitted.state_dict())
    model.eval().precision = "bfloat16"
    before = model(batch.x, "source")
    for statistics in (whitebox.by_weights, whitebox.by_pixels):
        ours, exact = (statistics(m.through("source"), batch.x, batch.y) for m in (model, overfitted))
        assert torch.equal(ours, exact)
    assert torch.equal(model(batch.x, "source"), before) and not torch.equal(before, overfitted(batch.x, "source"))


@pytest.mark.parametrize(
    ("arch", "path", "expected"),
    [
        ("resnet18", "layer", [1, 2, 3, 4]),
        ("resnet8", "stages.", [0, 1, 2]),
        ("resnet20", "stages.", [0, 2, 4, 6, 8]),
        ("vit_b_32", "encoder.layers.encoder_layer_", [0, 2, 4, 6, 8, 11]),
        ("vgg11", "", ["features.3", "features.6", "features.11", "features.13", "features.18", "classifier.3"]),
        ("regnet_y_400mf", "trunk_output.block", [1, 2, 3, 4]),
    ],
)
def test_the_white_box_attacker_looks_at_stages(arch, path, expected):
    """At most six, evenly: of ResNet-20's stem and nine blocks places 0, 1, 3, 5, 7, 9; of twelve layers 0, 2, 4, 6,
    8, 11; of VGG's nine stages (features 3, 6, 8, 11, 13, 16, 18, classifier 0, 3) the places 0, 1, 3, 4, 6, 8.
    """
    stem = "small" if arch in networks.DEPTHS else "imagenet"
    backbone = networks.outline(arch, stem, None, 64).backbone
    first = ["stem"] if isinstance(backbone, networks.CifarResNet) else []
    names = {module: name for name, module in backbone.named_modules()}
    assert [names[stage] for stage in whitebox._stages(backbone)] == [*first, *(f"{path}{n}" for n in expected)]


def test_stages_that_keep_channels_last_are_averaged_over_places_too():
    """Swin's are [B, H, W, C]: six stages stand before the embedding, two logits and so on."""
    model = networks.build("swin_t", {"source": 2}, stem="imagenet", image_size=64).eval()
    stages, found = whitebox._stages(model.backbone), {}
    for stage in stages:
        stage.register_forward_hook(lambda stage, _, out: found.__setitem__(stage, out.mean((1, 2))))
    seen = whitebox.observe(Observation(model, [(torch.rand(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))]))
    means = torch.cat([found[stage] for stage in stages], 1)
    assert torch.equal(seen["wb"][:, : means.shape[1]], means) and means.shape[1] > 6 * 96


def test_the_white_box_attacker_holds_out_a_fifth_of_either_group():
    """Of the eight and eight that he knows of the least that can be audited, two and two, whatever the seed. With
    images of one group alone there is no threshold between the two.
    """
    known = membership.Known({"wb": np.random.default_rng(0).normal(size=(16, 9))}, np.repeat([True, False], 8))
    for seed in range(8):
        guess = whitebox.infer(known, known.seen, seed)
        assert (guess.member.sum(), (~guess.member).sum()) == (2, 2), seed
