"""What each membership attack sees of an image, against numbers by hand, scipy and a plain loop."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor, nn

from dtlctl.attacks import adversarial, features, signals, tuning, whitebox
from dtlctl.attacks.features import logistic
from dtlctl.attacks.registry import ATTACKS
from dtlctl.attacks.signals import Observation
from dtlctl.model import networks
from dtlctl.model.small_maps import unfoldable


def test_cheap_signals_by_hand():
    """p = (1/2, 1/4, 1/4) and label 0: loss log 2, entropy 1.5 log 2,
    Mentr = ½ log 2 + 2 · ¼ log(4/3) = 0.4904; for p = (0, 1, 0) nearly and label 0 Mentr is large.
    """

    def answering(logits: Tensor) -> Observation:
        return Observation(lambda x: logits, [(torch.zeros(1, 3, 2, 2), torch.tensor([0]))])

    view = answering(torch.tensor([[0.5, 0.25, 0.25]]).log())
    log2 = float(np.log(2))
    assert signals.loss(view)["loss"].item() == pytest.approx(-log2)
    assert signals.entropy(view)["entropy"].item() == pytest.approx(-1.5 * log2)
    assert signals.max_softmax(view)["max-softmax"].item() == pytest.approx(0.5)
    assert signals.modified_entropy(view)["modified-entropy"].item() == pytest.approx(-0.4904, abs=1e-4)
    assert signals.modified_entropy(answering(torch.tensor([[-20.0, 20.0, -20.0]])))["modified-entropy"].item() < -30
    assert torch.isfinite(
        signals.modified_entropy(answering(torch.tensor([[500.0, 0.0, 0.0]])))["modified-entropy"]
    ).all()


def test_the_seven_statistics_are_those_of_scipy():
    gradient = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 1e-9
    flat = gradient.flatten(1).double().numpy()
    expected = np.stack(
        [
            np.abs(flat).sum(1),
            np.sqrt((flat**2).sum(1)),
            np.abs(flat).max(1),
            flat.mean(1),
            scipy.stats.skew(flat, axis=1),
            scipy.stats.kurtosis(flat, axis=1),
            np.abs(flat).min(1),
        ],
        1,
    )
    np.testing.assert_allclose(whitebox.seven(gradient).numpy(), expected, rtol=1e-6)
    assert torch.isfinite(whitebox.seven(torch.zeros(2, 5))).all()


def test_the_norm_of_an_outer_product_by_hand():
    """Inputs (3, 4) and gradient (1, 2): |g| |a| = √5 · 5, for one place the product of two Gram matrices.

    With places a = (1, 0), (0, 1) and g = 1, 2 of one output the gradient is (1, 2): √5; of equal inputs (3, 0): 3.
    """
    linear = nn.Linear(2, 2)
    a, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 2.0]])
    assert whitebox._squares(linear, a, g, 1).item() == pytest.approx(125)
    for second, square in (((0.0, 1.0), 5), ((1.0, 0.0), 9)):
        places, outputs = torch.tensor([[[1.0, 0.0], second]]), torch.tensor([[[1.0], [2.0]]])
        assert whitebox._squares(nn.Linear(2, 1), places, outputs, 1).item() == pytest.approx(square)


def built(arch: str) -> networks.Classifier:
    """Of VGG and of ViT a few narrow layers: theirs have a hundred million weights."""
    if arch == "vgg":
        features = torchvision.models.vgg.make_layers([4, "M", 8, "M", 8, 8, "M"])
        readout = [nn.Linear(128, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 12), nn.ReLU(True), nn.Dropout()]
        return networks.Classifier(nn.Sequential(features, nn.Flatten(), *readout), 12, {"source": 5})
    if arch == "vit":
        sizes = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
        backbone = torchvision.models.VisionTransformer(**sizes)
        backbone.heads = nn.Sequential()
        return networks.Classifier(backbone, 8, {"source": 5})
    return networks.build(arch, {"source": 5}, stem="small" if arch == "resnet8" else "imagenet", image_size=32)


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "vgg", "mobilenet_v2", "vit"])
def test_norms_of_gradients_by_weights_are_those_of_a_loop_over_images(arch: str):
    """Wide maps and few places, groups, activations that overwrite a layer's output, places that are tokens."""
    torch.manual_seed(0)
    model = built(arch).eval()
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 4])
    found = whitebox.by_weights(model, x, y)
    seen = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or unfoldable(m)}
    layers = [m for n, m in seen.items() if not n.endswith("out_proj")]
    assert found.shape == (2, len(layers))
    for image in range(2):
        loss = F.cross_entropy(model(x[image : image + 1]), y[image : image + 1])
        expected = torch.stack([g.norm() for g in torch.autograd.grad(loss, [m.weight for m in layers])])
        torch.testing.assert_close(found[image], expected, rtol=1e-2, atol=1e-6)


class Own(nn.Conv2d):
    """A convolution that pads and scales its weight itself, as timm's `Conv2dSame` and `StdConv2d` do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight / self.weight.norm(), self.bias)


class Placed(nn.Module):
    """Those, one that reflects, and a layer that sees positions and no image, as in Swin transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.reflecting = Own(3, 4, 2), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
        self.positions, self.last = nn.Linear(1, 16), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.reflecting(self.own(x).relu()) + self.positions(torch.ones(1, 1)).view(4, 4)
        return self.last(maps.flatten(1))


@pytest.mark.parametrize("trained", [True, False])
def test_norms_of_gradients_of_layers_unlike_torchs(trained: bool):
    """The same as of a loop over images, whether the weights are to be trained or not; no norm for the positions."""
    torch.manual_seed(0)
    model = Placed().eval()
    x, y = torch.rand(3, 3, 4, 4), torch.tensor([0, 2, 1])
    found = whitebox.by_weights(model.requires_grad_(trained), x, y)
    weights = [layer.weight.requires_grad_() for layer in (model.own, model.reflecting, model.last)]
    losses = F.cross_entropy(model(x), y, reduction="none")
    expected = [[g.norm() for g in torch.autograd.grad(loss, weights, retain_graph=True)] for loss in losses]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_adversarial_distance_of_a_linear_model_is_the_distance_to_its_plane():
    """Logits ±w·(x - 1/2): the boundary is the plane w·(x - 1/2) = 0, at |w·(x - 1/2)| / ‖w‖₁ in L∞ and / ‖w‖₂ in L2.

    The images lie so near the middle that [0, 1] does not bind. A misclassified image has distance 0.
    """

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            score = (x.flatten(1) - 0.5) @ self.w
            return torch.stack([score, -score], 1)

    model = Linear().eval()
    x = 0.5 + 0.1 * torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.05
    score = ((x.flatten(1) - 0.5) @ model.w).detach()
    y = (score < 0).long()
    y[0] = 1 - y[0]
    linf, l2 = adversarial.minimal(model, x, y, steps=100)
    assert linf[0] == l2[0] == 0
    torch.testing.assert_close(linf[1:], (score.abs() / model.w.detach().abs().sum())[1:], rtol=0.1, atol=1e-3)
    torch.testing.assert_close(l2[1:], (score.abs() / model.w.detach().norm())[1:], rtol=0.1, atol=1e-3)
    assert model.w.requires_grad


def answering(*confidences: float) -> Observation:
    """A model that gives the true class, 0 of two, these probabilities."""
    logits = torch.tensor([[p, 1 - p] for p in confidences], dtype=torch.float64).log()
    zeros = torch.zeros(len(confidences), dtype=torch.int64)
    return Observation(lambda x: logits, [(torch.zeros(len(confidences), 3, 2, 2), zeros)])


def test_the_rmia_ratio_by_hand():
    """a = 0.3: own 0.9, out 0.5 gives 0.9 / (½ (1.3 · 0.5 + 0.7)) = 0.9 / 0.675. a = 1: 0.9 / 0.5.

    Of e^-800 nothing is left in any precision: above it the model's own is the higher, the surer it is, and never nan.
    """
    out = torch.tensor([0.4, 0.6], dtype=torch.float64).logit()[None]
    assert signals.rmia(answering(0.9), out)["rmia"].item() == pytest.approx(0.9 / 0.675)
    assert signals.rmia(answering(0.9), out, 1.0)["rmia"].item() == pytest.approx(1.8)
    for kind in (torch.float64, torch.float32):
        out = torch.full((3, 2), -800.0, dtype=kind)
        sure, none, unsure = signals.rmia(answering(0.9, 0, 0.1), out, 1.0)["rmia"].tolist()
        assert math.inf > sure > unsure > none == 0


def test_the_scaled_answer_is_the_logit_of_the_probability_however_sure():
    """Of three logits 3, 1, 1: 3 - log(2e). Of 800 and 0 it is 800, where p rounds to 1."""
    found = signals.scaled(torch.tensor([[3.0, 1, 1], [800, 0, -torch.inf]]), torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([2 - math.log(2), 800])


def test_lira_by_hand():
    """Four references say 0, 2, 0, 2 of one image (mean 1, variance 1), and 1, 1, 5, 5 of the other (3, 4).

    The model says 4 of both: with a deviation of each image's own 3 and 0.5, with one for all 3 and 1 over √2.5.
    """
    view = answering(*torch.tensor([4.0, 4.0], dtype=torch.float64).sigmoid().tolist())
    out = torch.tensor([[0.0, 2, 0, 2], [1, 1, 5, 5]], dtype=torch.float64)
    assert signals.lira(view, out, 2.5)["lira"].tolist() == pytest.approx([3 / 2.5**0.5, 1 / 2.5**0.5])
    assert signals.lira(view, out)["lira"].tolist() == pytest.approx([3, 0.5])


def test_the_a_of_rmia_is_the_one_that_finds_a_references_own_members():
    """Own 0.9 and 0.5 where strangers have 0.9 and 0.1: 1 / a + 1 falls from 0.9 / 0.95 and 0.5 / 0.55 as a grows.

    If the hard image is the member, a = 1 ranks it first (5 against 1). If the easy one is, a = 0 does, 0.95 > 0.91.
    """
    own, out = (torch.tensor(p, dtype=torch.float64).logit() for p in ([0.9, 0.5], [[0.9], [0.1]]))
    assert signals.offline_a(own, out, np.array([True, False])) == 0
    assert signals.offline_a(own, out, np.array([False, True])) > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_takes_any_module_and_tensors(name):
    """A plain network that has no heads; wb finds its last layer by itself."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network = nn.Sequential(first, nn.Flatten(), nn.Linear(144, 5)).eval()
    x, y = torch.rand(7, 3, 8, 8), torch.randint(5, (7,))
    seen = ATTACKS[name].observe(Observation(network, [(x[:4], y[:4]), (x[4:], y[4:])]), 3)
    assert all(len(values) == 7 and values.isfinite().all() for values in seen.values())
    if name == "wb":
        maps, logits = first(x), network(x)
        error = logits.softmax(1) - F.one_hot(y, 5)
        parts = [maps.mean((2, 3)), maps.flatten(1), logits, error, F.one_hot(y, 5)]
        loss = -F.cross_entropy(logits, y, reduction="none")[:, None]
        expected = torch.cat([*parts, loss, whitebox.by_weights(network, x, y)], 1)
        torch.testing.assert_close(seen["wb"], expected)


@pytest.mark.parametrize("name", ["adv-dist", "grad-w", "grad-x", "wb"])
def test_attacks_on_weights_say_that_they_need_a_module_in_eval_mode(name):
    batch = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    for model in (torch.sum, network):  # the second trains
        with pytest.raises(TypeError, match=r"needs the model as a torch\.nn\.Module in eval mode"):
            ATTACKS[name].observe(Observation(model, [batch]), 2)


def test_images_are_read_again_and_not_kept():
    """Of ten batches at most two are alive at once, whatever has been observed; a generator could not be read again."""
    alive, most = [], []

    class Fresh:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(10):
                x = torch.rand(4, 3, 8, 8)
                alive.append(weakref.ref(x))
                most.append(sum(one() is not None for one in alive))
                yield x, torch.zeros(4, dtype=torch.int64)

    view = Observation(nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Linear(3, 2)).eval(), Fresh())
    for name in ("loss", "grad-x", "wb", "adv-dist"):
        ATTACKS[name].observe(view, 2)
    assert (max(most), len(most)) == (2, 50)
    with pytest.raises(TypeError, match="not a generator"):
        Observation(view.model, iter(Fresh()))


def test_the_three_fits_are_one_and_it_is_scikit_learns():
    """Two classes, which scikit-learn keeps one row of, and three, after standardising."""
    rng = np.random.default_rng(0)
    for classes in (2, 3):
        x, y = rng.normal(3, 5, (60, 4)), np.arange(60) % classes
        scaled = (x - x.mean(0)) / x.std(0)
        oracle = LogisticRegression(C=0.7, max_iter=300).fit(scaled, y)
        np.testing.assert_allclose(logistic(x, y, 0.7).predict_proba(x), oracle.predict_proba(scaled), atol=1e-6)
    code = "".join(path.read_text() for path in Path(features.__file__).parent.glob("*.py"))
    assert code.count("LogisticRegression(") == 1 and "LBFGS" not in code


@pytest.mark.parametrize(("present", "classes"), [([2], 4), ([1, 3], 4), ([0, 1, 2], 3)])
def test_a_head_is_fitted_where_classes_have_no_image(present, classes):
    """One class, two of four, and all: what is there is told apart, and what is not is not expected."""
    torch.manual_seed(0)
    model = networks.build("resnet8", {"source": classes}, width=4, image_size=8).eval()
    labels = torch.tensor(present).repeat(8)
    seen = F.one_hot(labels, model.features).float() + 0.1 * torch.rand(len(labels), model.features)
    features.refit(model, "source", seen, labels, classes)
    p = model.heads["source"](seen).softmax(1)
    assert torch.equal(p.argmax(1), labels)
    absent = [label for label in range(classes) if label not in present]
    assert not absent or 0 < p[:, absent].max() < 1e-5


def test_a_head_is_fitted_by_one_blas_thread(monkeypatch: pytest.MonkeyPatch):
    """Two, and those of scikit-learn's loss, wait for each other: an audit took half as long again."""

    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    def watched(*arrays: np.ndarray):
        found.append(threads())
        return logistic(*arrays)

    found: list[set[int]] = []
    monkeypatch.setattr(features, "logistic", watched)
    model = networks.build("resnet8", {"source": 2}, width=4, image_size=8)
    with threadpool_limits(2, "blas"):
        features.refit(model, "source", torch.eye(2, model.features), torch.arange(2), 2)
        assert (found, threads()) == ([{1}], {2})


def test_probes_call_classes_that_they_never_saw_wrong():
    x, y = np.array([[-1.0], [-0.9], [0.9], [1.0]]), np.array([0, 0, 2, 2])
    fitted = logistic(x, y)
    assert tuning.evaluate_probe(fitted, x, y).accuracy == 100
    assert tuning.evaluate_probe(fitted, x, np.array([1, 0, 3, 2])).accuracy == 50
