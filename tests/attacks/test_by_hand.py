"""What each membership attack sees of an image, against numbers by hand, scipy and a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtlctl.attacks import adversarial, gradients, signals
from dtlctl.attacks.signals import Observation
from dtlctl.model import networks
from dtlctl.stages import reference


def test_cheap_signals_by_hand():
    """p = (1/2, 1/4, 1/4) and label 0: loss log 2, entropy 1.5 log 2,
    Mentr = ½ log 2 + 2 · ¼ log(4/3) = 0.4904; for p = (0, 1, 0) nearly and label 0 Mentr is large.
    """
    view = Observation.__new__(Observation)
    view.logits, view.labels = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([0])
    log2 = float(np.log(2))
    assert signals.loss(view)["loss"].item() == pytest.approx(-log2)
    assert signals.entropy(view)["entropy"].item() == pytest.approx(-1.5 * log2)
    assert signals.max_softmax(view)["max-softmax"].item() == pytest.approx(0.5)
    assert signals.modified_entropy(view)["modified-entropy"].item() == pytest.approx(-0.4904, abs=1e-4)
    view.logits = torch.tensor([[-20.0, 20.0, -20.0]])
    assert signals.modified_entropy(view)["modified-entropy"].item() < -30
    view.logits = torch.tensor([[500.0, 0.0, 0.0]])
    assert torch.isfinite(signals.modified_entropy(view)["modified-entropy"]).all()


def test_the_seven_statistics_are_those_of_scipy():
    """Of three pieces that are never joined; scipy joins them."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, *shape, generator=generator) * 1e-9 for shape in ((4, 5), (7,), (2, 3, 2))]
    flat = torch.cat([p.flatten(1) for p in parts], 1).double().numpy()
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
    np.testing.assert_allclose(gradients.seven(parts).numpy(), expected, rtol=1e-6)
    assert torch.isfinite(gradients.seven([torch.zeros(2, 5)])).all()


def test_per_image_gradients_are_faster_than_a_loop_over_images():
    """The quickstart's network at batch 64: five times a plain backward pass an image with its statistics, in CPU time.

    The limit here leaves room for a busy machine.
    """
    torch.manual_seed(0)
    model = networks.build("resnet8", {"source": 37}, width=16, image_size=16).eval()
    x, y = torch.rand(64, 3, 16, 16), torch.randint(37, (64,))

    def loop() -> None:
        for image, label in zip(x.split(1), y.split(1), strict=True):
            image.requires_grad_()
            loss = F.cross_entropy(model(image, "source"), label)
            *by_weight, by_pixel = torch.autograd.grad(loss, [*model.parameters(), image])
            gradients.seven([gradient[None] for gradient in by_weight])
            gradients.seven([by_pixel])

    def cost(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    ours = [cost(lambda: gradients.per_image(model, x, y)) for _ in range(4)]
    assert min(cost(loop) for _ in range(2)) / min(ours) > 3.5


def test_adversarial_distance_of_a_linear_model_is_the_distance_to_its_plane():
    """Logits ±w·(x - 1/2): the boundary is the plane w·(x - 1/2) = 0, at |w·(x - 1/2)| / ‖w‖₁ in L∞ and / ‖w‖₂ in L2.

    The images lie so near the middle that [0, 1] does not bind. A misclassified image has distance 0.
    """

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor, head: str) -> Tensor:
            score = (x.flatten(1) - 0.5) @ self.w
            return torch.stack([score, -score], 1)

    model = Linear()
    x = 0.5 + 0.1 * torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.05
    score = ((x.flatten(1) - 0.5) @ model.w).detach()
    y = (score < 0).long()
    y[0] = 1 - y[0]
    linf, l2 = adversarial.minimal(model, x, y, steps=100)  # type: ignore[arg-type]
    assert linf[0] == l2[0] == 0
    torch.testing.assert_close(linf[1:], (score.abs() / model.w.detach().abs().sum())[1:], rtol=0.1, atol=1e-3)
    torch.testing.assert_close(l2[1:], (score.abs() / model.w.detach().norm())[1:], rtol=0.1, atol=1e-3)
    assert model.w.requires_grad


def test_the_rmia_ratio_by_hand():
    """a = 0.3: own 0.9, out 0.5 gives 0.9 / (½ (1.3 · 0.5 + 0.7)) = 0.9 / 0.675."""
    assert reference.ratio(torch.tensor([0.9]), torch.tensor([0.5])).item() == pytest.approx(0.9 / 0.675)
