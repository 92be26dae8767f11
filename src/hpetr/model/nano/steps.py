"""Steps in proportion to a person's size: the same pixels wherever the person stands and however large the image is."""

from __future__ import annotations

import torch
from torch import Tensor

from hpetr.model.grid import Grid
from hpetr.model.nano.settings import NanoSettings


class SizeSteps:
    """Offsets of proposals are in cells, of poses in shares of their half-extent, of keypoints in shares of a cell."""

    def __init__(self, settings: NanoSettings):
        self.settings = settings

    def token_unit(self, grid: Grid) -> Tensor:
        """Return the width and height of every token's cell, (B, S, 2)."""
        return grid.cells_of_tokens()

    def place(self, centers: Tensor, offsets: Tensor, unit: Tensor | None) -> Tensor:
        """Add offsets in units of the tokens' cells to their centers."""
        assert unit is not None
        return centers[..., None, :] + offsets * unit[..., None, :]

    def move_poses(self, poses: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        """Add offsets in units of `extent_share` x the pose's half-extent, which is at least a cell."""
        return poses + offsets * (half_extent(poses, grid.cells[:, None, :1]) * self.settings.extent_share)

    def move_keypoints(self, keypoints: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        """Add offsets in units of `cell_share` x the finest level's cell."""
        return keypoints + offsets * (grid.cells[:, :1] * self.settings.cell_share)


def half_extent(poses: Tensor, least: Tensor) -> Tensor:
    """Return half the width and height of poses (..., K, 2), at least `least`, as (..., 1, 2)."""
    return torch.maximum((poses.amax(-2, keepdim=True) - poses.amin(-2, keepdim=True)) / 2, least)
