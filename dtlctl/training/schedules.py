"""How the learning rate of a training goes, by the names that a recipe knows."""

from __future__ import annotations

import torch

from dtlctl.recipe.schema import Training


def scheduler(optimizer: torch.optim.Optimizer, plan: Training, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over `steps` steps of the optimizer, as the plan says; one-cycle needs two or more."""
    if plan.schedule == "one-cycle" and steps > 1:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, steps, cycle_momentum=False)
    if plan.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
