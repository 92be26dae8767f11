"""Learning rates: of each group of parameters, and their change over a run."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from hpetr.training.recipe import TrainRecipe


def parameter_groups(model: torch.nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Group parameters by learning rate: the backbone, the sampling offsets, and the rest; all with weight decay.

    The published runs lower the rate of `reference_points` too; no model of the zoo has a parameter of that name.
    """
    groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 1.0
            if "backbone.body." in name or "backbone.prior." in name:  # a wrapped model puts its own prefix in front
                factor = recipe.backbone_lr_factor
            elif "sampling_offsets" in name:
                factor = recipe.offsets_lr_factor
            groups[recipe.lr * factor].append(parameter)
    # The rest's rate, mostly the highest, comes first: logs show that one.
    return [{"params": parameters, "lr": lr} for lr, parameters in sorted(groups.items(), reverse=True)]


def schedule_factor(step: int, total: int, recipe: TrainRecipe) -> float:
    """Return the factor on the learning rate at `step` of `total`."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    return 0.1 ** sum(step >= drop * total for drop in recipe.drops)
