"""Learning rates of each group of parameters, their change over a run, and the optimizer that clips by tensor."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from hpetr.training.recipe import TrainRecipe

MIN_SIZE = 1e-3  # of a tensor's weights, so that zeros learn too


def parameter_groups(model: torch.nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Group parameters by learning rate: the backbone, the sampling offsets, and the rest; all with weight decay.

    With `backbone_relative_lr` each tensor of the backbone is a group whose rate is in proportion to its weights: in a
    network whose batch norms were folded in, tensors differ in scale by a factor of 1,000.

    The published runs lower the rate of `reference_points` too; no model of the zoo has a parameter of that name.
    """
    groups: dict[float, list[torch.nn.Parameter]] = defaultdict(list)
    relative: list[dict[str, Any]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 1.0
            # A wrapped model puts its own prefix in front.
            if "backbone.body." in name and recipe.backbone_relative_lr is not None:
                relative.append({"params": [parameter], "lr": recipe.backbone_relative_lr * typical_size(parameter)})
                continue
            if "backbone.prior." in name and recipe.backbone_relative_lr is not None:
                factor = recipe.prior_lr_factor  # of a new skeleton it starts from zeros
            elif "backbone.body." in name or "backbone.prior." in name:
                factor = recipe.backbone_lr_factor
            elif "sampling_offsets" in name:
                factor = recipe.offsets_lr_factor
            groups[recipe.lr * factor].append(parameter)
    # The rest's rate, mostly the highest, comes first: logs show that one.
    return [{"params": parameters, "lr": lr} for lr, parameters in sorted(groups.items(), reverse=True)] + relative


def typical_size(parameter: torch.Tensor) -> float:
    """Return the median over output channels of the RMS of a channel's weights.

    The RMS of the tensor would be that of a few channels: in MoveNet's trunk a depthwise filter whose channel is never
    active has a norm of 1,300, the others of 1.
    """
    rows = parameter.detach().float().reshape(len(parameter), -1)
    return max(float(rows.square().mean(1).sqrt().median()), MIN_SIZE)


def schedule_factor(step: int, total: int, recipe: TrainRecipe) -> float:
    """Return the factor on the learning rate at `step` of `total`."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    return 0.1 ** sum(step >= drop * total for drop in recipe.drops)


class SteadyAdamW(torch.optim.AdamW):
    """AdamW that first clips the gradient of each tensor to a multiple of its own running norm.

    One norm over all tensors lets the largest gradients decide how far all others are clipped. Adam's steps do not
    depend on the scale of a tensor's gradient, only on how it compares with those of the steps before.

    Args:
        clip: the multiple. The running norm is the root of the sum of Adam's second moments.
    """

    def __init__(self, params: Any, clip: float, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.clip = clip

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip, then step."""
        for group in self.param_groups:
            known = [p for p in group["params"] if p.grad is not None and self.state[p]]
            if not known:
                continue
            moments = torch._foreach_norm([self.state[p]["exp_avg_sq"] for p in known], 1)
            for parameter, moment in zip(known, moments, strict=True):
                past = 1 - group["betas"][1] ** self.state[parameter]["step"]
                limit = self.clip * (moment / past.to(moment.device)).sqrt()
                parameter.grad.mul_((limit / parameter.grad.norm().clamp(min=1e-20)).clamp(max=1.0))
        return super().step(closure)
