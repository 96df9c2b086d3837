import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from math import log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtlctl.data.tensors import Batch, Batches
from dtlctl.errors import RecipeError
from dtlctl.model import networks
from dtlctl.model.networks import Classifier
from dtlctl.objectives import step as forward
from dtlctl.objectives.disposal import Disposal, train_mode
from dtlctl.objectives.retain import AveragedGem, Distill, TargetCrossEntropy
from dtlctl.objectives.step import ChunkOutputs, Step
from dtlctl.objectives.unlearn import (
    GradientCollision,
    NegativeCrossEntropy,
    Nothing,
    NullSpace,
    RandomLabels,
    SimulatedAttacker,
    Uniform,
    random_labels,
)

# Softmax of EVEN is (1/2, 1/2), of LEAN (1/4, 3/4), of STEEP (1/8, 2/8, 5/8).
EVEN, LEAN, STEEP = [0.0, 0.0], [0.0, log(3)], [0.0, log(2), log(5)]
FAR = [9.0, -9.0]  # what the head that must not matter says


def view(*, source=(FAR,), target=(FAR,), teacher=(FAR,), y=(0,), rows=(0,)):
    """Images whose pixels are the teacher's answer."""
    x, source, target = (torch.tensor(logits, dtype=torch.float64) for logits in (teacher, source, target))
    return ChunkOutputs(x, torch.tensor(y), torch.tensor(rows), source, target)


def step(chunks=(), target=(), parameters=(), processes=1, all_reduce=list):
    return Step(chunks, target, lambda x: x, parameters, images=50, seed=7, processes=processes, all_reduce=all_reduce)


def unlearned(objective, *chunks):
    """The loss, which must be what is reported and what is back-propagated."""
    scalar, value = objective.loss(step(chunks))
    assert scalar.item() == value.item() and not value.requires_grad
    return value.item()


def test_random_labels_loss_by_hand():
    """-log P of the labels drawn for rows 6 and 1, and 6 and 40, whatever the true labels are."""
    labels = random_labels(50, 3, seed=7).tolist()
    cost = [log(8), log(8 / 2), log(8 / 5)]
    seen = view(source=[STEEP] * 4, y=[0, 1, 0, 1], rows=[6, 1, 6, 40])
    expected = (2 * cost[labels[6]] + cost[labels[1]] + cost[labels[40]]) / 4
    assert unlearned(RandomLabels(), seen) == pytest.approx(expected)
    one_by_one = [unlearned(RandomLabels(), view(source=[STEEP], rows=[row])) for row in range(50)]
    assert one_by_one == pytest.approx([cost[label] for label in labels])


def test_random_labels_are_uniform_and_fixed_by_the_seed():
    """10,000 draws of 10 classes: 1,000 each with deviation sqrt(10000 · 0.1 · 0.9) = 30; five of them are allowed."""
    labels = random_labels(10_000, 10, 1)
    random_labels.cache_clear()
    assert torch.equal(labels, random_labels(10_000, 10, 1))
    assert (labels != random_labels(10_000, 10, 2)).float().mean() > 0.8
    assert (labels.bincount(minlength=10) - 1000).abs().max() <= 150
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("logits", "loss"), [(EVEN, 0), (LEAN, log(4 / 3) / 2), (STEEP, log(512 / 270) / 3), ([5.0, 5.0, 5.0], 0)]
)
def test_uniform_by_hand(logits, loss):
    """D_KL(U || P): (log 2 + log 2/3) / 2 of P = (1/4, 3/4), (log 8/3 + log 4/3 + log 8/15) / 3 of (1/8, 2/8, 5/8)."""
    assert unlearned(Uniform(), view(source=[logits])) == pytest.approx(loss, abs=1e-15)


def test_uniform_is_the_mean_over_images():
    assert unlearned(Uniform(), view(source=[LEAN, EVEN])) == pytest.approx(log(4 / 3) / 4)


def test_negative_cross_entropy_by_hand():
    """log P of the true labels: 3/4, 1/2, 1/4 and 1/2."""
    seen = view(source=[LEAN, EVEN, LEAN, EVEN], y=[1, 0, 0, 1])
    assert unlearned(NegativeCrossEntropy(), seen) == pytest.approx(log(3 / 64) / 4)


# Eight images whose target logits are (a, -a), and patterns of mean 0 that a does not explain, nor each other.
A = torch.tensor([1, 1, 1, 1, -1, -1, -1, -1], dtype=torch.float64)
B = torch.tensor([1, 1, -1, -1, 1, 1, -1, -1], dtype=torch.float64)


def narrowed(*maps, target=None, **options):
    answers = torch.stack([A, -A], 1) if target is None else target
    images = torch.arange(len(answers))
    return NullSpace(**options).loss(step([ChunkOutputs(images, images, images, answers, answers, maps)]))


def test_null_space_by_hand():
    """A map with a column 3a and a column 4b: the answers explain 9 of 25 parts. One with a alone: nothing is left."""
    both = torch.stack([3 * A, 4 * B], 1)
    assert narrowed(both, stages=1)[1].item() == pytest.approx(16 / 25, abs=1e-9)
    assert narrowed(A[:, None] * 5, stages=1)[1].item() == pytest.approx(0, abs=1e-9)
    assert narrowed(A[:, None], both)[1].item() == pytest.approx(8 / 25, abs=1e-9)  # the mean of all, here of two
    assert narrowed(A[:, None], A[:, None], both)[1].item() == pytest.approx(16 / 75, abs=1e-9)
    assert narrowed(B[:, None], both, stages=1)[1].item() == pytest.approx(16 / 25, abs=1e-9)  # the last one


def test_null_space_sees_neither_scale_nor_place_nor_the_mean_of_the_logits():
    both, common = torch.stack([3 * A, 4 * B], 1), torch.rand(8, 1, dtype=torch.float64)
    moved = narrowed((both * 7 - 5).view(8, 1, 2, 1), target=torch.stack([A, -A], 1) * 2 + 9 + common, stages=1)[1]
    assert moved.item() == pytest.approx(16 / 25, abs=1e-9)


def in_processes(count, work):
    """work(all_reduce, number) of every process, in threads that add up what they hand in."""
    inbox, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def one(number):
        def all_reduce(tensors):
            inbox[number] = tensors
            barrier.wait()
            sums = [sum(parts) for parts in zip(*inbox, strict=True)]
            barrier.wait()
            return sums

        return work(all_reduce, number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("processes", [1, 3])
def test_null_space_gradient_is_that_of_least_squares_differentiated_through(processes):
    """The oracle lets torch differentiate the fit itself, of the whole batch, intercept and all."""
    generator = torch.Generator().manual_seed(0)
    maps, logits = (torch.randn(24, *size, generator=generator) for size in ((5, 2, 2), (4,)))

    def share(all_reduce, number):
        part = slice(number * 24 // processes, (number + 1) * 24 // processes)
        mine, answers = maps[part].clone().requires_grad_(), logits[part]
        chunks = [ChunkOutputs(answers, answers, answers, answers, answers, [mine])]
        scalar, value = NullSpace(stages=1).loss(step(chunks, processes=processes, all_reduce=all_reduce))
        return torch.autograd.grad(scalar, mine)[0] / processes, value

    gradients, values = zip(*in_processes(processes, share), strict=True)
    rows = maps.double().flatten(1).requires_grad_()
    known = torch.cat([torch.ones(24, 1), logits[:, 1:] - logits[:, :1]], 1).double()
    left = rows - known @ torch.linalg.solve(known.T @ known, known.T @ rows)
    expected = left.square().sum() / (rows - rows.mean(0)).square().sum()
    (gradient,) = torch.autograd.grad(expected, rows)
    assert all(value.item() == pytest.approx(expected.item(), rel=1e-5) for value in values)
    assert torch.allclose(torch.cat(gradients).flatten(1).double(), gradient, rtol=1e-3, atol=1e-7)


def test_null_space_of_many_classes_has_a_component_for_three_images():
    """Eight images have two, of answers that vary along three axes: the oracle projects on left singular vectors."""
    generator = torch.Generator().manual_seed(0)
    axes, turn = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (8, 5))
    axes = torch.linalg.qr(torch.cat([torch.ones(8, 1), axes[:, :4]], 1).double())[0][:, 1:]  # without mean
    turn = torch.linalg.qr(torch.cat([torch.ones(5, 1), turn[:, :3]], 1).double())[0][:, 1:]  # nor that of the logits
    target = axes[:, :3] * torch.tensor([5.0, 3.0, 1.0]) @ turn.T
    rows = axes[:, :3] * torch.tensor([1.0, 2.0, 4.0])
    assert narrowed(rows, target=target, stages=1)[1].item() == pytest.approx(16 / 21, abs=1e-9)  # the third is not
    assert narrowed(rows[:, :2], target=target, stages=1)[1].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("answer", [torch.nan, torch.inf])
def test_null_space_of_answers_that_are_not_finite_is_not_finite(answer):
    """Then the training stops as diverged; torch's error about eigenvalues would name no remedy."""
    assert not narrowed(torch.rand(24, 5), target=torch.full((24, 8), answer), stages=1)[1].isfinite()


def test_null_space_says_what_it_lacks():
    with pytest.raises(RecipeError, match="stages = 2, but only 1 of this model are known"):
        narrowed(A[:, None], stages=2)


@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "vgg11", "vit_b_32"])
def test_chunks_hold_the_output_of_every_stage_where_asked(arch):
    with torch.device("cpu" if "resnet" in arch else "meta"):  # shapes alone of those with many weights
        model = networks.build(
            arch, {"source": 2, "target": 3}, stem="small" if "resnet" in arch else "imagenet"
        ).eval()
        batch = Batch(torch.rand(2, 3, 32, 32), torch.zeros(2).long(), torch.arange(2))
    (seen,) = forward.apart(model, batch, 1, maps=True)
    assert forward.apart(model, batch, 1)[0].maps == []
    assert len(seen.maps) == {"resnet20": 3, "resnet18": 4, "vgg11": 9, "vit_b_32": 12}[arch]
    if "resnet" in arch:
        assert torch.allclose(model.heads["target"](seen.maps[-1].mean((2, 3))), seen.target, atol=1e-5)


def test_nothing_is_zero_and_has_no_gradient():
    weights = torch.tensor([[1.0, 2.0]], requires_grad=True)
    scalar, value = Nothing().loss(step([ChunkOutputs(weights, weights, weights, weights * 3, weights)]))
    scalar.backward()
    assert value.item() == 0 and weights.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("theta", "self_pairs", "value", "gradient"),
    [(0, False, -1 / 4, 0), (log(3), False, -3 / 16, 3 / 32), (log(3), True, 1 / 8, 3 / 16)],
)
def test_gradient_collision_is_of_the_source_head(theta, self_pairs, value, gradient):
    """Logits (0, θ) at θ = 0 have P = 1/2: a chunk labelled 1 has the gradient -1/2, one labelled 0 has +1/2, and both
    the Hessian P(1 - P) = 1/4. So L_gc = -1/4 and its gradient is 1/4 · 1/2 - 1/4 · 1/2 = 0. At θ = log 3, P = 3/4:
    g = -1/4 and 3/4, L_gc = -3/16, H = 3/16, gradient 3/16 · (3/4 - 1/4) = 3/32.
    With self-pairs: G = 1/2, |G|²/2 = 1/8, and 2HG = 3/16.
    """
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    logits = torch.stack([theta * 0, theta])[None]
    chunks = [ChunkOutputs(logits, torch.tensor([y]), torch.tensor([0]), logits, logits * 5) for y in (1, 0)]
    scalar, reported = GradientCollision(self_pairs=self_pairs).loss(step(chunks, parameters=[theta]))
    scalar.backward()
    assert reported.item() == pytest.approx(value)
    assert theta.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("where", ["source", "target"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_by_hand(where, temperature):
    """D_KL(teacher || student) through the target head: of (1/4, 3/4) to (1/2, 1/2) it is (log 1/2 + 3 log 3/2) / 4.

    A second image on which both agree halves it. Logits twice as large at T = 2 are the same distributions, and T² = 4.
    """
    t = temperature
    lean, even = [v * t for v in LEAN], EVEN
    here = [view(teacher=[lean, lean], target=[even, lean])]
    elsewhere = [view(teacher=[even], target=[FAR])]
    chunks, target = (here, elsewhere) if where == "source" else (elsewhere, here)
    loss = Distill(on=where, temperature=t).loss(step(chunks, target))
    assert loss.item() == pytest.approx((log(1 / 2) + 3 * log(3 / 2)) / 4 / 2 * t**2)
    assert Distill(on=where).needs_target == (where == "target")


def test_distillation_is_the_mean_over_chunks():
    chunks = [view(teacher=[LEAN], target=[student]) for student in (EVEN, LEAN)]
    assert Distill().loss(step(chunks)).item() == pytest.approx((log(1 / 2) + 3 * log(3 / 2)) / 8)


def test_distillation_on_both_is_the_mean_of_source_and_target():
    """The student disagrees on one of two source images, and on no target image: a quarter of the divergence."""
    chunks = [view(teacher=[LEAN, LEAN], target=[EVEN, LEAN])]
    target = [view(teacher=[LEAN, EVEN], target=[LEAN, EVEN])]
    for first, second in ((chunks, target), (target, chunks)):
        loss = Distill(on="both").loss(step(first, second))
        assert loss.item() == pytest.approx((log(1 / 2) + 3 * log(3 / 2)) / 4 / 4)
    assert Distill(on="both").needs_target


@pytest.mark.parametrize("retain", [TargetCrossEntropy(), AveragedGem()])
def test_target_cross_entropy_by_hand(retain):
    """-log of 3/4 and 1/2 in one chunk, of 1/4 and 1/2 in the other, on the target's images only."""
    target = view(target=[LEAN, EVEN], y=[1, 0]), view(target=[LEAN, EVEN], y=[0, 1])
    assert retain.needs_target
    assert retain.loss(step([view()], target)).item() == pytest.approx(log(64 / 3) / 4)


@pytest.mark.parametrize(
    ("unlearn", "guarded"), [((3, 1), (3, 1)), ((-3, 1), (-2.8, 1.4)), ((2, -1), (2, -1)), ((-1, -2), (0, 0))]
)
def test_a_gem_projects_a_conflicting_gradient(unlearn, guarded):
    """g_ref = (1, 2), |g_ref|² = 5. (-3, 1)·(1, 2) = -1, so 1/5 of g_ref is added; (-1, -2) is all conflict."""
    theta = torch.ones(2, dtype=torch.float64, requires_grad=True)
    retain = theta[0] ** 2 / 2 + theta[1] ** 2
    drive = unlearn[0] * theta[0] + unlearn[1] * theta[1] ** 2 / 2
    (gradient,) = torch.autograd.grad(AveragedGem().guard(drive, retain, step(parameters=[theta])), theta)
    assert gradient.tolist() == pytest.approx(guarded)
    if guarded != unlearn:
        assert gradient @ torch.tensor([1.0, 2.0], dtype=torch.float64) == pytest.approx(0)


def test_a_gem_compares_the_gradients_of_all_processes():
    """Here (-3, 1) against (1, 0) conflicts. With the other process's (1, 1) against (1, 0), the means (-1, 1) and
    (1, 0) do too, and this process adds one of its own g_ref: -2 and not the 0 of a process by itself. With the
    other's (5, 1), the mean (1, 1) does not conflict, and nothing is added.
    """
    for other, first in (1.0, -2), (5.0, -3):
        theta = torch.ones(2, requires_grad=True)
        elsewhere = [torch.tensor([other, 1.0]), torch.tensor([1.0, 0.0])]
        two = step(parameters=[theta], processes=2, all_reduce=lambda own, more=elsewhere: [own[0] + more.pop(0)])
        guarded = AveragedGem().guard(-3 * theta[0] + theta[1], theta[0], two)
        assert torch.autograd.grad(guarded, theta)[0].tolist() == [first, 1]


@pytest.mark.parametrize("retain", [Distill(), TargetCrossEntropy()])
def test_only_a_gem_bends_the_unlearning_loss(retain):
    drive = torch.tensor(2.0)
    assert retain.guard(drive, torch.tensor(1.0), step()) is drive


def student():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten())
    return Classifier(backbone, 4, {"source": 3, "target": 2})


def batches(classes, seed):
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (8, 3, 2, 2), np.uint8), rng.integers(0, classes, 8)
    more = {"batch_size": 8, "augment": "none", "seed": seed, "device": torch.device("cpu")}
    return Batches(pixels, labels, np.arange(8), **more)


def test_a_disposal_mixes_as_equation_1_and_then_repairs():
    """λ = 1/4: 3/4 retain + 1/4 unlearn while unlearning is on; then retaining alone."""
    model, source, target = student().train(), batches(3, seed=1), batches(2, seed=2)
    more = {"chunks": 1, "batch_norm": "train", "images": 8, "label_seed": 0}
    disposal = Disposal(0.25, NegativeCrossEntropy(), TargetCrossEntropy(), model, student().eval(), **more)
    for number in range(4):
        ours, theirs = source[number], target[number]
        unlearn = -F.cross_entropy(model(ours.x, "source"), ours.y)
        retain = F.cross_entropy(model(theirs.x, "target"), theirs.y)
        mixed, parts = disposal(ours, theirs, number < 2)
        square = sum(float(p.detach().square().sum()) for p in model.parameters())
        assert float(parts.pop("weight_norm")) == pytest.approx(square**0.5)
        if number < 2:
            torch.testing.assert_close(mixed, 0.75 * retain + 0.25 * unlearn)
            told = {"retain": retain.detach(), "source_loss": -unlearn.detach(), "unlearn": unlearn.detach()}
            torch.testing.assert_close(parts, told)
        else:
            torch.testing.assert_close(mixed, retain)
            torch.testing.assert_close(parts, {"retain": retain.detach(), "source_loss": -unlearn.detach()})


def test_norms_are_those_of_the_two_gradients_and_leave_everything_as_it_is():
    """Against a backward pass of each term alone, λ = 0 and λ = 1; weights, statistics and random numbers stay."""
    more = {"chunks": 2, "batch_norm": "train", "images": 8, "label_seed": 0}
    teacher = student().eval()
    nn.init.ones_(teacher.heads["target"].weight[:1])
    disposal = Disposal(0.5, GradientCollision(chunks=2), Distill(), student().train(), teacher, **more)
    source = batches(3, seed=1)[0]
    before = {name: value.clone() for name, value in disposal.student.state_dict().items()}
    drawn = torch.random.get_rng_state()
    norms = disposal.norms(source, None)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in disposal.student.state_dict().items())
    for lam, norm in zip((0.0, 1.0), norms, strict=True):
        disposal.lam = lam
        disposal.student.zero_grad()
        disposal(source, None, True)[0].backward()
        grads = [p.grad for p in disposal.student.parameters() if p.grad is not None]
        assert norm > 0
        assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(norm, rel=1e-4)


def test_chunks_are_the_batch_in_order_each_with_its_own_batch_statistics():
    model = student().train()
    x, y, rows = torch.rand(6, 3, 2, 2), torch.arange(6) % 3, torch.arange(6)
    for number, chunk in enumerate(forward.apart(model, Batch(x, y, rows), 3)):
        here = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close((chunk.x, chunk.y, chunk.rows), (x[here], y[here], rows[here]))
        torch.testing.assert_close(chunk.source, model(x[here], "source"))
        torch.testing.assert_close(chunk.target, model(x[here], "target"))


def test_chunks_of_a_net_with_attention_collide():
    """torch's fused attention has no second derivative; the stage's forward must not use it."""
    layer = nn.TransformerEncoderLayer(4, nhead=2, dim_feedforward=4, dropout=0.0, batch_first=True)
    model = Classifier(nn.Sequential(nn.Flatten(2), layer, nn.Flatten()), 12, {"source": 3, "target": 2})
    batch = Batch(torch.rand(4, 3, 2, 2), torch.arange(4) % 3, torch.arange(4))
    chunks, parameters = forward.apart(model, batch, 2), list(model.parameters())
    scalar, _ = GradientCollision().loss(step(chunks, parameters=parameters))
    scalar.backward()
    assert layer.self_attn.in_proj_weight.grad.norm() > 0


@pytest.mark.parametrize("of", [nn.BatchNorm1d, nn.BatchNorm2d])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_chunks_in_sequence_move_running_statistics_as_their_average(chunks, of):
    """(1 - m) r0 + m · mean over chunks of the chunk's mean, and the same of its variance."""
    torch.manual_seed(0)
    norm = of(3, momentum=0.3).double()
    nn.init.constant_(norm.running_mean, 5)
    x = torch.randn(3 * chunks, 3, 2, 2, dtype=torch.float64)
    first = nn.Flatten(2) if of is nn.BatchNorm1d else nn.Identity()
    model = Classifier(nn.Sequential(first, norm, nn.Flatten()), 12, {"source": 3, "target": 2}).double()
    forward.apart(model, Batch(x, *2 * [torch.zeros(3 * chunks)]), chunks)
    seen = ((x - model.mean) / model.std).view(chunks, 3, 3, 2, 2)
    torch.testing.assert_close(norm.running_mean, 0.7 * 5 + 0.3 * seen.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(norm.running_var, 0.7 * 1 + 0.3 * seen.var((1, 3, 4)).mean(0))
    train_mode(model, "frozen")
    assert model.training and not norm.training


class Line(nn.Module):
    """Logits (h, k) · (w · x) of a number x: a network of one feature, with a head for each task."""

    def __init__(self, w: float):
        super().__init__()
        self.backbone = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.heads = nn.ModuleDict({name: nn.Linear(1, 2, dtype=torch.float64) for name in ("source", "target")})
        nn.init.constant_(self.backbone.weight, w)

    def forward(self, x, head):
        return self.heads[head](self.backbone(x))


def attacked(images, labels, w, lr, parts):
    """(loss, d loss / d w') by formulas: d CE / d z = p - onehot, d loss / d z = p_y (onehot - p) / (1 - p_y).

    The head begins as the class draws it; in each part but the last w and the head go against the gradient.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(b"7/0"))
    h, b = (
        torch.empty(shape).uniform_(-1, 1, generator=generator).double().numpy().ravel() for shape in ((2, 1), (2,))
    )
    for x, y in zip(np.array_split(images, parts), np.array_split(labels, parts), strict=True):
        z = np.outer(w * x, h) + b
        p, onehot = np.exp(z) / np.exp(z).sum(1, keepdims=True), np.eye(2)[y]
        own = p[range(len(y)), y]
        last = -np.log(1 - own).mean(), (own[:, None] * (onehot - p) / (1 - own)[:, None] @ h * x).mean()
        dz = (p - onehot) / len(y)
        w, h, b = w - lr * (dz @ h * x).sum(), h - lr * dz.T @ (w * x), b - lr * dz.sum(0)
    return last


@pytest.mark.parametrize(("processes", "steps"), [(1, 1), (1, 2), (2, 1)])
def test_a_simulated_attacker_by_hand(processes, steps):
    """Twelve numbers, the class their sign, w = 1/2, rate 3. The student's weights and heads are left as they are."""
    images, labels = np.linspace(-2, 2, 12)[[3, 8, 0, 11, 6, 1, 9, 4, 2, 10, 5, 7]], None
    labels = (images > 0).astype(int)
    value, slope = attacked(images, labels, 0.5, 3.0, steps + 1)
    assert value != pytest.approx(attacked(images, labels, 0.5, 0.0, steps + 1)[0], rel=0.1)
    # With several processes a part is what all of them have of it: the shares are dealt so that the parts stay.
    deal = np.concatenate([part.reshape(processes, -1) for part in np.array_split(np.arange(12), steps + 1)], 1)

    def share(all_reduce, number):
        model, rows = Line(0.5), deal[number]
        x, y = torch.from_numpy(images[rows, None]), torch.from_numpy(labels[rows])
        seen = ChunkOutputs(x, y, torch.from_numpy(rows), x, x)
        own = Step([seen], (), lambda x: x, list(model.parameters()), 50, 7, processes, all_reduce, student=model)
        scalar, loss = SimulatedAttacker(steps=steps, lr=[3.0]).loss(own)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        scalar.backward()
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert all(not p.grad.any() for head in model.heads.values() for p in head.parameters())
        return loss.item(), model.backbone.weight.grad.item()

    found = np.array(in_processes(processes, share)).mean(0)
    assert found.tolist() == pytest.approx([value, slope], rel=1e-6)


def test_a_simulated_attacker_needs_two_images_a_part():
    model, x = Line(1.0), torch.zeros(5, 1, dtype=torch.float64)
    seen = ChunkOutputs(x, torch.zeros(5).long(), torch.arange(5), x, x)
    with pytest.raises(RecipeError, match="steps = 2 needs a batch_size of 6 or more"):
        SimulatedAttacker(steps=2).loss(Step([seen], (), lambda x: x, [], 50, 7, 1, list, student=model))


def test_a_simulated_attacker_draws_anew_in_each_step_whatever_its_images():
    """Where a step has the whole source, only its number tells it from others; made again it is the same."""

    def losses(number: int) -> float:
        torch.manual_seed(0)
        model = networks.build("resnet8", {"source": 4, "target": 3}, width=4).double()
        x, y = torch.rand(16, 3, 8, 8, dtype=torch.float64), torch.arange(16) % 4
        features = model.embed(x)
        seen = ChunkOutputs(x, y, torch.arange(16), model.heads["source"](features), model.heads["target"](features))
        step = Step([seen], (), lambda x: x, [*model.parameters()], 16, 7, 1, list, student=model, number=number)
        return float(SimulatedAttacker().loss(step)[1])

    assert losses(0) == losses(0) and len({losses(number) for number in range(4)}) == 4
