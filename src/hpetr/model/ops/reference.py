"""Deformable sampling in plain torch, for any device and dtype; it is exportable and defines the result."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_sampling_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `hpetr.model.ops.deformable_sampling` with `F.grid_sample`, without its checks.

    Half-precision input is computed in float32, since 8 or 11 bits cannot address a pixel, and rounded at the end.
    """
    batch, _, heads, width = value.shape
    queries = sampling_locations.shape[1]
    if batch == 0 or queries == 0:
        # grid_sample refuses an empty batch; the sums keep the empty result in the autograd graph.
        empty = value.new_zeros(batch, queries, heads * width)
        return empty + (value.sum() + sampling_locations.sum() + attention_weights.sum()).to(value.dtype) * 0
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    grid = (2 * sampling_locations.to(compute_dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    weights = attention_weights.to(compute_dtype).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P)
    levels = value.to(compute_dtype).split([h * w for h, w in spatial_shapes], dim=1)
    output = grid.new_zeros(())
    for level, (h, w) in enumerate(spatial_shapes):
        maps = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)  # (B*M, D, H, W)
        sampled = F.grid_sample(maps, grid[:, :, level], padding_mode="zeros", align_corners=False)  # (B*M, D, Q, P)
        output = output + (sampled * weights[:, None, :, level]).sum(-1)  # (B*M, D, Q)
    output = output.reshape(batch, heads * width, queries).transpose(1, 2)  # (B, Q, M*D)
    return output.to(value.dtype).contiguous()
