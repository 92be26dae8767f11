"""What a backbone that knows poses says by itself: where people's middles and joints are.

A pose network of CenterNet's kind (Zhou et al. 2019, "Objects as Points") has a map of people's middles, the way from a
middle to each joint, and a heatmap of each joint. `PosePrior` reads them off the backbone's finest map with one 1x1
convolution, so that a model starts from poses that are right and learns what is missing: who is one person, what is
hidden, and the last pixels. The convolution is trained like any other; with a backbone that knows no poses, it starts
from zeros and changes nothing until it has learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from hpetr.model.config import HPetrConfig
    from hpetr.model.encoder import Grid

# The logit of a middle or a joint where nothing is known.
FLOOR = math.log(0.01 / 0.99)
# A joint is where its heatmap, times a Gaussian about the place that the middle gives, is largest. The Gaussian's scale
# is SPREAD half extents of the pose (geometric mean of width and height), at least LEAST_SPREAD cells of the map, and
# the search ends REACH blocks of 2x2 cells away. Nothing below LEAST. MoveNet's own weight, 1 / (distance + 1.8 cells)
# within 7 cells, loses the limbs of large people: with it the AP of the bundled model on 289 COCO train2017 pictures
# (long side 448) was .373, with this it is .381; spreads of 0.8 and 0.9 give .381 and .378.
SPREAD, LEAST_SPREAD, REACH, LEAST = 0.7, 4.0, 8, 0.05
# A pose that repeats a likelier one loses up to so much of its logit, by a power of their OKS: neighbouring cells snap
# to the same joints. The AP of the untrained model on 90 development pictures was .261 without it, .306 with it (joints
# snapped as MoveNet does it).
REPETITION, REPETITION_POWER = 6.0, 4
AREA_OF_EXTENT = 0.7  # area of a person as a share of its joints' extent, about COCO's
# A token beside the best one of its 3x3 neighbours loses so many times what it is behind.
PROMINENCE = 3.0


def repeated(poses: Tensor, logits: Tensor, sigmas: Tensor) -> Tensor:
    """How much each pose repeats a likelier one: the largest OKS with any of them, 0 to 1.

    Args:
        poses: (B, Q, K, 2) in units of one length. logits: (B, Q). sigmas: (K,).
    Returns:
        (B, Q); among equals the first is the likelier.
    """
    extent = poses.amax(-2) - poses.amin(-2)  # (B, Q, 2)
    area = extent.prod(-1).clamp(min=1e-6) * AREA_OF_EXTENT
    scale = 2 * (2 * sigmas) ** 2
    similarity = poses.new_zeros(())
    for k in range(len(sigmas)):  # one joint at a time: (B, Q, Q, K) numbers would take longer than all else here
        difference = (poses[:, :, None, k] - poses[:, None, :, k]).square().sum(-1)  # (B, Q, Q)
        similarity = similarity + (-difference / (area[:, None] * scale[k])).exp()
    rank = torch.arange(poses.shape[1], device=poses.device)
    likelier = (logits[:, None] > logits[:, :, None]) | (
        (logits[:, None] == logits[:, :, None]) & (rank[None, :] < rank[:, None])
    )
    return (similarity / len(sigmas) * likelier).amax(-1)


@dataclass
class PriorMaps:
    """The prior's maps, of twice the resolution of the finest tokens.

    Attributes:
        middles: (B, C, H, W) logits. steps: (B, 2 K, H, W) x, y from a cell's centre to each joint, in cells.
        heat: (B, K, H, W) logits. offsets: (B, 2 K, H, W) x, y from a cell's centre to the joint in it, in cells.
    """

    middles: Tensor
    steps: Tensor
    heat: Tensor
    offsets: Tensor

    def of_tokens(self, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Class logits (B, S, C) and steps (B, S, 2 K), in cells of this map, of all tokens.

        The levels after the finest say nothing. Of a token's four cells the best middle counts, and the steps' mean.
        """
        best = F.max_pool2d(self.middles, 2, ceil_mode=True)
        best = best + PROMINENCE * (best - F.max_pool2d(best, 3, 1, 1))
        steps = F.avg_pool2d(self.steps, 2, ceil_mode=True, count_include_pad=False)
        rest = sum(height * width for height, width in shapes[1:])
        logits, steps = (x.flatten(2).transpose(1, 2) for x in (best, steps))  # (B, H_0 * W_0, ...)
        return F.pad(logits, (0, 0, 0, rest), value=FLOOR), F.pad(steps, (0, 0, 0, rest))

    def snap(self, poses: Tensor, grid: Grid) -> Tensor:
        """Poses (B, Q, K, 2), 1 = the unpadded picture, with every joint at its heatmap's best place near by.

        For use without gradient: a place is chosen, not weighed.
        """
        height, width = self.heat.shape[-2:]
        size = grid.valid_ratios[:, :1] * torch.tensor([width, height], dtype=poses.dtype, device=poses.device)
        places = poses * size[:, None]  # (B, Q, K, 2) in cells, 0 = the picture's edge
        extent = places.amax(-2) - places.amin(-2)  # (B, Q, 2)
        half = (extent[..., 0] * extent[..., 1]).sqrt() / 2
        spread = (half * SPREAD).clamp(min=LEAST_SPREAD)[:, None, :, None]  # (B, 1, Q, 1)
        heat = self.heat.float()
        row, column = self._best_cells(heat, places.transpose(1, 2), spread)
        found = self._mean_of_votes(heat, row, column).transpose(1, 2) / size[:, None]  # (B, Q, K, 2)
        seen = heat.flatten(2).gather(2, row * width + column).sigmoid().transpose(1, 2)[..., None] > LEAST
        return torch.where(seen, found.to(poses.dtype), poses)

    @staticmethod
    def _best_cells(heat: Tensor, places: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (B, K, Q) of the cells of heat (B, K, H, W), logits, that fit places (B, K, Q, 2) best.

        First the best block of 2x2 cells, then its best cell: a quarter of the places to weigh.
        """
        height, width = heat.shape[-2:]
        blocks = F.max_pool2d(heat, 2, ceil_mode=True).sigmoid()
        reach = torch.arange(-REACH, REACH + 1, device=heat.device)
        around, weights = [], []
        for axis, side in ((0, blocks.shape[-1]), (1, blocks.shape[-2])):
            place = places[..., axis : axis + 1] / 2
            around.append((place.floor().long() + reach).clamp(0, side - 1))  # (B, K, Q, n)
            weights.append((-((2 * (around[-1] + 0.5 - place) / spread) ** 2)).exp())
        columns, rows = around
        near = (rows[..., :, None] * blocks.shape[-1] + columns[..., None, :]).flatten(2)
        fit = blocks.flatten(2).gather(2, near).view(*rows.shape, len(reach))  # (B, K, Q, n, n)
        best = (fit * weights[0][..., None, :] * weights[1][..., None]).flatten(-2).argmax(-1, keepdim=True)
        line = torch.div(best, len(reach), rounding_mode="floor")
        row, column = rows.gather(-1, line), columns.gather(-1, best - line * len(reach))  # (B, K, Q, 1) of the block
        inner = torch.arange(2, device=heat.device)
        row = (2 * row + inner.repeat_interleave(2)).clamp(max=height - 1)  # (B, K, Q, 4)
        column = (2 * column + inner.repeat(2)).clamp(max=width - 1)
        values = heat.flatten(2).gather(2, (row * width + column).flatten(2)).view_as(row)
        best = values.argmax(-1, keepdim=True)
        return row.gather(-1, best)[..., 0], column.gather(-1, best)[..., 0]

    def _mean_of_votes(self, heat: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Places (B, K, Q, 2) in cells that a cell (B, K, Q) and its neighbours give by their offsets, by their heat.

        AP75 on 200 train2017 pictures: the cell alone .388, with its neighbours .392.
        """
        batch, joints, height, width = heat.shape
        step = torch.arange(-1, 2, device=heat.device)
        rows = (row[..., None] + step.repeat_interleave(3)).clamp(0, height - 1)  # (B, K, Q, 9)
        columns = (column[..., None] + step.repeat(3)).clamp(0, width - 1)
        cells = (rows * width + columns).flatten(2)  # (B, K, Q * 9)
        offsets = self.offsets.float().view(batch, joints, 2, -1)
        offsets = offsets.gather(3, cells[:, :, None].expand(-1, -1, 2, -1)).view(batch, joints, 2, -1, 9)
        votes = torch.stack([columns, rows], 2) + 0.5 + offsets  # (B, K, 2, Q, 9)
        weights = heat.flatten(2).gather(2, cells).sigmoid().view(batch, joints, 1, -1, 9)
        return ((votes * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)).transpose(2, 3)


class PosePrior(nn.Module):
    """A 1x1 convolution from the backbone's finest map, of half the finest tokens' stride, to `PriorMaps`."""

    def __init__(self, config: HPetrConfig, channels: int):
        super().__init__()
        joints = config.num_keypoints
        self.sizes = [len(config.id2label or {}), 2 * joints, joints, 2 * joints]
        self.projection = nn.Conv2d(channels, sum(self.sizes), 1)

    def initial_bias(self) -> Tensor:
        """Nothing seen, and no step."""
        classes, _, joints, _ = self.sizes
        bias = torch.zeros(sum(self.sizes))
        bias[:classes] = FLOOR
        heat = classes + 2 * joints
        bias[heat : heat + joints] = FLOOR
        return bias

    def forward(self, x: Tensor) -> PriorMaps:
        """Map (B, channels, H, W) to its maps."""
        return PriorMaps(*self.projection(x).split(self.sizes, 1))
