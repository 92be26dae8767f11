"""The deformable encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpetr.model.attention import DeformableAttention, DeformableLayer, DeformableLayers
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid


class Encoder(nn.Module):
    """Deformable self-attention over all tokens; with one level, the encoder of the heatmap branch.

    Tokens of levels finer than `first_level`, which are most tokens, are read and not refined.
    """

    def __init__(self, config: HPetrConfig, num_layers: int, num_levels: int, first_level: int = 0):
        super().__init__()
        self.first_level = first_level
        self.layers = DeformableLayers(
            DeformableLayer(
                config,
                DeformableAttention(config, num_levels, config.num_points),
                config.encoder_ffn_dim,
                self_attention=False,
            )
            for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor, positions: Tensor, grid: Grid) -> Tensor:
        """Refine tokens (B, S, D) with positions (B or 1, S, D) to the memory (B, S, D)."""
        references = grid.scale_references(grid.centers[:, :, None])  # (B, S, L, 1, 2)
        start = sum(height * width for height, width in grid.spatial_shapes[: self.first_level])
        positions, references = positions[:, start:], references[:, start:]
        for layer in self.layers:
            refined = layer(tokens[:, start:], positions, references, tokens, grid.padding_mask, grid.spatial_shapes)
            tokens = torch.cat([tokens[:, :start], refined], 1) if self.first_level else refined
        return tokens
