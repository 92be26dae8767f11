"""Multi-scale deformable attention in its two forms, and the post-norm transformer layer built around it.

Zhu et al. 2021 (arXiv 2010.04159) for the plain form; Shi et al. 2022 (PETR, CVPR) for pose attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hpetr.model.config import HPetrConfig
from hpetr.model.host import to_device
from hpetr.model.ops import deformable_sampling


def softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax over the last axis.

    It is written out for inference on the CPU with rows that do not fill whole vectors. 25,872 rows of 12 numbers take
    0.5 ms, and 3.5 ms in torch, a twenty-fifth of h-petr-nano's time. Rows of 16 numbers take 0.3 ms in torch.
    """
    if torch.is_grad_enabled() or logits.device.type != "cpu" or logits.shape[-1] % 16 == 0:
        return logits.softmax(-1, dtype=dtype)
    shares = (logits.to(dtype) - logits.amax(-1, keepdim=True)).exp_()
    return shares.div_(shares.sum(-1, keepdim=True))


class DeformableAttention(nn.Module):
    """Plain deformable attention: every head samples P points of each level around the query's reference point.

    The value projection is a separate step (`project_value`): one projection of an image serves any number of queries.
    """

    def __init__(self, config: HPetrConfig, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = config.num_heads, num_levels, num_points
        samples = config.num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(config.d_model, samples * 2)
        self.attention_weights = nn.Linear(config.d_model, samples)
        self.value_proj = nn.Linear(config.d_model, config.d_model)
        self.output_proj = nn.Linear(config.d_model, config.d_model)

    def project_value(self, memory: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Project memory (B, S, D) to the value (B, S, heads, D / heads), zero where `padding_mask` (B, S) is true."""
        value = self.value_proj(memory)
        if padding_mask is not None:
            value = value.masked_fill_(padding_mask[..., None], 0.0)
        return value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D / M)

    def forward(
        self, query: Tensor, references: Tensor, value: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Sample the value around the references.

        Args:
            query: (B, Q, D), position included.
            references: (B, Q, L, R, 2) x, y in the padded map of each level; R = 1 here, K in pose attention. Float32
                or float64, also under autocast: bfloat16 cannot tell neighboring cells apart.
            value: (B, S, heads, D / heads) from `project_value`.
            spatial_shapes: (H, W) of every level; S is the sum of their products.
        Returns:
            (B, Q, D)
        """
        batch, length, _ = query.shape
        shape = (batch, length, self.num_heads, self.num_levels, self.num_points)
        precise = references.dtype
        offsets = self.sampling_offsets(query).to(precise).view(*shape, 2)  # (B, Q, M, L, P, 2)
        weights = softmax(self.attention_weights(query).view(*shape[:3], -1), precise)  # (B, Q, M, L * P)
        weights = weights.view(shape)
        locations = self.sampling_locations(offsets, references, spatial_shapes)
        return self.output_proj(deformable_sampling(value, spatial_shapes, locations, weights))

    def sampling_locations(self, offsets: Tensor, references: Tensor, spatial_shapes: list[tuple[int, int]]) -> Tensor:
        """Return references plus offsets in cells of the level: (B, Q, M, L, P, 2)."""
        cells = to_device(
            torch.tensor([(w, h) for h, w in spatial_shapes], dtype=offsets.dtype), offsets.device
        )  # (L, 2)
        return self.per_point(references)[:, :, None] + offsets / self.per_point(cells[:, None])

    def per_point(self, x: Tensor) -> Tensor:
        """Expand (..., 1 or P, 2) to (..., P, 2), copied: broadcasting over the short inner axes halves the speed."""
        return x.expand(*x.shape[:-2], self.num_points, 2).contiguous()

    def initial_offsets(self) -> Tensor:
        """Return the initial offset bias: head h points to angle 2 pi h / heads, with larger coordinate p + 1."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # (M, 2)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        bias = ring[:, None, None] * steps[:, None]  # (M, 1, P, 2)
        return bias.expand(-1, self.num_levels, -1, -1).flatten()


class PoseAttention(DeformableAttention):
    """Deformable attention whose point p belongs to keypoint p; offsets are in half-extents of the pose (P = K)."""

    def sampling_locations(self, offsets: Tensor, references: Tensor, spatial_shapes: list[tuple[int, int]]) -> Tensor:
        """Return references (B, Q, L, K, 2) plus offsets: (B, Q, M, L, K, 2); a pose's extent is at least 1e-4."""
        extent = (references.amax(-2, keepdim=True) - references.amin(-2, keepdim=True)).clamp(min=1e-4)
        return references[:, :, None] + offsets * self.per_point(extent * 0.5)[:, :, None]

    def initial_offsets(self) -> Tensor:
        """Return zeros: every keypoint first samples its own reference."""
        return torch.zeros(self.num_heads * self.num_levels * self.num_points * 2)


class FeedForward(nn.Module):
    """Linear, ReLU, Linear, with dropout after each; the caller adds the residual."""

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(d_model, hidden)
        self.linear2 = nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.linear1(x).relu_())))  # in place: a pass over 80 MB less


class DeformableLayer(GradientCheckpointingLayer):
    """One post-norm layer: [self-attention,] deformable attention, FFN; a residual and a LayerNorm around each.

    Encoder layers have no self-attention besides deformable attention. With gradient checkpointing a layer keeps only
    its inputs and is recomputed in the backward pass.
    """

    attention: DeformableAttention

    def __init__(self, config: HPetrConfig, attention: DeformableAttention, ffn_dim: int, *, self_attention: bool):
        super().__init__()
        width = config.d_model
        if self_attention:
            self.self_attention = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
            self.self_attention_dropout = nn.Dropout(config.dropout)
            self.self_attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.attention_dropout = nn.Dropout(config.deformable_dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_dim, config.dropout)
        self.ffn_norm = nn.LayerNorm(width)

    def attend_to_each_other(self, x: Tensor, position: Tensor, groups: list[int] | int) -> Tensor:
        """Apply self-attention within groups of consecutive queries.

        Attention group by group equals one attention under a block mask, at a fraction of its Q x Q cost.

        Args:
            x: (B, Q, D).
            position: (B, Q, D).
            groups: the groups' sizes, or one size for all of them.

        Returns:
            (B, Q, D)
        """
        if isinstance(groups, int):
            parts = [tuple(t.reshape(-1, groups, t.shape[-1]) for t in (x, position))]  # (B * Q / size, size, D)
        else:
            parts = list(zip(x.split(groups, 1), position.split(groups, 1), strict=True))
        outputs = []
        for part, offset in parts:
            keys = part + offset
            outputs.append(self.self_attention(keys, keys, part, need_weights=False)[0])
        attended = torch.cat(outputs, 1).reshape(x.shape)
        return self.self_attention_norm(x + self.self_attention_dropout(attended))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Tensor,
        padding_mask: Tensor | None,
        spatial_shapes: list[tuple[int, int]],
        groups: list[int] | int | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: (B, Q, D).
            position: (B or 1, Q, D).
            references: see `DeformableAttention.forward`.
            memory: (B, S, D) tokens to sample from.
            padding_mask: (B, S), true on padding; None without padding.
            spatial_shapes: (H, W) of every level.
            groups: for layers with self-attention, see `attend_to_each_other`.

        Returns:
            (B, Q, D)
        """
        if groups is not None:
            x = self.attend_to_each_other(x, position, groups)
        value = self.attention.project_value(memory, padding_mask)
        return self.attend_to_image(x, position, references, value, spatial_shapes)

    def attend_to_image(
        self, x: Tensor, position: Tensor, references: Tensor, value: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Apply deformable attention and FFN: x, position (B, Q, D) and value (B, S, heads, D / heads) -> (B, Q, D)."""
        attended = self.attention(x + position, references, value, spatial_shapes)
        x = self.attention_norm(x + self.attention_dropout(attended))
        return self.ffn_norm(x + self.ffn(x))


class DeformableLayers(nn.ModuleList):
    """A list of `DeformableLayer`s, typed for type checkers."""

    def __iter__(self) -> Iterator[DeformableLayer]:
        return cast("Iterator[DeformableLayer]", super().__iter__())
