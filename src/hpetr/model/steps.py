"""Steps: how the offsets that a head predicts move keypoints.

Coordinates are x, y with 1 = the unpadded image's width and height. `LogitSteps` is the published form.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hpetr.model.grid import Grid


class Steps(Protocol):
    """The meaning of predicted offsets."""

    def token_unit(self, grid: Grid) -> Tensor | None:
        """Return the unit of each token's offsets, (B, S, 2); None where there is none."""

    def place(self, centers: Tensor, offsets: Tensor, unit: Tensor | None) -> Tensor:
        """Return the keypoints (..., K, 2) of proposals with centers (..., 2), offsets (..., K, 2), unit (..., 2)."""

    def move_poses(self, poses: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        """Return poses (B, Q, K, 2) moved by offsets of the same shape."""

    def move_keypoints(self, keypoints: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        """Return keypoints (B, Q, 2), each by itself, moved by offsets of the same shape."""


class LogitSteps:
    """Offsets are added to the logit of a coordinate, as in Deformable DETR (Zhu et al. 2021).

    Args:
        eps: smallest distance of a coordinate from 0 and 1.
    """

    def __init__(self, eps: float = 1e-5):
        self.eps = eps

    def token_unit(self, grid: Grid) -> None:
        """Return None: a logit has no unit."""

    def place(self, centers: Tensor, offsets: Tensor, unit: Tensor | None) -> Tensor:
        """Add offsets to the logits of the centers.

        The logit of the image's far corner is infinite: whatever the offset, such a token predicts the corner.
        """
        return (offsets + (centers / (1 - centers)).log()[..., None, :]).sigmoid()

    def move_poses(self, poses: Tensor, offsets: Tensor, grid: Grid) -> Tensor:
        """Add offsets to the logits of the poses."""
        return (offsets + inverse_sigmoid(poses, self.eps)).sigmoid()

    move_keypoints = move_poses


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(x / (1 - x)), with both parts at least eps; written out because OpenVINO has no logit."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()
