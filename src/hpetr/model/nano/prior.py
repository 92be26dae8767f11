"""The prior: poses that a backbone knows by itself.

A pose network in the style of CenterNet (Zhou et al. 2019, "Objects as Points") has a map of people's centers, the
offsets from a center to each keypoint, and a heatmap of each keypoint. `PosePrior` reads them off the backbone's finest
maps with one 1x1 convolution. A model then starts from poses that are right, and learns what is missing: who is one
person, what is hidden, and the last pixels. The convolution is trained like any other; with a backbone that knows no
poses it starts from zeros and changes nothing until it has learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.host import to_device
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.proposals import Proposals, outside_autocast

# The logit of a center or a keypoint where nothing is known.
FLOOR = math.log(0.01 / 0.99)
# Of `Prior.place_loss`: an exponent that makes the softmax over cells nearly choose the best one; the least likelihood
# of a keypoint, which bounds the gradient of those far from every cell; and the fit of cells outside the map, finite
# because a whole search may be outside.
PLACE_SHARPNESS, MIN_LIKELIHOOD, OUTSIDE = 2.0, 1e-3, -1e4


def similarity_to_likelier(poses: Tensor, logits: Tensor, sigmas: Tensor, area_of_extent: float) -> Tensor:
    """Return each pose's largest OKS with any likelier pose of its image, 0 to 1: (B, Q).

    Args:
        poses: (B, Q, K, 2) in units of one length.
        logits: (B, Q); of equal ones the first is the likelier.
        sigmas: (K,).
        area_of_extent: a person's area as a share of the extent of its keypoints.
    """
    extent = poses.amax(-2) - poses.amin(-2)  # (B, Q, 2)
    area = extent.prod(-1).clamp(min=1e-6) * area_of_extent
    scale = (2 * (2 * sigmas) ** 2)[:, None, None]  # (K, 1, 1)
    x, y = poses.permute(3, 0, 2, 1)  # each (B, K, Q)
    difference = (x[..., None] - x[..., None, :]) ** 2 + (y[..., None] - y[..., None, :]) ** 2  # (B, K, Q, Q)
    # Not below -80: smaller exponentials are subnormal numbers, which take ten times as long.
    similarity = (-difference / (area[:, None, None] * scale)).clamp(min=-80).exp().sum(1)
    rank = torch.arange(poses.shape[1], device=poses.device)
    likelier = (logits[:, None] > logits[:, :, None]) | (
        (logits[:, None] == logits[:, :, None]) & (rank[None, :] < rank[:, None])
    )
    return (similarity / len(sigmas) * likelier).amax(-1)


@dataclass
class PriorMaps:
    """The prior over one map of the backbone, which has 2 x 2 cells for each token of its level.

    Attributes:
        centers: (B, C, H, W) logits.
        steps: (B, 2 K, H, W) x, y from a cell's center to each keypoint, in cells.
        heat: (B, K, H, W) logits.
        offsets: (B, 2 K, H, W) x, y from a cell's center to the keypoint in it, in cells.
    """

    centers: Tensor
    steps: Tensor
    heat: Tensor
    offsets: Tensor

    def at_tokens(self, prominence: float) -> tuple[Tensor, Tensor]:
        """Return class logits (B, H_l * W_l, C) and steps (B, H_l * W_l, 2 K), in cells of this map, of the tokens.

        A token takes the largest center logit of its four cells, and the mean of their steps.
        """
        best = F.max_pool2d(self.centers, 2, ceil_mode=True)
        best = best + prominence * (best - F.max_pool2d(best, 3, 1, 1))
        steps = F.avg_pool2d(self.steps, 2, ceil_mode=True, count_include_pad=False)
        logits, steps = (x.flatten(2).transpose(1, 2) for x in (best, steps))
        return logits, steps


@dataclass
class GuidedProposals(Proposals):
    """Proposals that start from a prior."""

    prior: Prior = field(kw_only=True)


@dataclass
class Prior:
    """The prior over all tokens, and its keypoint maps, the finest level's first.

    Attributes:
        logits: (B, S, C) class logits.
        steps: (B, S, 2 K) x, y to each keypoint, in half cells of the token's level.
        heat: (B, K, H, W) logits of every level that has them, as in `PriorMaps`.
        offsets: (B, 2 K, H, W) of the same levels.
        settings: numbers of the computation.
    """

    logits: Tensor
    steps: Tensor
    heat: Sequence[Tensor]
    offsets: Sequence[Tensor]
    settings: NanoSettings

    @classmethod
    def from_maps(cls, maps: Sequence[PriorMaps], shapes: Sequence[tuple[int, int]], settings: NanoSettings) -> Prior:
        """Return the prior of the finest levels' maps; further levels of `shapes` (H_l, W_l) have none.

        With several levels, each one loses logit for people whose size belongs to another level.
        """
        border = math.log(settings.border_size)
        logits, steps = [], []
        for level, one in enumerate(maps):
            own_logits, own_steps = one.at_tokens(settings.prominence)
            if len(maps) > 1:
                places = own_steps.unflatten(-1, (-1, 2))
                extent = (places.amax(-2) - places.amin(-2)).clamp(min=1e-3)  # (B, H_l * W_l, 2) in half cells
                size = extent.log().mean(-1, keepdim=True)
                if level > 0:
                    own_logits = own_logits + F.logsigmoid((size - border) / settings.border_width)
                if level < len(maps) - 1:
                    own_logits = own_logits + F.logsigmoid((border + math.log(2) - size) / settings.border_width)
            logits.append(own_logits)
            steps.append(own_steps)
        rest = sum(height * width for height, width in shapes[len(maps) :])
        return cls(
            F.pad(torch.cat(logits, 1), (0, 0, 0, rest), value=FLOOR),
            F.pad(torch.cat(steps, 1), (0, 0, 0, rest)),
            [one.heat for one in maps],
            [one.offsets for one in maps],
            settings,
        )

    def guide(self, proposals: Proposals) -> GuidedProposals:
        """Return the proposals with the prior's logits and steps added to them."""
        logits = torch.where(proposals.valid, self.logits, FLOOR)
        guided = vars(proposals) | {
            "logits": proposals.logits + logits,
            "first_logits": logits.detach(),
            "first_offsets": self.steps.masked_fill(~proposals.valid, 0.0) / 2,
        }
        return GuidedProposals(**guided, prior=self)

    def finest_heatmap(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Return the finest level's heatmap logits (B, K, H, W), and its padding (B, H, W) or None without padding."""
        logits, padding = self.heat[0], grid.first_level().padding_mask
        if padding is None:
            return logits, None
        padding = padding.unflatten(-1, grid.spatial_shapes[0]).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return logits, padding[:, : logits.shape[-2], : logits.shape[-1]]

    def snap(self, poses: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
        """Return poses with every keypoint at the best place nearby in the heatmaps of the level that proposed them.

        A place is chosen, not weighed: there is no gradient to it. Poses of levels without maps snap to the last maps.

        Args:
            poses: (B, Q, K, 2), 1 = the unpadded image's width and height.
            tokens: (B, Q) index of the token that proposed each.
        """
        levels, end = len(self.heat), 0
        level = torch.zeros_like(tokens)
        for height, width in grid.spatial_shapes[: levels - 1]:
            end = end + height * width
            level = level + (tokens >= end)
        heat = _Stack.from_maps(self.heat, level)
        sides = torch.stack([heat.width, heat.height], -1)[:, 0, :, 0]  # (B, Q, 2)
        ratios = grid.valid_ratios[:, :levels].gather(1, level[..., None].expand(-1, -1, 2))
        size = (ratios * sides)[:, :, None]  # (B, Q, 1, 2)
        places = poses * size  # in cells, 0 = the image's edge
        extent = places.amax(-2) - places.amin(-2)  # (B, Q, 2)
        half = (extent[..., 0] * extent[..., 1]).sqrt() / 2
        spread = (half * self.settings.spread).clamp(min=self.settings.min_spread)[:, None, :, None]  # (B, 1, Q, 1)
        blocks = _Stack.from_maps([F.max_pool2d(x, 2, ceil_mode=True) for x in self.heat], level)
        row, column = self._best_cells(heat, blocks, places.transpose(1, 2), spread)  # (B, K, Q, 1)
        found = self._mean_of_votes(heat, level, row, column).transpose(1, 2) / size
        seen = heat.at(row, column).sigmoid().transpose(1, 2) > self.settings.min_heat  # (B, Q, K, 1)
        return torch.where(seen, found.to(poses.dtype), poses)

    def place_loss(
        self, poses: Tensor, image: Tensor, tokens: Tensor, grid: Grid, likelihoods: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Return -log of the mean likelihood of the places that `snap` chooses from, (m, K).

        `snap` takes the best cell. Here each cell within its reach counts by a softmax of the same fit, and its offset
        gives the place. The heatmap learns which of these cells is right, and the offsets learn the place.

        Args:
            poses: (m, K, 2) proposals, 1 = the unpadded image's width and height.
            image: (m,) index of each pose's image.
            tokens: (m,) index of the token that proposed it. Tokens of levels without maps have no loss.
            grid: of the tokens.
            likelihoods: called with places (n, K, cells, 2), 1 = the unpadded image, and the indices (n,) of their
                poses; returns the logarithms (n, K, cells) of how right they are.
        """
        total, end = poses.new_zeros(poses.shape[:2]), 0
        for level, (heat, offsets) in enumerate(zip(self.heat, self.offsets, strict=True)):
            start, end = end, end + grid.spatial_shapes[level][0] * grid.spatial_shapes[level][1]
            chosen = ((tokens >= start) & (tokens < end)).nonzero()[:, 0]
            if not len(chosen):
                continue
            height, width = heat.shape[-2:]
            where = image[chosen]
            size = grid.valid_ratios[where, level] * poses.new_tensor([width, height])  # (n, 2) cells
            places = poses[chosen] * size[:, None]  # (n, K, 2)
            extent = places.detach().amax(1) - places.detach().amin(1)
            spread = ((extent[:, 0] * extent[:, 1]).sqrt() / 2 * self.settings.spread).clamp(
                min=self.settings.min_spread
            )[:, None, None]
            reach = torch.arange(-2 * self.settings.reach, 2 * self.settings.reach + 1, device=poses.device)
            columns, rows = (places[..., axis, None].detach().floor().long() + reach for axis in (0, 1))  # (n, K, r)
            inside = ((rows >= 0) & (rows < height))[..., :, None] & ((columns >= 0) & (columns < width))[..., None, :]
            away_x, away_y = (
                (cells + 0.5 - places[..., axis, None]) / spread for axis, cells in ((0, columns), (1, rows))
            )
            cells = (
                rows.clamp(0, height - 1)[..., :, None] * width + columns.clamp(0, width - 1)[..., None, :]
            ).flatten(2)
            keypoint = torch.arange(poses.shape[1], device=poses.device)
            fit = F.logsigmoid(heat.flatten(2).float()[where[:, None, None], keypoint[:, None], cells])  # (n, K, r * r)
            fit = fit - (away_y.square()[..., :, None] + away_x.square()[..., None, :]).flatten(2)
            fit = (fit * PLACE_SHARPNESS).masked_fill(~inside.flatten(2), OUTSIDE).log_softmax(-1)
            maps = offsets.unflatten(1, (-1, 2)).flatten(3).float()  # (B, K, 2, H * W)
            moves = maps[where[:, None, None], keypoint[:, None], :, cells]  # (n, K, r * r, 2)
            votes = torch.stack([cells % width, torch.div(cells, width, rounding_mode="floor")], -1) + 0.5 + moves
            likelihood = (fit + likelihoods(votes / size[:, None, None], chosen)).logsumexp(-1)
            floor = torch.full_like(likelihood, math.log(MIN_LIKELIHOOD))
            total = total.index_copy(0, chosen, -torch.logaddexp(likelihood, floor))
        return total

    def _best_cells(self, heat: _Stack, blocks: _Stack, places: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column (B, K, Q, 1) of the cells of heat that fit places (B, K, Q, 2) best.

        First the best block of 2 x 2 cells, then its best cell: a quarter of the places to weigh.
        """
        reach = torch.arange(-self.settings.reach, self.settings.reach + 1, device=places.device)
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
        """Return places (B, K, Q, 2) in cells: the mean of those that a cell (B, K, Q, 1) and its neighbors point to.

        AP75 on 200 train2017 images: the cell alone .388, with its neighbors .392.
        """
        step = torch.arange(-1, 2, device=row.device)
        rows = torch.minimum((row + step.repeat_interleave(3)).clamp(min=0), heat.height - 1)  # (B, K, Q, 9)
        columns = torch.minimum((column + step.repeat(3)).clamp(min=0), heat.width - 1)
        moves = torch.zeros((), device=row.device)
        for number, offsets in enumerate(self.offsets):
            # Each level's map is read in place: a copy of the maps would take longer than all else here.
            own = (level == number)[:, None, :, None]  # (B, 1, Q, 1)
            cells = ((rows * heat.width + columns) * own).permute(0, 2, 3, 1)  # (B, Q, 9, K)
            cells = cells.flatten(1, 2).repeat_interleave(2, 2)  # (B, Q * 9, 2 K): x and y of each keypoint
            found = offsets.permute(0, 2, 3, 1).flatten(1, 2).gather(1, cells).float()
            found = found.unflatten(2, (-1, 2)).unflatten(1, (-1, 9)).permute(0, 3, 4, 1, 2)  # (B, K, 2, Q, 9)
            moves = torch.where(own[:, :, None], found, moves)
        votes = torch.stack([columns, rows], 2) + 0.5 + moves
        weights = heat.at(rows, columns).sigmoid()[:, :, None]
        return ((votes * weights).sum(-1) / weights.sum(-1).clamp(min=1e-6)).transpose(2, 3)


@dataclass
class _Stack:
    """Maps of several levels one after the other, and which of them each query reads.

    Attributes:
        values: (B, C, cells of all levels), float32.
        start, height, width: (B, 1, Q, 1) of each query's map.
    """

    values: Tensor
    start: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def from_maps(cls, maps: Sequence[Tensor], level: Tensor) -> _Stack:
        """Stack maps (B, C, H_l, W_l); each query reads the map of its level (B, Q)."""
        start, shapes = 0, []
        for one in maps:
            height, width = one.shape[-2:]
            shapes.append([start, height, width])
            start = start + height * width
        table = to_device(torch.tensor(shapes), level.device)[level]  # (B, Q, 3)
        values = torch.cat([one.flatten(2) for one in maps], 2).float()
        return cls(values, *(x[:, None, :, None] for x in table.unbind(-1)))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return values (B, C, Q, ...) at rows and columns (B, C, Q, ...), which broadcast against each other."""
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
        """Return the bias that says: nothing seen, and no offset."""
        classes, _, joints, _ = self.sizes
        bias = torch.zeros(sum(self.sizes))
        bias[:classes] = FLOOR
        heat = classes + 2 * joints
        bias[heat : heat + joints] = FLOOR
        return bias

    def forward(self, x: Tensor) -> PriorMaps:
        """Return the prior's maps over a map (B, channels, H, W)."""
        return PriorMaps(*outside_autocast(self.projection, x).split(self.sizes, 1))
