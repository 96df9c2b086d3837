from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.objectives import collision


def collide(losses, parameters, **options):
    """Of losses that are there already."""
    return collision.collide(lambda loss: loss, parameters, losses, **options)


def pairwise(losses, parameters):
    """Eq. 8 as it is written, a double loop that autograd differentiates: (value, gradient)."""
    grads = [torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True) for loss in losses]
    products = [sum((a * b).sum() for a, b in zip(g, h, strict=True)) for g, h in combinations(grads, 2)]
    value = sum(products) / len(products)
    return value.detach(), torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)


def derivative(scalar, parameters):
    return torch.autograd.grad(scalar, parameters, retain_graph=True, materialize_grads=True)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("losses", "self_pairs", "value", "gradient"),
    [
        (2, False, 36, [30, 12]),
        (3, False, 95 / 3, [22, 41 / 3]),
        (3, True, 200 / 3, [52, 104 / 3]),
    ],
)
def test_two_parameters_by_hand(losses, self_pairs, value, gradient):
    """At (x, y) = (2, 3), from the losses x²y, x + y² and xy:

    g1 = (2xy, x²) = (12, 4), g2 = (1, 2y) = (1, 6), g3 = (y, x) = (3, 2);
    g1·g2 = 2xy + 2x²y  = 36, derivative (2y + 4xy, 2x + 2x²) = (30, 12): all there is for c = 2;
    g1·g3 = 2xy² + x³   = 44, derivative (2y² + 3x², 4xy)     = (30, 24);
    g2·g3 = y + 2xy     = 15, derivative (2y, 1 + 2x)         = ( 6,  5).
    c = 3: the mean of three pairs is 95/3, derivative (66, 41)/3.
    With self-pairs: |G|² / 6 where G = (16, 12), 400/6; derivative (H1 + H2 + H3) G / 3 with the summed Hessian
    [[2y, 2x + 1], [2x + 1, 2]] = [[6, 5], [5, 2]], so (156, 104)/3.
    """
    theta = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    x, y = theta
    found = collide([x**2 * y, x + y**2, x * y][:losses], [theta], self_pairs=self_pairs)
    assert found.value.item() == pytest.approx(value, rel=1e-14)
    assert found.surrogate.item() == pytest.approx(2 * value, rel=1e-14)
    found.surrogate.backward()
    assert theta.grad.tolist() == pytest.approx(gradient, rel=1e-14)


small = st.integers(-9, 9).map(float)
bowls = st.integers(2, 5).flatmap(
    lambda c: st.tuples(arrays(float, (c, 3), elements=small), arrays(float, (c, 3, 3), elements=small))
)


@settings(deadline=None, max_examples=50)
@given(bowls)
def test_quadratic_losses_have_the_gradient_of_equation_10(bowls):
    """At θ = 0, b·θ + θᵀAθ/2 has the gradient b and the Hessian (A + Aᵀ)/2: a pair's product changes by Hb' + H'b."""
    b, a = bowls
    h = (a + a.transpose(0, 2, 1)) / 2
    pairs = list(combinations(range(len(b)), 2))
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    terms = [torch.from_numpy(t) for t in (b, a)]
    value, surrogate = collide([m @ theta + theta @ n @ theta / 2 for m, n in zip(*terms, strict=True)], [theta])
    assert value.item() == pytest.approx(np.mean([b[m] @ b[n] for m, n in pairs]), abs=1e-9)
    expected = np.mean([h[m] @ b[n] + h[n] @ b[m] for m, n in pairs], axis=0)
    assert derivative(surrogate, [theta])[0].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_linear_losses_collide_and_leave_nothing_to_descend():
    """(3, 1)·θ and (2, -4)·θ: the product is 6 - 4 = 2 wherever θ is."""
    theta = torch.ones(2, requires_grad=True)
    value, surrogate = collide([3 * theta[0] + theta[1], 2 * theta[0] - 4 * theta[1]], [theta])
    assert (value.item(), surrogate.item()) == (2, 4)
    (surrogate + 0 * theta.sum()).backward()
    assert theta.grad.tolist() == [0, 0]


def convolution(*more):
    """[B, 3, 4, 4] -> [B, 4, 2, 2] -> three logits."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), *more, nn.Flatten(), nn.LazyLinear(3))


NETS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 3)),
    "conv": lambda: convolution(nn.Tanh()),
    "batch-norm-train": lambda: convolution(nn.BatchNorm2d(4), nn.ReLU()),
    "batch-norm-eval": lambda: convolution(nn.BatchNorm2d(4), nn.ReLU()).eval(),
    "layer-norm": lambda: convolution(nn.LayerNorm([4, 2, 2]), nn.GELU()),
    "group-norm": lambda: convolution(nn.GroupNorm(2, 4), nn.SiLU()),
    "max-pool": lambda: convolution(nn.ReLU(), nn.MaxPool2d(2)),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=8, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(48, 3),
    ),
}


def setting(name, chunks, images=3, seed=0):
    """A float64 net of NETS, the losses of its chunks, and its parameters."""
    torch.manual_seed(seed)
    x, y = torch.randn(chunks, images, 3, 4, 4, dtype=torch.float64), torch.randint(3, (chunks, images))
    net = NETS[name]()
    net(x[0].float())  # sizes the lazy layer
    net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    losses = [F.cross_entropy(net(x), y) for x, y in zip(x, y, strict=True)]
    return net, losses, list(net.parameters())


@pytest.mark.parametrize("chunks", [2, 3, 4, 8])
@pytest.mark.parametrize("net", NETS)
def test_agrees_with_the_double_loop_over_pairs(net, chunks):
    with sdpa_kernel(SDPBackend.MATH):
        _, losses, parameters = setting(net, chunks)
        value, gradient = pairwise(losses, parameters)
        found = collide(losses, parameters)
        assert_equal(found.value, value)
        assert_equal(found.surrogate.detach(), 2 * value)
        assert_equal(derivative(found.surrogate, parameters), gradient)


def test_agrees_with_central_finite_differences():
    """No autograd beyond the value: (L(θ + εe) - L(θ - εe)) / 2ε along every coordinate of a tanh net."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(3, (3, 4))
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    parameters, epsilon = list(net.parameters()), 1e-5

    def collided():
        return collide([F.cross_entropy(net(a), b) for a, b in zip(x, y, strict=True)], parameters)

    gradient = nn.utils.parameters_to_vector(derivative(collided().surrogate, parameters))
    start = nn.utils.parameters_to_vector(parameters).detach()
    numeric = []
    for direction in epsilon * torch.eye(len(start), dtype=torch.float64):
        values = []
        for moved in (start + direction, start - direction):
            nn.utils.vector_to_parameters(moved, parameters)
            values.append(collided().value)
        numeric.append((values[0] - values[1]) / (2 * epsilon))
    torch.testing.assert_close(gradient, torch.stack(numeric), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("chunks", [2, 5])
def test_self_pairs_are_algorithm_1(chunks):
    """Algorithm 1: every chunk's gradient meets the sum of all. That is the gradient of |G|²/2; divided by C(c,2)."""
    _, losses, parameters = setting("conv", chunks)
    total = torch.autograd.grad(sum(losses), parameters, create_graph=True)
    half = sum((g**2).sum() for g in total) / (chunks * (chunks - 1))
    value, surrogate = collide(losses, parameters, self_pairs=True)
    assert_equal(value, half.detach())
    assert_equal(derivative(surrogate, parameters), derivative(half, parameters))


def test_a_parameter_that_a_loss_does_not_use_counts_as_zero():
    """Of p³ and p²q² at p = 2, q = 3, and r in neither: g = (3p², 0, 0), (2pq², 2p²q, 0); product 6p³q² = 432,

    derivative (18p²q², 12p³q, 0) = (648, 288, 0).
    """
    p, q, r = parameters = [torch.tensor(float(n), requires_grad=True) for n in (2, 3, 5)]
    value, surrogate = collide([p**3, p**2 * q**2], parameters)
    assert value.item() == 432
    assert [g.item() for g in derivative(surrogate, parameters)] == [648, 288, 0]
    surrogate.backward()
    assert r.grad is None


@pytest.mark.parametrize("chunks", [0, 1])
def test_fewer_than_two_chunks_are_refused(chunks):
    theta = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=f"^gradient collision needs at least 2 chunks, got {chunks}$"):
        collide([theta.sum()] * chunks, [theta])


@pytest.mark.parametrize("recompute", [False, True])
def test_parameters_and_chunks_may_come_one_by_one(recompute):
    """As `net.parameters()` does, and a reader of data: what is read twice is kept. None at all are refused."""
    net, (x, y) = nn.Linear(2, 2).double(), torch.eye(2, dtype=torch.float64)
    found = collision.collide(lambda one: net(one).square().sum(), net.parameters(), iter([x, y]), recompute=recompute)
    value, gradient = pairwise([net(one).square().sum() for one in (x, y)], [*net.parameters()])
    found.surrogate.backward()
    assert_equal([found.value, *(p.grad for p in net.parameters())], [value, *gradient])
    with pytest.raises(ValueError, match=r"^collide: there are no parameters to differentiate$"):
        collision.collide(lambda one: net(one).sum(), iter([]), [x, y], recompute=recompute)


@pytest.mark.parametrize("self_pairs", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_same_for_any_number_of_processes(processes, self_pairs):
    """8 chunks: each process sends its totals once, hears everyone's sum, and gradients are averaged afterwards."""
    _, losses, parameters = setting("batch-norm-train", 8)
    whole = collide(losses, parameters, self_pairs=self_pairs)
    parts = [losses[rank::processes] for rank in range(processes)]
    sent = []

    def processes_collide(all_reduce):
        more = {"self_pairs": self_pairs, "processes": processes, "all_reduce": all_reduce}
        return [collide(part, parameters, **more) for part in parts]

    processes_collide(lambda tensors: sent.append(tensors) or tensors)
    assert len(sent) == processes
    heard = [sum(tensors) for tensors in zip(*sent, strict=True)]
    collisions = processes_collide(lambda tensors: heard)
    for found in collisions:
        assert_equal(found.value, whole.value)
    gradients = zip(*(derivative(c.surrogate, parameters) for c in collisions), strict=True)
    mean = tuple(sum(shares) / processes for shares in gradients)
    assert_equal(mean, derivative(whole.surrogate, parameters))


def partitions(rows, size):
    """Every way to cut the rows into groups of that size, in no order."""
    if not rows:
        yield []
        return
    for others in combinations(rows[1:], size - 1):
        rest = [row for row in rows[1:] if row not in others]
        for groups in partitions(rest, size):
            yield [[rows[0], *others], *groups]


@pytest.mark.parametrize(("images", "chunks", "ways"), [(4, 2, 3), (6, 2, 10), (6, 3, 15), (4, 4, 1)])
def test_the_mean_over_all_partitions_is_the_full_loss_of_equation_7(images, chunks, ways):
    """Chunks of b = N/c images, drawn without replacement. A pair of images meets in a share (N-b)/(N-1) of the
    partitions, each time with weight 1 / (C(c,2) b²) = 2 / (N(N-b)): in the mean 1 / C(N,2), as in Eq. 7.
    """
    _, each, parameters = setting("conv", images, images=1)
    cuts = list(partitions(list(range(images)), images // chunks))
    assert len(cuts) == ways
    values, surrogates = zip(
        *(collide([sum(each[i] for i in group) / len(group) for group in cut], parameters) for cut in cuts), strict=True
    )
    value, gradient = pairwise(each, parameters)
    assert_equal(sum(values) / ways, value)
    assert_equal(derivative(sum(surrogates) / ways, parameters), gradient)


def test_the_mean_over_independent_chunks_is_the_squared_norm_of_the_mean_gradient():
    """Both chunks drawn with replacement, all N² draws: E⟨g_m, g_n⟩ = ⟨Eg, Eg⟩, never negative."""
    _, each, parameters = setting("conv", 3)
    values = [collide([m, n], parameters).value for m in each for n in each]
    mean = torch.autograd.grad(sum(each) / 3, parameters)
    assert_equal(sum(values) / 9, sum((g**2).sum() for g in mean))
