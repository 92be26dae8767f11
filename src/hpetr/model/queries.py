"""Queries of the pose decoder: content, position, and the pose that each starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.groups import QueryGroup
from hpetr.model.proposals import Proposals


@dataclass
class Start:
    """Queries before the first layer.

    Attributes:
        content: (B, Q, D).
        references: (B, Q, K, 2) poses, detached; 1 = the unpadded image's width and height.
        logits: (B, Q, C) that every layer's class logits are added to, detached; 0 for the published queries.
    """

    content: Tensor
    references: Tensor
    logits: Tensor | float


class Queries(Protocol):
    """A module that makes queries.

    Attributes:
        name: of the module in the decoder, and so in checkpoints.
    """

    name: ClassVar[str]

    def sizes(self, groups: Sequence[QueryGroup], tokens: int) -> list[int]:
        """Return how many queries each group gets of `tokens` proposals."""

    def start(self, proposals: Proposals, grid: Grid, sizes: list[int]) -> Start:
        """Return the queries of all groups, one group after the other."""

    def positions(self, poses: Tensor) -> Tensor:
        """Return the position embedding (B, Q, D) of queries that stand at poses (B, Q, K, 2)."""


class LearnedQueries(nn.Embedding):
    """One learned content and position for each rank, as published.

    The groups share one ranking of the proposals: the second group takes those behind the first group's.
    """

    name: ClassVar[str] = "query_embedding"

    def __init__(self, config: HPetrConfig, groups: Sequence[QueryGroup]):
        super().__init__(sum(group.size for group in groups), 2 * config.d_model)  # position, then content

    def sizes(self, groups: Sequence[QueryGroup], tokens: int) -> list[int]:
        """Return the groups' sizes; see `consecutive_sizes`."""
        return consecutive_sizes(groups, tokens)

    def start(self, proposals: Proposals, grid: Grid, sizes: list[int]) -> Start:
        """Start from the best proposals."""
        best = proposals.logits[..., 0].topk(sum(sizes), dim=1).indices  # (B, Q)
        references = proposals.keypoints_at(image_index(best), best).detach()
        return Start(self._half(references, 1), references, 0.0)

    def positions(self, poses: Tensor) -> Tensor:
        """Return the learned positions, whatever the poses."""
        return self._half(poses, 0)

    def _half(self, poses: Tensor, half: int) -> Tensor:
        return self.weight[: poses.shape[1]].expand(poses.shape[0], -1, -1).chunk(2, -1)[half]  # (B, Q, D)


def consecutive_sizes(groups: Sequence[QueryGroup], tokens: int) -> list[int]:
    """Return the sizes of groups that share one ranking of tokens; with fewer tokens, the last queries are left out."""
    sizes: list[int] = []
    for group in groups:
        # Python's min would tie an exported graph to the traced image's side of the comparison.
        sizes.append(torch.sym_min(group.size, tokens - sum(sizes)))
    return sizes


def image_index(tokens: Tensor) -> Tensor:
    """Return the image (B, 1) of token indices (B, Q); not by len(), which would fix the batch of an export."""
    return torch.arange(tokens.shape[0], device=tokens.device)[:, None]
