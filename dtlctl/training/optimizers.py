"""Optimisers and learning rates as a stage's settings ask for them."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, OneCycleLR

from dtlctl.model import networks
from dtlctl.model.networks import Classifier
from dtlctl.recipe.settings import Training


def optimizer_of(model: nn.Module, plan: Training) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if getattr(plan, "optimizer", "sgd") == "adamw":
        decay = getattr(plan, "layer_decay", None)
        groups = _by_layer(model, plan.lr, decay) if decay else weights
        return torch.optim.AdamW(groups, plan.lr, weight_decay=plan.weight_decay, fused=True)
    return torch.optim.SGD(weights, plan.lr, plan.momentum, weight_decay=plan.weight_decay, fused=True)


def _by_layer(model: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """Weights with their learning rates: heads `lr`, each stage of the backbone before them `decay` times the next's.

    What is in no stage, as the stem, stands before the first (as in BEiT, arXiv:2106.08254).
    """
    blocks = networks.stages(model.backbone) if isinstance(model, Classifier) else []
    depth = {p: len(blocks) - k for k, block in enumerate(blocks) for m in block.modules for p in m.parameters()}
    backbone = model.backbone.parameters() if isinstance(model, Classifier) else ()
    depth = {**{p: len(blocks) + 1 for p in backbone}, **depth}
    groups: dict[int, list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            groups.setdefault(depth.get(weight, 0), []).append(weight)
    return [{"params": members, "lr": lr * decay**n} for n, members in groups.items()]


def schedule_of(optimizer: torch.optim.Optimizer, plan: Training, steps: int) -> LRScheduler:
    """The learning rate over `steps` steps of the optimizer, as the plan says; one-cycle needs two or more."""
    if plan.schedule == "one-cycle" and steps > 1:
        return OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps, cycle_momentum=False)
    if plan.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return ConstantLR(optimizer, factor=1.0)
