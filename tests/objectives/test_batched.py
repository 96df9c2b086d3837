"""Gradient collision in one pass, and with one graph at a time: the same numbers as chunk by chunk."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtlctl.data.tensors import Batch
from dtlctl.model import networks, small_maps
from dtlctl.objectives import batched, collision
from dtlctl.objectives import step as forward
from tests.objectives.test_collision import assert_equal, pairwise


class Twice(nn.Module):
    """A convolution used twice, a wide linear layer used twice, and a layer that the loss does not see."""

    def __init__(self):
        super().__init__()
        self.shared, self.last, self.unused = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(48, 3), nn.Linear(2, 2)
        self.wide = nn.Linear(48, 48)

    def forward(self, x):
        x = torch.tanh(self.shared(torch.tanh(self.shared(x)))).flatten(1)
        return self.last(torch.tanh(self.wide(torch.tanh(self.wide(x)))))


def net(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def small(*layers):
    """Convolutions on maps of 1x1 or 2x2, computed as products."""
    model = net(*layers)
    small_maps.fold(model)
    return model


NETS = {
    "linear": lambda: net(nn.Flatten(), nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 40, bias=False), nn.Tanh()),
    "conv": lambda: net(nn.Conv2d(3, 40, 3, bias=False), nn.Tanh(), nn.Conv2d(40, 50, 2), nn.SiLU()),
    "small-map": lambda: small(nn.Conv2d(3, 30, 4, 2), nn.Tanh(), nn.Conv2d(30, 50, 3, padding=1), nn.SiLU()),
    "small-maps": lambda: small(nn.Conv2d(3, 30, 3), nn.Tanh(), nn.Conv2d(30, 50, 3, padding=1), nn.SiLU()),
    "strided": lambda: net(nn.Conv2d(3, 30, 3, stride=2, padding=2, dilation=2), nn.ReLU(inplace=True)),
    "grouped": lambda: net(nn.Conv2d(3, 30, 3, groups=3), nn.GELU(), nn.Conv2d(30, 60, 2, groups=2), nn.GELU()),
    "batch-norm": lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "batch-norm-eval": lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval(),
    "no-statistics": lambda: net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()).eval(),
    "twice": Twice,
}


def setting(name, chunks, images=3):
    """A float64 net, and x [chunks * images, 3, 4, 4], y of its batch."""
    torch.manual_seed(0)
    x, y = torch.randn(chunks * images, 3, 4, 4, dtype=torch.float64), torch.randint(3, (chunks * images,))
    model = NETS[name]()
    model(x.float())  # sizes the lazy layer
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.double(), x, y


def chunk_losses(logits, y, chunks):
    return [F.cross_entropy(a, b) for a, b in zip(logits.chunk(chunks), y.chunk(chunks), strict=True)]


def in_one_pass(model, x, y, chunks, **options):
    with batched.record(model, chunks) as tape:
        logits = model(x)
    losses = chunk_losses(logits, y, chunks)
    found = batched.collide_batched(losses, list(model.parameters()), tape, **options)
    return found, torch.autograd.grad(found.surrogate, list(model.parameters()), materialize_grads=True)


def chunk_by_chunk(model, x, y, chunks):
    pairs = zip(x.chunk(chunks), y.chunk(chunks), strict=True)
    return pairwise([F.cross_entropy(model(a), b) for a, b in pairs], list(model.parameters()))


@pytest.mark.parametrize("chunks", [2, 3, 8])
@pytest.mark.parametrize("name", NETS)
def test_one_pass_agrees_with_the_double_loop_over_pairs(name, chunks):
    model, x, y = setting(name, chunks)
    assert batched.batchable(model)
    value, gradient = chunk_by_chunk(model, x, y, chunks)
    found, ours = in_one_pass(model, x, y, chunks)
    assert_equal(found.value, value)
    assert_equal(found.surrogate.detach(), 2 * value)
    assert_equal(ours, gradient)


def test_the_ways_agree_in_float32_on_a_real_network():
    """ResNet-18, four chunks of eight: the gradients differ by rounding alone."""
    torch.manual_seed(0)
    model = networks.build("resnet18", {"source": 10, "target": 2}, stem="imagenet")
    x, y = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))
    parameters, images = list(model.parameters()), Batch(x, y, torch.arange(32))

    def loss(view):
        return F.cross_entropy(view.source, view.y)

    seen, tape = forward.together(model, images, 4)
    found = [
        batched.collide_batched([loss(view) for view in seen], parameters, tape),
        collision.collide(loss, parameters, forward.apart(model, images, 4)),
    ]
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(c.surrogate, parameters, materialize_grads=True)])
        for c in found
    )
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert found[0].value.item() == pytest.approx(found[1].value.item(), rel=1e-5)


def test_both_ways_to_a_layer_s_squares_are_taken():
    """12 rows a chunk. 48 -> 40 and 40 -> 40: 12 · 88 < 1920, 12 · 80 < 1600. 40 -> 3: 12 · 43 > 120, formed."""
    model, x, _ = setting("linear", 2, images=12)
    with batched.record(model, 2) as tape:
        model(x)
    few = {m: batched._few_rows(m, calls, 2) for m, calls in tape.calls.items()}
    assert [few[m] for m in model.modules() if isinstance(m, nn.Linear)] == [True, True, False]


def test_self_pairs_in_one_pass_are_the_square_of_the_whole():
    """Algorithm 1: the gradient of |G|² / 2, divided by C(c,2); the batch norm still sees each chunk by itself."""
    model, x, y = setting("batch-norm", 4)
    parameters = list(model.parameters())
    losses = [F.cross_entropy(model(a), b) for a, b in zip(x.chunk(4), y.chunk(4), strict=True)]
    total = torch.autograd.grad(sum(losses), parameters, create_graph=True)
    half = sum((g**2).sum() for g in total) / (4 * 3)
    expected = torch.autograd.grad(half, parameters)
    found, ours = in_one_pass(model, x, y, 4, self_pairs=True)
    assert_equal(found.value, half.detach())
    assert_equal(ours, expected)


def test_one_pass_leaves_the_model_as_it_was():
    model, x, _ = setting("batch-norm", 2)
    before = model(x)
    with batched.record(model, 2):
        assert not torch.allclose(model(x), before)
    assert_equal(model(x), before)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["batch-norm", "no-statistics"])
def test_one_pass_moves_running_statistics_as_the_average_of_the_chunks(name):
    """(1 - m) r0 + m · the mean over chunks of the chunk's mean, and the same of its unbiased variance; m = 0.1."""
    model, x, _ = setting(name, 2)
    convolution, norm = model[0], model[1]
    start = None if norm.running_mean is None else (norm.running_mean.clone(), norm.running_var.clone())
    with batched.record(model, 2):
        model(x)
    if start is None:
        assert norm.running_mean is None
        return
    parts = convolution(x).view(2, 3, 4, 2, 2)
    assert_equal(norm.running_mean, 0.9 * start[0] + 0.1 * parts.mean((1, 3, 4)).mean(0))
    assert_equal(norm.running_var, 0.9 * start[1] + 0.1 * parts.var((1, 3, 4)).mean(0))


def test_what_one_pass_cannot_do_is_refused():
    assert not batched.batchable(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert not batched.batchable(nn.Conv2d(1, 1, 3, padding="same"))
    assert not batched.batchable(nn.BatchNorm2d(2, momentum=None))
    assert not batched.batchable(nn.BatchNorm1d(2, affine=False))
    assert not batched.batchable(networks.outline("vit_b_16", "imagenet", None, 32))
    assert batched.batchable(networks.build("resnet18", {"source": 2}))
    with pytest.raises(ValueError, match=r"not \[images, features\]"), batched.record(nn.Linear(2, 2), 2) as tape:
        next(iter(tape.calls))(torch.ones(4, 3, 2))
    with (
        pytest.raises(ValueError, match="5 images are not 2 equal chunks"),
        batched.record(norm := nn.BatchNorm2d(3), 2),
    ):
        norm(torch.ones(5, 3, 2, 2))


@pytest.mark.parametrize("self_pairs", [False, True])
def test_one_graph_at_a_time_gives_the_same(self_pairs):
    model, x, y = setting("batch-norm", 4)
    parameters, chunks = list(model.parameters()), list(zip(x.chunk(4), y.chunk(4), strict=True))

    def loss(chunk):
        return F.cross_entropy(model(chunk[0]), chunk[1])

    kept = collision.collide(loss, parameters, chunks, self_pairs=self_pairs)
    again = collision.collide(loss, parameters, chunks, self_pairs=self_pairs, recompute=True)
    assert_equal(again.value, kept.value)
    mixed = [torch.autograd.grad(3 * c.surrogate + loss(chunks[0]), parameters) for c in (kept, again)]
    assert_equal(mixed[1], mixed[0])


@pytest.mark.parametrize(("recompute", "alive"), [(False, 3), (True, 0)])
def test_recomputing_holds_one_graph_at_a_time(recompute, alive):
    """When the last of four losses is asked for, the three before it are held, or gone."""
    graphs: list[weakref.ref] = []

    class Token:
        """Lives as long as the graph that holds it."""

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            graphs.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model, x, y = setting("conv", 4)

    def loss(chunk):
        held.append(sum(graph() is not None for graph in graphs))
        return F.cross_entropy(Marked.apply(model(chunk[0])), chunk[1])

    held: list[int] = []
    chunks = list(zip(x.chunk(4), y.chunk(4), strict=True))
    collision.collide(loss, list(model.parameters()), chunks, recompute=recompute)
    assert held[3] == alive and max(held) == alive


def test_sharded_parameters_are_refused():
    class FlatParameter(nn.Parameter):
        """What FSDP calls its shards."""

    with pytest.raises(ValueError, match=r"sharded parameters \(FlatParameter, as FSDP makes\)"):
        collision.collide(lambda m: m, [FlatParameter(torch.ones(1))], [1, 2])


def test_fused_attention_is_refused_before_anything_is_computed():
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    with pytest.raises(ValueError, match=r"fused attention has no second derivative; .*SDPBackend.MATH"):
        collision.collide(
            lambda x: layer(x, x, x, need_weights=False)[0].square().mean(),
            list(layer.parameters()),
            torch.randn(2, 3, 5, 4),
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [("CompiledFunction", "torch.compile has no double backward"), ("SyncBatchNorm", "use BatchNorm2d")],
)
def test_a_step_that_cannot_be_differentiated_twice_is_refused(name, message):
    """A step of the name that torch gives to a compiled graph, or to batch norm over processes."""

    def forward(ctx, x):
        return x * 1

    methods = {"forward": staticmethod(forward), "backward": staticmethod(lambda ctx, gradient: gradient)}
    once = type(name, (torch.autograd.Function,), methods)
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        collision.collide(lambda x: once.apply(weight * x).sum(), [weight], [1, 2])
