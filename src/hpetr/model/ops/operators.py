"""Shapes and gradient of the operators of deformable sampling, whatever computes them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef


def complete_operators(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the output shapes of two operators, and `backward` as the gradient of `forward`.

    Args:
        forward: (value (B, S, M, D), sides, locations (B, Q, M, L, P, 2), weights (B, Q, M, L, P)) -> (B, Q, M*D).
        backward: (gradient of the output, and the same four) -> gradients of value, locations and weights.
    """

    @forward.register_fake
    def _(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    @backward.register_fake
    def _(
        grad_output: Tensor, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights))

    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        value, ctx.sides, locations, weights = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(value, locations, weights)

    def differentiate(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        value, locations, weights = ctx.saved_tensors
        grads = backward(grad_output, value, ctx.sides, locations, weights)
        return grads[0], None, grads[1], grads[2]

    forward.register_autograd(differentiate, setup_context=setup_context)
