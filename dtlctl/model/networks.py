"""Image classifiers: one torchvision backbone, any number of named linear heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtlctl.errors import nearest
from dtlctl.model import small_maps
from dtlctl.model.cifar import DEPTHS, CifarResNet
from dtlctl.model.stages import rates, renew, shares, stages, watched

__all__ = ["DEPTHS", "CifarResNet", "Classifier", "Precision", "architectures", "build", "check",
           "no_second_derivative", "outline", "precision", "rates", "renew", "shares", "stages", "watched"]  # fmt: skip

# Names that need no look into torchvision, so that checking a recipe stays quick.
_KNOWN = {"resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", *DEPTHS}
# Families that pad every convolution: an image of one pixel would do.
_ANY_SIZE = ("resnet", "resnext", "wide_resnet", "regnet")

TIMM = "timm:"
"""Before the names of timm's networks."""

# ImageNet statistics: what every torchvision classifier expects.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Precision = Literal["float64", "float32", "tf32", "bfloat16"]


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Within, products and convolutions on a GPU use TF32 if that is the precision, and else do not.

    torch's switch is one for the whole process, for forward and backward passes; it is left as it was found.
    """
    before = _tf32()
    _allow_tf32(name == "tf32", name == "tf32")
    try:
        yield
    finally:
        _allow_tf32(*before)


def _tf32() -> tuple[bool, bool]:
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = getattr(torch.backends.cudnn, "conv", None)
    if conv is None:  # before torch 2.9; since then an old name raises where somebody wrote to a new one
        return matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    return matmul.fp32_precision == "tf32", conv.fp32_precision == "tf32"


def _allow_tf32(products: bool, convolutions: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32 = products, convolutions
    if hasattr(cudnn, "conv"):  # the old name's False means "as torch.backends.fp32_precision says"
        for operation in (cudnn.conv, cudnn.rnn):
            operation.fp32_precision = "tf32" if convolutions else "ieee"


class Classifier(nn.Module):
    """`heads[name](backbone(normalised x))`: logits [B, classes of the head] of images x [B, 3, H, W] in [0, 1].

    readout: what the backbone's library calls the last linear layer, in whose place the heads are.
    """

    def __init__(self, backbone: nn.Module, features: int, heads: dict[str, int], readout: str = "fc"):
        super().__init__()
        self.backbone = backbone
        self.features = features
        self.readout = readout
        self.heads = nn.ModuleDict({name: nn.Linear(features, classes) for name, classes in heads.items()})
        self.mean = nn.Buffer(torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.precision: Precision = "float32"
        self.channels_last = False
        self.classes: list[str] = []  # of an exported model: the names of its logits

    @property
    def outputs(self) -> dict[str, int]:
        return {name: int(head.out_features) for name, head in self.heads.items() if isinstance(head, nn.Linear)}

    def embed(self, x: Tensor) -> Tensor:
        """Features [B, features] of images [B, 3, H, W] in [0, 1], in the parameters' type whatever the precision."""
        normalised = (x - self.mean) / self.std
        if self.channels_last:  # convolutions hand the layout on; `vmap` knows this way of asking for it only
            normalised = normalised.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if self.precision != "bfloat16":
            return self.backbone(normalised)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.backbone(normalised).to(x.dtype)

    def forward(self, x: Tensor, head: str | None = None) -> Tensor:
        """Logits of a head, which need not be named where there is one alone."""
        (name,) = self.heads if head is None else (head,)
        return self.heads[name](self.embed(x))

    def through(self, head: str) -> Classifier:
        """This network, of the same modules and tensors, with that head alone: a function of images."""
        seen = Classifier(self.backbone, self.features, {}, self.readout)
        seen.heads[head], seen.mean, seen.std = self.heads[head], self.mean, self.std
        seen.precision, seen.channels_last, seen.training = self.precision, self.channels_last, self.training
        return seen

    def plain_state(self, head: str) -> dict[str, Tensor]:
        """The backbone and one head as their library's own network has them: torchvision's names and shapes."""
        readout = {f"{self.readout}.{name}": tensor for name, tensor in self.heads[head].state_dict().items()}
        return {**self.backbone.state_dict(), **readout}

    def add_head(self, name: str, classes: int, values: tuple[Tensor, Tensor] | None = None) -> None:
        """Attach (or replace) a head, freshly initialised or with this weight and bias."""
        like = next(self.parameters())
        head = nn.Linear(self.features, classes).to(like.device, like.dtype)
        if values:
            head.load_state_dict(dict(zip(("weight", "bias"), values, strict=True)))
        self.heads[name] = head


def build(
    arch: str,
    heads: dict[str, int],
    *,
    stem: str = "small",
    width: int | None = None,
    image_size: int = 32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Classifier:
    """A freshly initialised classifier. Raises ValueError for a combination that does not exist.

    `arch`: a torchvision classifier's name, `resnet10`, a CIFAR ResNet (`resnet8`, `resnet20`, ...), or `timm:NAME`.
    `stem`: "imagenet" is torchvision's own first layers; "small" is a 3x3 stride-1 convolution without max-pool, for
    32-pixel images (ResNets only). `width`: channels of a CIFAR ResNet's first stage (He et al.: 16).
    """
    check(arch, stem, width, image_size)
    model = _assemble(arch, heads, stem, width, image_size)
    for buffer, numbers in ((model.mean, mean), (model.std, std)):
        buffer.copy_(torch.tensor(numbers).view(1, 3, 1, 1))
    return model


@lru_cache(maxsize=8)
def outline(arch: str, stem: str, width: int | None, image_size: int) -> Classifier:
    """The network that `build` would make, without heads, to be looked at: it holds no numbers and draws none."""
    # RegNet and timm's compute with tensors while they are built, which the meta device cannot.
    device = "cpu" if arch.startswith(("regnet", TIMM)) else "meta"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return _assemble(arch, {}, stem, width, image_size).eval()


@lru_cache(maxsize=8)
def no_second_derivative(arch: str, stem: str, width: int | None, image_size: int) -> str:
    """The operation of this network that torch cannot differentiate twice, as gradient collision must; "" for none."""
    if arch.startswith(_ANY_SIZE):  # convolutions, batch norms and ReLUs
        return ""
    like = outline(arch, stem, width, image_size)
    weights = [*like.parameters()]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            answers = like.embed(torch.zeros(2, 3, image_size, image_size, device=weights[0].device))
            first = torch.autograd.grad(answers.square().sum(), weights, create_graph=True, allow_unused=True)
            total = sum((one.square().sum() for one in first if one is not None), answers.sum())
            torch.autograd.grad(total, weights, allow_unused=True)
        except RuntimeError as error:
            found = re.search(r"derivative for aten::(\w+?)(_backward)? is not implemented", str(error))
            return found[1] if found else "a layer of its own"  # one that only says that it is differentiated once
    return ""


def _assemble(arch: str, heads: dict[str, int], stem: str, width: int | None, image_size: int) -> Classifier:
    if arch in DEPTHS:
        width = width or 16
        return Classifier(CifarResNet(DEPTHS[arch], width), 4 * width, heads)
    backbone, features, readout = (_timm if arch.startswith(TIMM) else _torchvision)(arch, image_size)
    if stem == "small":  # torchvision's ResNets all call their first layers conv1, bn1, relu and maxpool
        conv = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1, backbone.maxpool = conv, nn.Identity()
    if image_size <= (16 if stem == "small" else 64):  # a network halves the sides 3 times, or 5: to 2 or less
        small_maps.fold(backbone)
    return Classifier(backbone, features, heads, readout)


def check(arch: str, stem: str, width: int | None, image_size: int | None = 32) -> None:
    """Raise ValueError, with the nearest valid name, unless `build` can make this model; for some size, if None."""
    if arch.startswith(TIMM):
        _check_timm(arch)
    elif arch not in _KNOWN and arch not in (names := architectures()):
        raise ValueError(
            f"unknown architecture {arch!r}{nearest(arch, names)}"
            " (any torchvision classifier, resnet10, a CIFAR ResNet: resnet8, resnet20, resnet32, ..., or timm:NAME)"
        )
    if width is not None and arch not in DEPTHS:
        raise ValueError(f"width belongs to the CIFAR ResNets (resnet8, resnet20, ...), not to {arch}")
    if stem == "small" and not arch.startswith(("resnet", "resnext", "wide_resnet")):
        raise ValueError(f'stem = "small" is for ResNets; {arch} needs stem = "imagenet"')
    if image_size and arch.startswith("vit_") and image_size % (patch := int(arch.rpartition("_")[2])):
        raise ValueError(f"image_size = {image_size} is not a multiple of {arch}'s patches of {patch} pixels")
    if stem == "imagenet" and arch in DEPTHS:
        raise ValueError(f'{arch} is a CIFAR ResNet and has only stem = "small"')
    if image_size and not arch.startswith(_ANY_SIZE):
        try:
            like = outline(arch, stem, width, image_size)
            found = like.embed(torch.zeros(1, 3, image_size, image_size, device=next(like.parameters()).device))
            patches: Any = getattr(like.backbone, "patch_embed", None)
            sides = np.atleast_1d(getattr(patches, "patch_size", None) or 1)  # timm cuts off what is no multiple
            if found.shape != (1, like.features) or (image_size % sides).any():
                raise RuntimeError
        except (AssertionError, RuntimeError):
            raise ValueError(
                f"{arch} cannot take images of {image_size} pixels; set image_size, 224 for example"
            ) from None


def architectures() -> list[str]:
    """Every name that `build` knows, but timm's."""
    import torchvision

    # Inception and GoogLeNet have auxiliary outputs, SqueezeNet no linear head.
    names = torchvision.models.list_models(module=torchvision.models)
    return sorted({n for n in names if not n.startswith(("inception", "googlenet", "squeezenet"))} | _KNOWN)


def _torchvision(arch: str, image_size: int) -> tuple[Any, int, str]:
    """A backbone of torchvision, the width of its features, and what its last linear layer is called."""
    from torchvision import models

    # Only vision transformers are built for one image size.
    size = {"image_size": image_size} if arch.startswith("vit_") else {}
    if arch == "resnet10":
        backbone: nn.Module = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        backbone = models.get_model(arch, weights=None, **size)
    name, last = [(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return backbone, last.in_features, name


def _timm(arch: str, image_size: int) -> tuple[Any, int, str]:
    import timm

    backbone: Any = timm.create_model(
        arch.removeprefix(TIMM), pretrained=False, num_classes=0, **timm_options(arch, image_size)
    )
    width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone, int(width), backbone.default_cfg["classifier"]


def timm_options(arch: str, image_size: int) -> dict[str, Any]:
    """What timm has to be told besides the name: the image's size, where a network is built for one."""
    import timm

    told = timm.get_pretrained_cfg(arch.removeprefix(TIMM))
    return {"img_size": image_size} if told and told.fixed_input_size else {}


def _check_timm(arch: str) -> None:
    """Raise ValueError where timm is not there, or has no such network with one linear layer at its end."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{arch} needs the package timm: pip install 'dtlctl[timm]'") from None
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):  # neither a name of the hub, which would be fetched
        raise ValueError(f"timm has no network {name!r}{nearest(name, timm.list_models())}")
    told = timm.get_pretrained_cfg(name)
    if not told or not isinstance(told.classifier, str):
        raise ValueError(f"{arch} has more than one linear layer at its end, or none that is known")
