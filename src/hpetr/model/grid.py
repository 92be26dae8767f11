"""Where the tokens of a batch lie, and their position encoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpetr.model.host import to_device


@dataclass
class Grid:
    """The geometry of a batch's tokens, which every deformable attention reads besides the features.

    Tensors are float32 or float64, whatever the features' dtype: half-precision coordinates miss their cell.

    Attributes:
        spatial_shapes: (H_l, W_l) of every level; S = sum of their products.
        padding_mask: (B, S), true on padding; None without padding.
        valid_ratios: (B, L, 2) unpadded share of each level's width and height.
        centers: (B, S, 2) x, y of every token's center, 1 = the *unpadded* image's width and height.
        cells: (B, L, 2) width and height of each level's cells, 1 = the unpadded image's.
        positions: (B, S, D) sine position encoding; (1, S, D) without padding.
    """

    spatial_shapes: list[tuple[int, int]]
    padding_mask: Tensor | None
    valid_ratios: Tensor
    centers: Tensor
    cells: Tensor
    positions: Tensor

    def scale_references(self, references: Tensor) -> Tensor:
        """Map references (B, Q, R, 2) of the unpadded image to every level's padded map, (B, Q, L, R, 2)."""
        if self.padding_mask is None:
            return references[:, :, None].expand(-1, -1, len(self.spatial_shapes), -1, -1)
        return references[:, :, None] * self.valid_ratios[:, None, :, None]

    def cells_of_tokens(self) -> Tensor:
        """Return the width and height of every token's cell, (B, S, 2)."""
        counts = [height * width for height, width in self.spatial_shapes]
        return torch.cat(
            [cell[:, None].expand(-1, n, -1) for cell, n in zip(self.cells.unbind(1), counts, strict=True)], 1
        )

    def first_level(self) -> Grid:
        """Return the grid of the finest level alone, for the heatmap branch."""
        height, width = self.spatial_shapes[0]
        size = height * width
        return Grid(
            spatial_shapes=self.spatial_shapes[:1],
            padding_mask=None if self.padding_mask is None else self.padding_mask[:, :size],
            valid_ratios=self.valid_ratios[:, :1],
            centers=self.centers[:, :size],
            cells=self.cells[:, :1],
            positions=self.positions[:, :size],
        )


def make_grid(
    maps: list[Tensor],
    masks: list[Tensor] | None,
    shares: Tensor | None = None,
    *,
    temperature: float = 10_000.0,
    offset: float = 0.5,
) -> Grid:
    """Return the grid of feature maps.

    Args:
        maps: (B, D, H_l, W_l) of every level.
        masks: (B, H_l, W_l) of every level, true on padding; None without padding.
        shares: (B, 2) unpadded share of the width and height. None counts whole cells of every level, as published: an
            edge within a cell is then up to half a cell off.
        temperature: of the position encoding.
        offset: subtracted from a cell's number, counted from 1, before it is encoded.
    """
    d_model, device = maps[0].shape[1], maps[0].device
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
    ratios, centers, cells, positions = [], [], [], []
    for level, (height, width) in enumerate(shapes):
        # Without padding every image of the batch has the same grid: one row serves all.
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=device) if masks is None else masks[level]
        size = to_device(torch.tensor([width, height], dtype=torch.float32), device)
        if shares is None or masks is None:
            valid = torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1).float()  # (B, 2) width, height
        else:
            valid = shares * size
        ratios.append(valid / size)
        xs = torch.arange(width, device=device) + 0.5
        ys = torch.arange(height, device=device) + 0.5
        places = torch.stack([xs.expand(height, width), ys[:, None].expand(height, width)], -1).flatten(0, 1)
        centers.append(places / (ratios[-1] * size)[:, None])  # (B, H * W, 2)
        cells.append(1 / valid)
        # The published models rank tokens on padding, too: theirs must have the published positions.
        shared = masks is None or shares is not None
        positions.append(sine_positions(mask, d_model // 2, temperature, offset, shared=shared))
    padding = None if masks is None else torch.cat([m.flatten(1) for m in masks], 1)
    batch = maps[0].shape[0]
    return Grid(
        spatial_shapes=shapes,
        padding_mask=padding,
        valid_ratios=torch.stack(ratios, 1).to(dtype).expand(batch, -1, -1),
        centers=torch.cat(centers, 1).to(dtype).expand(batch, -1, -1),
        cells=torch.stack(cells, 1).to(dtype).expand(batch, -1, -1),
        positions=torch.cat(positions, 1).to(dtype),
    )


def sine_positions(
    mask: Tensor, features_per_axis: int, temperature: float = 10_000.0, offset: float = 0.5, *, shared: bool = False
) -> Tensor:
    """Return the sine encoding of positions counted inside the image, y first, then x.

    Args:
        mask: (B, H, W), true on padding.
        features_per_axis: number of sines and cosines of each coordinate.
        temperature: ratio of the slowest and the fastest wavelength.
        offset: 0.5 encodes a cell's center, 0 its far edge.
        shared: compute the first row and column only, a thirtieth of the sines. Outside padding they equal all others.

    Returns:
        (B, H * W, 2 * features_per_axis), sin and cos interleaved (Carion et al. 2020; PETR has the offset 0.5).
    """
    inside = (~mask).float()
    parts = []
    for axis in (1, 2):
        count = (inside.narrow(3 - axis, 0, 1) if shared else inside).cumsum(axis)
        last = count[:, -1:] if axis == 1 else count[:, :, -1:]
        encoding = sine_encoding(
            (count - offset) / (last + 1e-6), features_per_axis, temperature
        )  # (B, H or 1, W or 1, features)
        parts.append(encoding.expand(*mask.shape, -1))
    return torch.cat(parts, -1).flatten(1, 2)


def sine_encoding(x: Tensor, features: int, temperature: float = 10_000.0) -> Tensor:
    """Return interleaved sines and cosines (..., features) of positions (...) in 0..1, from one turn to slow ones."""
    exponent = torch.arange(features, device=x.device) // 2 * 2 / features
    angle = (x * (2 * math.pi))[..., None] / temperature**exponent
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)
