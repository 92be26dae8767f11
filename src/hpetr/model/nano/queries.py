"""Queries made of proposals: fewer of them than learned ones are enough for a small model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid, sine_encoding
from hpetr.model.groups import QueryGroup
from hpetr.model.host import to_device
from hpetr.model.nano.prior import GuidedProposals, similarity_to_likelier
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.nano.steps import half_extent
from hpetr.model.proposals import Proposals
from hpetr.model.queries import Start, image_index


class ProposalQueries(nn.Module):
    """The content of a query is its proposal's token; its position is made of its pose, in every layer.

    Every group starts from the best proposals, and a learned vector on the content tells the further groups from the
    first. The published queries of the second group take the proposals ranked behind the first group's: of the few
    tokens of a small model these are background.
    """

    name: ClassVar[str] = "proposal_queries"

    def __init__(self, config: HPetrConfig, groups: Sequence[QueryGroup]):
        super().__init__()
        width = config.d_model
        self.content = nn.Linear(width, width)
        self.content_norm = nn.LayerNorm(width)
        self.one_to_many = nn.Parameter(torch.zeros(width))
        self.position = nn.Sequential(
            nn.Linear(width + 2 * config.num_keypoints + 2, width), nn.ReLU(), nn.Linear(width, width)
        )

    def sizes(self, groups: Sequence[QueryGroup], tokens: int) -> list[int]:
        """Return the groups' sizes, each at most the number of tokens."""
        return [torch.sym_min(group.size, tokens) for group in groups]

    def start(self, proposals: Proposals, grid: Grid, sizes: list[int]) -> Start:
        """Start every group from the best proposals."""
        best = self.best_tokens(proposals, sizes)
        image = image_index(best)
        references = proposals.keypoints_at(image, best).detach()
        # Detached: the tokens' features learn from the losses of the proposals alone.
        content = self.content_norm(self.content(proposals.features[image, best].detach()))  # (B, Q, D)
        first, *others = content.split(sizes, 1)
        content = torch.cat([first, *(other + self.one_to_many for other in others)], 1)
        return Start(content, references, proposals.first_logits[image, best])

    @staticmethod
    def best_tokens(proposals: Proposals, sizes: list[int]) -> Tensor:
        """Return the tokens (B, Q) that the queries start from."""
        ranking = proposals.logits[..., 0]
        count = sizes[0] if len(sizes) == 1 else max(sizes)
        if torch.compiler.is_exporting():
            best = ranking.topk(count, dim=1).indices  # in ONNX the first of equal ones
        else:
            # Of equal tokens, as all at the border are, the first: topk takes any.
            best = ranking.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return torch.cat([best[:, :size] for size in sizes], 1)

    def positions(self, poses: Tensor) -> Tensor:
        """Encode the center, the shape and the size of poses (B, Q, K, 2) as (B, Q, D)."""
        center = (poses.amax(-2) + poses.amin(-2)) / 2  # (B, Q, 2)
        extent = half_extent(poses, poses.new_tensor(1e-3))  # (B, Q, 1, 2)
        shape = ((poses - center[..., None, :]) / extent).flatten(-2)  # (B, Q, 2 K)
        place = sine_encoding(center, self.content.in_features // 2).flatten(-2)  # (B, Q, D)
        return self.position(torch.cat([place, shape, extent.flatten(-2).log()], -1))


class PriorQueries(ProposalQueries):
    """Queries of a model with a `PosePrior`: their keypoints snap to its heatmaps, and repeated poses lose score."""

    def __init__(self, config: HPetrConfig, groups: Sequence[QueryGroup], settings: NanoSettings):
        super().__init__(config, groups)
        self.settings, self.sigmas = settings, tuple(config.skeleton["sigmas"])

    def start(self, proposals: Proposals, grid: Grid, sizes: list[int]) -> Start:
        """Start from snapped proposals."""
        assert isinstance(proposals, GuidedProposals)
        start = super().start(proposals, grid, sizes)
        snapped = proposals.prior.snap(start.references, self.best_tokens(proposals, sizes), grid).detach()
        assert isinstance(start.logits, Tensor)
        loss = self.repetition_loss(snapped[:, : sizes[0]], start.logits[:, : sizes[0]], grid)
        return Start(start.content, snapped, start.logits - F.pad(loss, (0, 0, 0, sum(sizes[1:]))))

    def repetition_loss(self, poses: Tensor, logits: Tensor, grid: Grid) -> Tensor:
        """Return the loss of class logit (B, Q, 1) of poses (B, Q, K, 2) that repeat likelier ones.

        Further groups lose nothing: one-to-many queries may repeat each other.

        Args:
            logits: (B, Q, C); the first class ranks the poses.
        """
        # In cells, which are square: shares of the image's width and height have different lengths.
        lengths = poses / grid.cells[:, None, :1]
        sigmas = to_device(torch.tensor(self.sigmas, dtype=lengths.dtype), lengths.device)
        similarity = similarity_to_likelier(lengths, logits[..., 0], sigmas, self.settings.area_of_extent)
        return (similarity**self.settings.repetition_power * self.settings.repetition)[..., None]
