"""What a backbone that knows poses says by itself: where people's middles and joints are.

A pose network of CenterNet's kind (Zhou et al. 2019, "Objects as Points") has a map of people's middles, the way from a
middle to each joint, and a heatmap of each joint. `PosePrior` reads them off the finest levels' maps with one 1x1
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

from hpetr.model.host import to_device

if TYPE_CHECKING:
    from hpetr.model.config import HPetrConfig
    from hpetr.model.encoder import Grid

# The logit of a middle or a joint where nothing is known.
FLOOR = math.log(0.01 / 0.99)
# A joint is where its heatmap, times a Gaussian about the place that the middle gives, is largest. The Gaussian's scale
# is SPREAD half extents of the pose (geometric mean of width and height), at least LEAST_SPREAD cells of the map, and
# the search ends REACH blocks of 2x2 cells away. Nothing below LEAST. MoveNet's own weight, 1 / (distance + 1.8 cells)
# within 7 cells, loses the limbs of large people: with it the AP of a model of one level on 289 COCO train2017 pictures
# (long side 448) was .373, with this .381; spreads of 0.8 and 0.9 gave .381 and .378. With two levels (long side 512) a
# reach of 8, 6 and 5 blocks gives .4174, .4173 and .4172, and 5 blocks are a third of the places of 8.
SPREAD, LEAST_SPREAD, REACH, LEAST = 0.7, 4.0, 5, 0.05
# A pose that repeats a likelier one loses up to so much of its logit, by a power of their OKS: neighbouring cells snap
# to the same joints. The AP of the untrained model on 90 development pictures was .261 without it, .306 with it (joints
# snapped as MoveNet does it).
REPETITION, REPETITION_POWER = 6.0, 4
AREA_OF_EXTENT = 0.7  # area of a person as a share of its joints' extent, about COCO's
# Of two levels, people of sqrt(width x height) below so many half cells of the coarser one are the finer one's: 112
# pixels where the coarser one's tokens are 16 wide. BORDER_WIDTH says how gradually. AP on the same pictures with 10,
# 14 and 20 half cells, before training: .4133, .4162, .4152.
LOG_BORDER, BORDER_WIDTH = math.log(14.0), 0.6
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
    scale = (2 * (2 * sigmas) ** 2)[:, None, None]  # (K, 1, 1)
    x, y = poses.permute(3, 0, 2, 1)  # each (B, K, Q)
    difference = (x[..., None] - x[..., None, :]) ** 2 + (y[..., None] - y[..., None, :]) ** 2  # (B, K, Q, Q)
    # Not below -80: the exponentials are no ordinary numbers there, and take ten times as long.
    similarity = (-difference / (area[:, None, None] * scale)).clamp(min=-80).exp().sum(1)
    rank = torch.arange(poses.shape[1], device=poses.device)
    likelier = (logits[:, None] > logits[:, :, None]) | (
        (logits[:, None] == logits[:, :, None]) & (rank[None, :] < rank[:, None])
    )
    return (similarity / len(sigmas) * likelier).amax(-1)


@dataclass
class PriorMaps:
    """What a prior says of one map of the backbone, which has two cells a side for each token of its level.

    Attributes:
        middles: (B, C, H, W) logits. steps: (B, 2 K, H, W) x, y from a cell's centre to each joint, in cells.
        heat: (B, K, H, W) logits. offsets: (B, 2 K, H, W) x, y from a cell's centre to the joint in it, in cells.
    """

    middles: Tensor
    steps: Tensor
    heat: Tensor
    offsets: Tensor

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """Class logits (B, H_l * W_l, C) and steps (B, H_l * W_l, 2 K), in cells of this map, of the level's tokens.

        Of a token's four cells the best middle counts, and the steps' mean.
        """
        best = F.max_pool2d(self.middles, 2, ceil_mode=True)
        best = best + PROMINENCE * (best - F.max_pool2d(best, 3, 1, 1))
        steps = F.avg_pool2d(self.steps, 2, ceil_mode=True, count_include_pad=False)
        logits, steps = (x.flatten(2).transpose(1, 2) for x in (best, steps))
        return logits, steps


@dataclass
class Prior:
    """What the prior says of all tokens, and its maps of joints, those of the finest level first.

    Attributes:
        logits: (B, S, C) class logits. steps: (B, S, 2 K) x, y to each joint, in half cells of the token's level.
        heat: (B, K, H, W) logits and offsets: (B, 2 K, H, W) of every level that has them, as in `PriorMaps`.
    """

    logits: Tensor
    steps: Tensor
    heat: Sequence[Tensor]
    offsets: Sequence[Tensor]

    @classmethod
    def of_maps(cls, maps: Sequence[PriorMaps], shapes: Sequence[tuple[int, int]]) -> Prior:
        """The prior of the finest levels' maps; the levels after these, of `shapes` (H_l, W_l), say nothing.

        With several levels each loses, of people whose size another one knows better, what it would claim of them.
        """
        logits, steps = [], []
        for level, one in enumerate(maps):
            own_logits, own_steps = one.of_tokens()
            if len(maps) > 1:
                places = own_steps.unflatten(-1, (-1, 2))
                extent = (places.amax(-2) - places.amin(-2)).clamp(min=1e-3)  # (B, H_l * W_l, 2) in half cells
                size = extent.log().mean(-1, keepdim=True)
                if level > 0:
                    own_logits = own_logits + F.logsigmoid((size - LOG_BORDER) / BORDER_WIDTH)
                if level < len(maps) - 1:
                    own_logits = own_logits + F.logsigmoid((LOG_BORDER + math.log(2) - size) / BORDER_WIDTH)
            logits.append(own_logits)
            steps.append(own_steps)
        rest = sum(height * width for height, width in shapes[len(maps) :])
        return cls(
            F.pad(torch.cat(logits, 1), (0, 0, 0, rest), value=FLOOR),
            F.pad(torch.cat(steps, 1), (0, 0, 0, rest)),
            [one.heat for one in maps],
            [one.offsets for one in maps],
        )

    def snap(self, poses: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
        """Poses with every joint at the best place near by in the heatmaps of the level that proposed them.

        For use without gradient: a place is chosen, not weighed. Poses of levels without maps snap to the last ones.

        Args:
            poses: (B, Q, K, 2), 1 = the unpadded picture. tokens: (B, Q) index of the token that proposed each.
        """
        levels, end = len(self.heat), 0
        level = torch.zeros_like(tokens)
        for height, width in grid.spatial_shapes[: levels - 1]:
            end = end + height * width
            level = level + (tokens >= end)
        heat = _Stack.of(self.heat, level)
        sides = torch.stack([heat.width, heat.height], -1)[:, 0, :, 0]  # (B, Q, 2)
        ratios = grid.valid_ratios[:, :levels].gather(1, level[..., None].expand(-1, -1, 2))
        size = (ratios * sides)[:, :, None]  # (B, Q, 1, 2)
        places = poses * size  # in cells, 0 = the picture's edge
        extent = places.amax(-2) - places.amin(-2)  # (B, Q, 2)
        half = (extent[..., 0] * extent[..., 1]).sqrt() / 2
        spread = (half * SPREAD).clamp(min=LEAST_SPREAD)[:, None, :, None]  # (B, 1, Q, 1)
        blocks = _Stack.of([F.max_pool2d(x, 2, ceil_mode=True) for x in self.heat], level)
        row, column = self._best_cells(heat, blocks, places.transpose(1, 2), spread)  # (B, K, Q, 1)
        found = self._mean_of_votes(heat, level, row, column).transpose(1, 2) / size
        seen = heat.at(row, column).sigmoid().transpose(1, 2) > LEAST  # (B, Q, K, 1)
        return torch.where(seen, found.to(poses.dtype), poses)

    @staticmethod
    def _best_cells(heat: _Stack, blocks: _Stack, places: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (B, K, Q, 1) of the cells of heat that fit places (B, K, Q, 2) best.

        First the best block of 2x2 cells, then its best cell: a quarter of the places to weigh.
        """
        reach = torch.arange(-REACH, REACH + 1, device=places.device)
        around, weights = [], []
        for axis, side in ((0, blocks.width), (1, blocks.height)):
            place = places[..., axis : axis + 1] / 2
            around.append(torch.minimum((place.floor().long() + reach).clamp(min=0), side - 1))  # (B, K, Q, n)
            weights.append((-((2 * (around[-1] + 0.5 - place) / spread) ** 2)).exp())
        columns, rows = around
        fit = blocks.at(rows[..., :, None], columns[..., None, :]).sigmoid()  # (B, K, Q, n, n)
        best = (fit * weights[0][..., None, :] * weights[1][..., None]).flatten(-2).argmax(-1, keepdim=True)
        line = torch.div(best, len(reach), rounding_mode="floor")
        row, column = rows.gather(-1, line), columns.gather(-1, best - line * len(reach))  # (B, K, Q, 1) of the block
        inner = torch.arange(2, device=places.device)
        row = torch.minimum(2 * row + inner.repeat_interleave(2), heat.height - 1)  # (B, K, Q, 4)
        column = torch.minimum(2 * column + inner.repeat(2), heat.width - 1)
        best = heat.at(row, column).argmax(-1, keepdim=True)
        return row.gather(-1, best), column.gather(-1, best)

    def _mean_of_votes(self, heat: _Stack, level: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Places (B, K, Q, 2) in cells that a cell (B, K, Q, 1) and its neighbours give by offsets, by their heat.

        AP75 on 200 train2017 pictures: the cell alone .388, with its neighbours .392.
        """
        step = torch.arange(-1, 2, device=row.device)
        rows = torch.minimum((row + step.repeat_interleave(3)).clamp(min=0), heat.height - 1)  # (B, K, Q, 9)
        columns = torch.minimum((column + step.repeat(3)).clamp(min=0), heat.width - 1)
        moves = torch.zeros((), device=row.device)
        for number, offsets in enumerate(self.offsets):
            # Of every level's map, as it lies in the memory: a copy of the maps would take longer than all else here.
            own = (level == number)[:, None, :, None]  # (B, 1, Q, 1)
            cells = ((rows * heat.width + columns) * own).permute(0, 2, 3, 1)  # (B, Q, 9, K)
            cells = cells.flatten(1, 2).repeat_interleave(2, 2)  # (B, Q * 9, 2 K): x and y of each joint
            found = offsets.permute(0, 2, 3, 1).flatten(1, 2).gather(1, cells).float()
            found = found.unflatten(2, (-1, 2)).unflatten(1, (-1, 9)).permute(0, 3, 4, 1, 2)  # (B, K, 2, Q, 9)
            moves = torch.where(own[:, :, None], found, moves)
        votes = torch.stack([columns, rows], 2) + 0.5 + moves
        weights = heat.at(rows, columns).sigmoid()[:, :, None]
        return ((votes * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)).transpose(2, 3)


@dataclass
class _Stack:
    """Maps of several levels one behind the other, and which of them each query reads.

    Attributes:
        values: (B, C, cells of all levels), float32. start, height, width: (B, 1, Q, 1) of each query's map.
    """

    values: Tensor
    start: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def of(cls, maps: Sequence[Tensor], level: Tensor) -> _Stack:
        """Of maps (B, C, H_l, W_l), each query's map by its level (B, Q)."""
        start, shapes = 0, []
        for one in maps:
            height, width = one.shape[-2:]
            shapes.append([start, height, width])
            start = start + height * width
        table = to_device(torch.tensor(shapes), level.device)[level]  # (B, Q, 3)
        values = torch.cat([one.flatten(2) for one in maps], 2).float()
        return cls(values, *(x[:, None, :, None] for x in table.unbind(-1)))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Values (B, C, Q, ...) at rows and columns (B, C, Q, ...), which broadcast against each other."""
        start, width = (x.reshape(x.shape[:3] + (1,) * (rows.ndim - 3)) for x in (self.start, self.width))
        cells = start + rows * width + columns
        return self.values.gather(2, cells.flatten(2)).view(cells.shape)


class PosePrior(nn.Module):
    """A 1x1 convolution from a map of the backbone, of half its level's stride, to `PriorMaps`; levels share it."""

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
