"""A backbone's stages: which weights belong to each, and what each puts out."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from dtlctl.model.cifar import CifarResNet

# Where torchvision's and timm's classifiers keep their blocks, by path: the children of these are taken one by one.
_CONTAINERS = {"features", "layers", "blocks", "trunk_output", "encoder", "encoder.layers", "classifier", "stages"}
# Paths of which a backbone has one, if its modules are registered in forward order and can be told apart like this.
_LANDMARKS = ("features", "layers", "blocks", "trunk_output", "encoder.layers", "layer4", "stage4", "stages")
LEAST_LAST = 0.01
"""Share of the weights that a last stage has at least: a smaller end of the network belongs to the block before it."""


class NetworkStage(NamedTuple):
    """A part of a backbone, in forward order after the stem."""

    name: str
    """The path of its first module."""
    modules: list[nn.Module]
    output: nn.Module
    """The module whose output is that of the stage; before pooling, where there are maps."""
    share: float
    """Of the backbone's weights, in [0, 1]."""


def stages(backbone: nn.Module) -> list[NetworkStage]:
    """The stages of a torchvision or timm classifier's or CIFAR ResNet's backbone, first stage first; empty for others.

    A stage is a block with a weight matrix or convolution, with the normalisations behind it. The first such block is
    the stem and in no stage, and so are parameters without a module (the tokens and positions of a transformer).
    """
    total = _weights([backbone]) or 1
    if isinstance(backbone, CifarResNet):
        n = len(backbone.stages) // 3
        thirds = [list(backbone.stages[start : start + n]) for start in (0, n, 2 * n)]
        return [
            NetworkStage(f"stage{k}", third, third[-1], _weights(third) / total) for k, third in enumerate(thirds, 1)
        ]
    found: list[NetworkStage] = []
    blocks = [*_blocks(backbone)]
    known = not {path for path, _ in backbone.named_modules()}.isdisjoint(_LANDMARKS)
    # A list is no module in forward order: HRNet's are branches, of several outputs.
    for path, block in blocks if known and not any(isinstance(block, nn.ModuleList) for _, block in blocks) else ():
        share = _weights([block]) / total
        if any(p.dim() > 1 for p in block.parameters()):
            found.append(NetworkStage(path, [block], block, share))
        elif share and found:
            pooled = path.startswith(("classifier", "head"))
            found[-1] = _joined(found[-1], NetworkStage(path, [block], found[-1].output if pooled else block, share))
    while len(found) > 2 and found[-1].share < LEAST_LAST:
        last = found.pop()
        found[-1] = _joined(found[-1], last._replace(output=found[-1].output))
    return found[1:]


def rates(model: nn.Module, backbone: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """Groups of weights for an optimizer: heads learn at `lr`, each stage of the backbone before at `decay` times that.

    What is in no stage, as the stem, stands before the first (as in BEiT, arXiv:2106.08254).
    """
    blocks = stages(backbone)
    depth: dict[nn.Parameter, int] = dict.fromkeys(backbone.parameters(), len(blocks) + 1)
    depth |= {p: len(blocks) - k for k, block in enumerate(blocks) for m in block.modules for p in m.parameters()}
    groups: dict[int, list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            groups.setdefault(depth.get(weight, 0), []).append(weight)
    return [{"params": members, "lr": lr * decay**n} for n, members in groups.items()]


def shares(backbone: nn.Module) -> dict[str, float]:
    """The share of the backbone's weights in its stem and each stage, by name; empty where stages are not known."""
    found = {stage.name: stage.share for stage in stages(backbone)}
    return {"stem": 1 - sum(found.values()), **found} if found else {}


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if inner in _CONTAINERS:
            yield from _blocks(child, inner)
        else:
            yield inner, child


def _weights(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _joined(first: NetworkStage, second: NetworkStage) -> NetworkStage:
    return NetworkStage(first.name, first.modules + second.modules, second.output, first.share + second.share)


def renew(backbone: nn.Module, fresh: nn.Module, last: int) -> None:
    """Give so many last stages the weights and statistics of a fresh backbone; ValueError where fewer are known."""
    old, new = stages(backbone), stages(fresh)
    if last > len(old):
        raise ValueError(f"{last} of the last stages of {type(backbone).__name__}, but {len(old)} are known")
    for ours, theirs in zip(old[-last:], new[-last:], strict=True):
        for block, replacement in zip(ours.modules, theirs.modules, strict=True):
            block.load_state_dict(replacement.state_dict())


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Within, `hook(module, inputs, output)` is called after each module's forward pass.

    Of several tensors, as timm's SelecSLS or MViT pass on, output is the first with one row an image.
    """

    def call(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        hook(module, inputs, min(tensors, key=len))

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(call))
        yield


@contextmanager
def watched(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """Within, every forward pass appends the output of each stage, first stage first, to the list."""
    seen: list[Tensor] = []
    with hooked((stage.output for stage in stages(backbone)), lambda module, inputs, output: seen.append(output)):
        yield seen
