from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dtlctl.errors import RecipeError
from dtlctl.model import networks, small_maps
from dtlctl.model.networks import Classifier, build, check
from dtlctl.recipe.loading import load
from dtlctl.run.experiment import Experiment


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "width", "parameters"), [("resnet8", 16, 78_042), ("resnet20", 16, 272_474), ("resnet8", 4, 5_214)]
)
def test_parameters_of_cifar_resnets(arch, width, parameters):
    """6n + 2 layers. A convolution k x k from i to o channels and its norm: k²io + 2o. At width 16 and 10 classes:

    stem                    3x3, 3 -> 16                                            464
    stage 1   n blocks of   2 (9·16² + 32)                                        4,672
    stage 2   first         (9·16·32 + 64) + (9·32² + 64) + (16·32 + 64)         14,528
              n - 1 blocks  2 (9·32² + 64)                                       18,560
    stage 3   first         (9·32·64 + 128) + (9·64² + 128) + (32·64 + 128)      57,728
              n - 1 blocks  2 (9·64² + 128)                                      73,984
    head                    64·10 + 10                                              650
    n = 1: 78,042. n = 3: 272,474, the 0.27 M of He et al. At width 4, n = 1: 116 + 304 + 944 + 3,680 + 170.
    """
    assert count(build(arch, {"source": 10}, width=width)) == parameters


@pytest.mark.parametrize(
    ("arch", "stem", "parameters"),
    [
        ("resnet18", "imagenet", 11_689_512),
        ("resnet18", "small", 11_689_512 - 9_408 + 1_728),
        ("resnet10", "imagenet", 4_905_792 + 513_000),
        ("resnet50", "imagenet", 25_557_032),
    ],
)
def test_parameters_of_imagenet_resnets(arch, stem, parameters):
    """With 1,000 classes, the numbers that torchvision publishes. The small stem has 3·3·3·64 weights for 7·7·3·64.

    resnet10: stem 9,536; one block a stage 73,984 + 230,144 + 919,040 + 3,673,088; head 512·1000 + 1000.
    """
    with torch.device("meta"):
        assert count(build(arch, {"source": 1000}, stem=stem)) == parameters


def test_depths_of_cifar_resnets_are_6n_plus_2():
    """Counting convolutions of 3x3 and the linear layer, as He et al. do."""
    for arch in ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"):
        with torch.device("meta"):
            layers = build(arch, {"source": 10}).modules()
        weighted = [m for m in layers if isinstance(m, nn.Linear) or getattr(m, "kernel_size", None) == (3, 3)]
        assert f"resnet{len(weighted)}" == arch


@pytest.mark.parametrize(
    ("arch", "stem", "sides"),
    [
        ("resnet20", "small", [32, 16, 8]),
        ("resnet18", "small", [32, 16, 8, 4]),
        ("resnet10", "imagenet", [8, 4, 2, 1]),
    ],
)
def test_stages_see_32_pixel_images_at_these_sizes(arch, stem, sides):
    with torch.device("meta"):
        backbone, x = build(arch, {"source": 10}, stem=stem).backbone, torch.zeros(2, 3, 32, 32)
    seen = []
    for module in backbone.modules():
        if type(module).__name__ in ("BasicBlock", "Bottleneck"):
            module.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    backbone(x)
    assert list(dict.fromkeys(seen)) == sides


FAMILIES = "alexnet convnext_tiny densenet121 efficientnet_b0 mnasnet0_5 mobilenet_v2 "
FAMILIES += "mobilenet_v3_small resnet10 resnet18 resnext50_32x4d shufflenet_v2_x0_5 swin_t swin_v2_t vgg11_bn "
FAMILIES += "vit_b_32 wide_resnet50_2"


@pytest.mark.parametrize("arch", FAMILIES.split())
def test_every_family_gives_logits_from_either_head(arch):
    """On torch's meta device: shapes without arithmetic."""
    with torch.device("meta"):
        model = build(arch, {"source": 7, "target": 3}, stem="imagenet", image_size=224)
        x = torch.zeros(2, 3, 224, 224)
        assert model.embed(x).shape == (2, model.features)
        assert model(x, "source").shape == (2, 7)
        assert model(x, "target").shape == (2, 3)
        assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in model.modules())


@pytest.mark.parametrize(
    ("arch", "stem"),
    [
        ("resnet8", "small"),
        ("resnet10", "small"),
        ("mobilenet_v3_small", "imagenet"),
        ("shufflenet_v2_x0_5", "imagenet"),
        ("efficientnet_b0", "imagenet"),
        ("regnet_y_400mf", "imagenet"),
    ],
)
def test_small_images_give_finite_logits_that_train_every_weight(arch, stem):
    torch.manual_seed(0)
    model = build(arch, {"source": 5, "target": 2}, stem=stem)
    logits = model(torch.rand(4, 3, 32, 32), "source")
    assert logits.shape == (4, 5) and logits.isfinite().all()
    logits.square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {"heads.target.weight", "heads.target.bias"}


@pytest.mark.parametrize(
    ("arch", "stem", "width", "message"),
    [
        ("resnet19", "small", None, "unknown architecture 'resnet19'; did you mean 'resnet18'?"),
        ("mobilenet_v3_smal", "imagenet", None, "did you mean 'mobilenet_v3_small'?"),
        ("zzz", "small", None, "unknown architecture 'zzz' (any torchvision classifier, resnet10, a CIFAR ResNet"),
        ("squeezenet1_0", "imagenet", None, "unknown architecture 'squeezenet1_0'"),
        ("resnet18", "small", 32, "width belongs to the CIFAR ResNets (resnet8, resnet20, ...), not to resnet18"),
        ("vgg11_bn", "small", None, 'stem = "small" is for ResNets; vgg11_bn needs stem = "imagenet"'),
        ("vit_h_14", "imagenet", None, "image_size = 32 is not a multiple of vit_h_14's patches of 14 pixels"),
        ("resnet20", "imagenet", None, 'resnet20 is a CIFAR ResNet and has only stem = "small"'),
    ],
)
def test_what_does_not_exist_is_refused(arch, stem, width, message):
    for refuse in (check, lambda *call: build(arch, {"source": 2}, stem=stem, width=width)):
        with pytest.raises(ValueError) as caught:
            refuse(arch, stem, width)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "takes", "too_small"),
    [("vgg11", 32, 31), ("alexnet", 63, 62), ("densenet121", 29, 28), ("maxvit_t", 224, 32)],
)
def test_images_too_small_for_a_network_are_refused(arch, takes, too_small):
    """VGG halves a side five times: 32 ends at 1 and 31 at 0. AlexNet's sides: 63, 15, 7, 3, 1 but 62, 14, 6, 2, and
    its last pool wants 3. DenseNet: 29, 15, 8, 4, 2, 1 but 28, 14, 7, 3, 1, 0. MaxViT's windows are made for 224.
    """
    check(arch, "imagenet", None, takes)
    for refuse in (check, lambda arch, stem, _, size: build(arch, {"a": 2}, stem=stem, image_size=size)):
        with pytest.raises(ValueError, match=f"^{arch} cannot take images of {too_small} pixels; set image_size"):
            refuse(arch, "imagenet", None, too_small)


@pytest.mark.parametrize(
    ("arch", "stem"), [("alexnet", "imagenet"), ("regnet_y_400mf", "imagenet"), ("resnet8", "small")]
)
def test_looking_at_a_network_draws_no_random_number(arch, stem):
    """Else a model's weights would depend on whether it had been looked at before."""
    networks.outline.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    outline = networks.outline(arch, stem, None, 64)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: tensor.shape for name, tensor in build(arch, {}, stem=stem, image_size=64).state_dict().items()}
    assert {name: tensor.shape for name, tensor in outline.state_dict().items()} == shapes


def test_the_model_normalises_its_input():
    """(x - mean) / std with ImageNet's statistics: an image of mean + k·std becomes k."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    model = Classifier(nn.Flatten(), 3, {"source": 2})
    for k in (-1, 0, 2):
        x = torch.tensor(mean + k * std, dtype=torch.float32).view(1, 3, 1, 1)
        torch.testing.assert_close(model.embed(x), torch.full((1, 3), float(k)))
    assert set(model.state_dict()) == {"heads.source.weight", "heads.source.bias"}


def test_forward_is_the_named_head_of_the_features():
    model, x = Classifier(nn.Flatten(), 3, {"a": 2, "b": 4}), torch.rand(5, 3, 1, 1)
    for name, head in model.heads.items():
        torch.testing.assert_close(model(x, name), model.embed(x) @ head.weight.T + head.bias)


def test_add_head_attaches_or_replaces():
    model = Classifier(nn.Flatten(), 3, {"source": 2})
    kept = model.heads["source"]
    model.add_head("target", 4)
    first = model.heads["target"]
    model.add_head("target", 5)
    assert model.heads["source"] is kept and model.heads["target"] is not first
    assert model(torch.rand(1, 3, 1, 1), "target").shape == (1, 5)
    assert list(model.heads) == ["source", "target"]


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("resnet8", {"source": 2}, width=4).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_bfloat16_rounds_the_forward_pass_and_nothing_else():
    """Logits in float32 that differ from the exact ones by less than a few of bfloat16's 2^-8; gradients in float32."""
    torch.manual_seed(0)
    model, x = networks.build("resnet8", {"source": 5}, width=8).eval(), torch.rand(4, 3, 16, 16)
    exact = model(x, "source")
    model.precision = "bfloat16"
    rounded = model(x, "source")
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05
    rounded.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size", "product"),
    [
        (3, 1, 1, (1, 1), True),
        (3, 1, 1, (2, 2), True),
        (3, 2, 1, (2, 2), True),
        (3, 2, 1, (2, 1), True),
        (7, 2, 3, (1, 4), True),
        (1, 1, 0, (1, 1), True),
        (1, 2, 0, (2, 2), False),  # the second row and column are under no tap
        (3, 1, 1, (3, 3), False),
        (3, 1, 1, (1, 4), False),  # the map sticks out of the kernel
    ],
)
def test_a_convolution_on_a_small_map_is_the_same_as_a_product(kernel, stride, padding, size, product):
    """torch's own convolution is the oracle: values, first and second derivatives, in float64."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride, padding).double()
    folded = nn.Sequential(nn.Conv2d(5, 7, kernel, stride, padding).double())
    small_maps.fold(folded)
    folded[0].load_state_dict(plain.state_dict())
    assert (folded[0].windows(*size) is not None) == product
    x = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for conv in (plain, folded[0]):
        y = conv(x).tanh()
        first = torch.autograd.grad(y.sum(), (x, conv.weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, conv.weight))
        results.append((y, *first, *second))
        rows = small_maps.unfold(conv, x)
        assert rows.shape[::2] == (3, y[0, 0].numel())
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_model_has_the_same_output_in_both_layouts_and_hands_its_layout_on():
    """ResNet-18 at 32 pixels in float64: maps of 1x1, 2x2 and larger."""
    model = build("resnet18", {"source": 3}, stem="imagenet", image_size=32).double().eval()
    x, layouts = torch.rand(2, 3, 32, 32, dtype=torch.float64), []
    hook = model.backbone.get_submodule("layer2").register_forward_hook(
        lambda _, __, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    plain = model(x, "source")
    model.channels_last = True
    assert torch.allclose(model(x, "source"), plain, rtol=1e-10, atol=1e-12)
    assert layouts == [False, True]
    hook.remove()
    assert torch.allclose(torch.func.vmap(lambda one: model(one[None], "source")[0])(x), plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("arch", "stem", "size", "small"),
    [
        ("resnet18", "imagenet", 64, True),
        ("resnet18", "imagenet", 65, False),
        ("resnet18", "small", 16, True),
        ("resnet18", "small", 17, False),
        ("vgg11", "imagenet", 32, True),
        ("densenet121", "imagenet", 224, False),
    ],
)
def test_convolutions_are_for_small_maps_only_where_maps_are_small(arch, stem, size, small):
    """The smallest map that a 3x3 convolution sees has two pixels a side, or more."""
    model = networks.outline(arch, stem, None, size)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {small_maps.SmallMapConv2d if small else nn.Conv2d}
    seen = []
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    hooks = [m.register_forward_hook(lambda m, x, _: seen.append(x[0].shape[-1])) for m in convolutions]
    model.embed(torch.empty(2, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    assert (min(seen) <= 2) == small


@pytest.mark.parametrize(
    ("arch", "found"), [("resnet18", ""), ("mobilenet_v3_small", "hardsigmoid"), ("mobilenet_v2", ""), ("vit_b_32", "")]
)
def test_what_torch_cannot_differentiate_twice_is_named(arch: str, found: str):
    """Gradient collision must: MobileNet v3's squeeze-and-excitation has hard sigmoids. Attention has it without its
    fused kernels."""
    assert networks.no_second_derivative(arch, "imagenet", None, 32) == found


def test_a_network_that_cannot_collide_is_refused_before_anything_trains(recipe_file: Path):
    text = recipe_file.read_text().replace(
        'arch = "resnet8"\nwidth = 4\n', 'arch = "mobilenet_v3_small"\nstem="imagenet"\n'
    )
    recipe_file.write_text(text)
    with pytest.raises(RecipeError, match=r"dispose\.gc\.unlearn: .*hardsigmoid, which mobilenet_v3_small has; write"):
        Experiment(load(recipe_file), recipe_file.parent / "runs")
