"""Stages: every weight of every supported network is in exactly one of them, or in the stem."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from dtlctl.model import networks
from dtlctl.model.stages import LEAST_LAST, renew, shares, stages, watched


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    """RegNets are built on the CPU, the largest with 640 million weights: here nobody fills them."""
    for name in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def forward_order(backbone: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """Those modules in the order in which a forward pass of one image of 224 pixels leaves them."""
    left: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, _, __: left.append(m)) for m in modules]
    backbone.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    for hook in hooks:
        hook.remove()
    return left


NAMES = networks.architectures()


def test_the_list_is_that_of_torchvision_s_classifiers_and_ours():
    assert {"resnet8", "resnet10", "resnet18", "resnet110", "vit_b_16", "densenet121"} <= set(NAMES)
    assert not {"googlenet", "inception_v3", "squeezenet1_0"} & set(NAMES)


FAMILIES = {re.match(r"[a-z]+(_v\d|_y)?", name)[0]: name for name in reversed(NAMES)} | {"small": "resnet8"}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([*FAMILIES.values()], id="one of each family"),
        pytest.param([name for name in NAMES if name not in FAMILIES.values()], id="the rest", marks=pytest.mark.slow),
    ],
)
def test_the_stages_of_every_architecture_hold_all_of_its_weights_once(names):
    """In forward order; each with a matrix or convolution; the last with 1 % of the weights or more."""
    for arch in names:
        stem = "small" if arch in networks.DEPTHS else "imagenet"
        networks.check(arch, stem, None, 224)
        backbone = networks.outline(arch, stem, None, 224).backbone
        table, weights = stages(backbone), dict(backbone.named_parameters())
        owned = [p for stage in table for module in stage.modules for p in module.parameters()]
        assert len(owned) == len(set(owned)), arch
        total = sum(p.numel() for p in weights.values())
        for stage in table:
            parameters = [p for module in stage.modules for p in module.parameters()]
            assert any(p.dim() > 1 for p in parameters), (arch, stage.name)
            assert stage.share == pytest.approx(sum(p.numel() for p in parameters) / total)
        assert len(table) > 2 and table[-1].share >= LEAST_LAST == 0.01, arch
        rest = {name: p for name, p in weights.items() if p not in set(owned)}
        assert list(rest) == list(weights)[: len(rest)], arch  # nothing behind the stem is left out
        assert shares(backbone)["stem"] == pytest.approx(sum(p.numel() for p in rest.values()) / total), arch
        assert sum(shares(backbone).values()) == pytest.approx(1) and shares(backbone)["stem"] < 0.03, arch
        modules = [module for stage in table for module in stage.modules]
        assert forward_order(backbone, modules) == modules, arch
    networks.outline.cache_clear()  # the outlines are on another device than they were


@pytest.mark.parametrize(
    ("arch", "names", "last"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"], 8_393_728),
        ("vgg11_bn", ["features.4", "features.8", "features.11", "features.15", "features.18", "features.22",
                      "features.25", "classifier.0", "classifier.3"], 4096 * 4096 + 4096),
        ("alexnet", ["features.3", "features.6", "features.8", "features.10", "classifier.1", "classifier.4"],
         4096 * 4096 + 4096),
        ("densenet121", ["features.denseblock1", "features.transition1", "features.denseblock2",
                         "features.transition2", "features.denseblock3", "features.transition3",
                         "features.denseblock4"], 2_158_080 + 2048),
        ("mobilenet_v3_small", None, 576 * 1024 + 1024),
    ],
)  # fmt: skip
def test_the_stages_of_networks_by_name(arch, names, last):
    """DenseNet's last block: 16 layers from 512 + 32k channels, 1x1 to 128 and 3x3 to 32, with their norms, and norm5:

    sum over k < 16 of 2(512 + 32k) + 128(512 + 32k) + 256 + 9 * 128 * 32 = 130 * 12,032 + 16 * 37,120 = 2,158,080.
    """
    backbone = networks.outline(arch, "imagenet", None, 224).backbone
    table = stages(backbone)
    assert names is None or [stage.name for stage in table] == names
    total = sum(p.numel() for p in backbone.parameters())
    assert round(table[-1].share * total) == last


@pytest.mark.parametrize(
    ("arch", "size", "shapes"),
    [
        ("resnet20", 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
        ("resnet18", 224, [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]),
        ("densenet121", 64, [(256, 16, 16), (128, 8, 8), (512, 8, 8), (256, 4, 4), (1024, 4, 4), (512, 2, 2),
                             (1024, 2, 2)]),
        ("convnext_tiny", 64, [(96, 16, 16), (192, 8, 8), (192, 8, 8), (384, 4, 4), (384, 4, 4), (768, 2, 2),
                               (768, 2, 2)]),
        ("swin_t", 64, [(16, 16, 96), (8, 8, 192), (8, 8, 192), (4, 4, 384), (4, 4, 384), (2, 2, 768), (2, 2, 768)]),
        ("vgg11_bn", 32, [(128, 16, 16), (256, 8, 8), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512, 2, 2), (512, 2, 2),
                          (4096,), (4096,)]),
        ("maxvit_t", 224, [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]),
        ("vit_b_32", 64, [(5, 768)] * 12),
    ],
)  # fmt: skip
def test_watching_gives_every_stage_s_output_in_order(arch, size, shapes):
    """Maps before pooling, also where the last normalisation comes after it."""
    stem = "small" if arch in networks.DEPTHS else "imagenet"
    backbone = networks.outline(arch, stem, None, size).backbone
    with watched(backbone) as seen:
        backbone(torch.empty(2, 3, size, size, device="meta"))
    assert [tuple(output.shape[1:]) for output in seen] == shapes
    backbone(torch.empty(2, 3, size, size, device="meta"))
    assert len(seen) == len(shapes)


def test_a_vgg_s_watched_maps_are_what_its_next_layer_sees():
    """The batch norm's output, which the ReLU behind it changes in place."""
    torch.manual_seed(0)
    backbone = networks.build("vgg11_bn", {"source": 2}, stem="imagenet").backbone.eval()
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.1)
    with watched(backbone) as seen, torch.no_grad():
        backbone(torch.rand(1, 3, 32, 32))
    assert all((output >= 0).all() and (output > 0).any() for output in seen)


@pytest.mark.parametrize("arch", ["vgg11_bn", "densenet121", "alexnet"])
def test_renewing_the_last_stage_changes_its_share_of_the_weights_and_no_other(arch):
    size = 64
    old, new = (networks.build(arch, {}, stem="imagenet", image_size=size).backbone for _ in range(2))
    for value, backbone in ((0.0, old), (1.0, new)):
        for parameter in backbone.parameters():
            nn.init.constant_(parameter, value)
    renew(old, new, 1)
    changed = sum(float(p.detach().sum()) for p in old.parameters()) / sum(p.numel() for p in old.parameters())
    assert changed == pytest.approx(stages(old)[-1].share, rel=1e-5) and changed > 0.1
    with pytest.raises(ValueError, match=r"99 of the last stages of \w+, but \d+ are known"):
        renew(old, new, 99)


@pytest.mark.parametrize(
    "backbone",
    [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Flatten(), nn.Linear(2, 2)],
    ids=["sequential", "flatten", "linear"],
)
def test_of_other_networks_no_stages_are_known(backbone):
    assert stages(backbone) == [] and shares(backbone) == {}


class Passing(nn.Linear):
    """Passes on what it got beside what it makes, a row for each of several places, as timm's SelecSLS and TNT do."""

    def forward(self, x):
        rows = x[1] if isinstance(x, tuple) else x
        return rows.repeat(3, 1), super().forward(rows), (1, 1)


def test_of_several_outputs_the_one_with_a_row_an_image_is_watched():
    backbone = nn.Sequential()
    backbone.stages = nn.Sequential(nn.Linear(2, 2), Passing(2, 2), Passing(2, 2))
    with watched(backbone) as seen:
        backbone.stages(torch.rand(4, 2))
    assert [tuple(output.shape) for output in seen] == [(4, 2)] * 2


def test_stages_of_a_network_with_lists_of_branches_are_not_known():
    """As HRNet's are: a list has no output, and what branches put out is no map."""
    backbone = nn.Sequential()
    backbone.stem, backbone.branches, backbone.stage4 = (
        nn.Linear(2, 2),
        nn.ModuleList([nn.Linear(2, 2)]),
        nn.Linear(2, 2),
    )
    assert stages(backbone) == []
