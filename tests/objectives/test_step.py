"""Forward passes over chunks, how the way is chosen, rounding measured, and eight chunks on real processes."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from dtlctl.data.tensors import Batch
from dtlctl.model import networks
from dtlctl.objectives import step as forward
from dtlctl.objectives.disposal import Disposal
from dtlctl.objectives.retain import Distill
from dtlctl.objectives.unlearn import GradientCollision
from tests.objectives.collide_in_processes import everything
from tests.objectives.test_collision import assert_equal, pairwise
from tests.reliability.fork import together


def student(arch="resnet8"):
    torch.manual_seed(0)
    return networks.build(arch, {"source": 3, "target": 2}, width=4, image_size=8).double()


def batch(images=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(images, 3, 8, 8, dtype=torch.float64, generator=generator)
    return Batch(x, torch.arange(images) % 3, torch.arange(images))


def test_chunks_together_apart_and_again_are_the_same():
    """Logits, images and labels of every chunk, and where the running statistics end; `again` moves none."""
    one, other = student(), student()
    ours, _ = forward.together(one, batch(), 4)
    theirs = forward.apart(other, batch(), 4)
    assert {norm.momentum for norm in other.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    after = {k: v.clone() for k, v in other.state_dict().items()}
    for name, tensor in one.state_dict().items():
        if "running" in name:
            assert_equal(tensor, after[name])
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        c = forward.recomputing(other, batch(), 4)(number)
        for field in ("x", "y", "rows", "source", "target"):
            assert_equal(getattr(a, field), getattr(b, field))
            assert_equal(getattr(c, field), getattr(b, field))
    for name, tensor in other.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, after[name])


def test_a_chunk_seen_again_meets_the_same_dropout():
    """Or the gradient of the second look would not be that of the first; another chunk, and another batch, differ."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    model = networks.Classifier(backbone, 192, {"source": 3, "target": 2}).double().train()
    same = Batch(torch.ones(8, 3, 8, 8, dtype=torch.float64), torch.zeros(8), torch.arange(8))
    one, other = forward.recomputing(model, same, 4), forward.recomputing(model, same, 4)
    before = torch.get_rng_state()
    assert_equal(one(1).source, one(1).source)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.allclose(one(1).source, one(2).source)
    assert not torch.allclose(one(1).source, other(1).source)


@pytest.mark.parametrize(
    ("gigabytes", "arch", "expected"),
    [
        (16, "resnet8", "batched"),
        (0.0001, "resnet8", "recompute"),
        (64, "vit_b_16", "keep"),
        (1, "vit_b_16", "recompute"),
    ],
)
def test_the_way_is_chosen_by_size(gigabytes, arch, expected, monkeypatch):
    monkeypatch.setattr(forward.machine, "memory", lambda: int(gigabytes * 1e9))
    if arch == "resnet8":
        model, x = student(), batch().x
    else:
        model, x = networks.build(arch, {"source": 3}, stem="imagenet", image_size=16), torch.rand(4, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert forward.choose(model, x, 2) == expected
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running" in k)


def cosine(model, images, chunks, mode):
    loss = GradientCollision(chunks=chunks, memory=mode)
    more = {"chunks": chunks, "batch_norm": "train", "images": 8, "label_seed": 0}
    return Disposal(0.5, loss, Distill(), model, model, **more).cosine_to_float64(images)


@pytest.mark.parametrize("mode", ["batched", "keep", "recompute"])
def test_the_cosine_to_float64_is_that_of_gradients_made_by_hand(mode):
    """The oracle rounds the weights' forward pass as autocast does, and takes the double loop over pairs."""
    model = student().float().train()
    images = Batch(batch().x.float(), batch().y, batch().rows)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = {}
    for precision in ("float32", "bfloat16"):
        model.precision = precision
        found[precision] = cosine(model, images, 4, mode)
    gradients = []
    for precision in ("bfloat16", "float64"):
        oracle = copy.deepcopy(model) if precision == "bfloat16" else copy.deepcopy(model).double()
        oracle.precision = precision
        x = images.x.to(next(oracle.parameters()).dtype)
        parts = zip(x.chunk(4), images.y.chunk(4), strict=True)
        losses = [F.cross_entropy(oracle(a, "source"), b) for a, b in parts]
        _, gradient = pairwise(losses, list(oracle.parameters()))
        gradients.append(torch.cat([g.double().flatten() for g in gradient]))
    assert found["float32"] > 1 - 1e-6
    assert found["bfloat16"] == pytest.approx(float(F.cosine_similarity(*gradients, dim=0)), abs=0.02)
    assert found["bfloat16"] < 0.999
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_dropout_is_no_rounding():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Dropout(0.5))
    model = networks.Classifier(backbone, 64, {"source": 3, "target": 2}).train()
    images = Batch(batch().x.float(), batch().y, batch().rows)
    assert cosine(model, images, 2, "keep") > 1 - 1e-6 and model.training and backbone[-1].training


# Real processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    done = together(partial(everything, folder), folder)
    assert done.returncode == 0, done.stderr
    return {count: load_file(folder / f"{count}.safetensors") for count in (1, 2, 4, 8)}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_eight_chunks_on_any_number_of_processes(count, trained):
    """1x8, 2x4, 4x2 and 8x1 chunks: the first value and gradient, and the weights after 10 steps (slow ways: 3)."""
    one_process, found = trained[1], trained[count]
    assert found.keys() == one_process.keys() and len(found) > 40
    for name, tensor in found.items():
        difference = (tensor - one_process[name]).norm() / one_process[name].norm().clamp(min=1e-6)
        assert difference < 1e-5, f"{name} differs by {difference:.1e} on {count} processes"
    moved = [
        name
        for name in found
        if name.startswith("after/") and not torch.equal(found[name], found[f"before/{name[6:]}"])
    ]
    assert moved


def test_choosing_a_way_leaves_the_network_and_the_random_numbers_as_they_were():
    """A run that is taken up again chooses anew: what it then leaves behind, or draws, would make it another run."""
    model = networks.build("resnet8", {"source": 3, "target": 2}, width=4, image_size=8).train()
    model.backbone.stages.append(nn.Dropout2d(0.5))
    before, drawn = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    forward.choose(model, torch.zeros(8, 3, 8, 8), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
