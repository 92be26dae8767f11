"""The pose decoder: from the encoder's memory to poses.

Coordinates are x, y with 1 = the unpadded image's width and height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hpetr.model.attention import DeformableLayer, DeformableLayers, PoseAttention
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.groups import QueryGroup
from hpetr.model.proposals import KeypointHead, Predictions, Proposals, ProposingDecoder, outside_autocast
from hpetr.model.queries import Queries
from hpetr.model.steps import Steps


class PoseDecoder(ProposingDecoder):
    """Proposals from the encoder's tokens, and decoder layers that refine whole poses.

    Each layer has its own heads for classes and keypoints; the last heads are those of the proposals.

    Args:
        config: sizes of the layers.
        queries: the module that makes queries of proposals; it is registered under its own name.
        steps: what the keypoint heads' offsets mean.
    """

    def __init__(self, config: HPetrConfig, queries: Queries, steps: Steps):
        super().__init__()
        width, joints = config.d_model, config.num_keypoints
        self.num_joints, self.steps = joints, steps
        self.queries_name = queries.name
        self.add_module(queries.name, cast(nn.Module, queries))
        self.proposal_proj = nn.Linear(width, width)
        self.proposal_norm = nn.LayerNorm(width)
        self.layers = DeformableLayers(
            DeformableLayer(
                config,
                PoseAttention(config, config.num_feature_levels, joints),
                config.decoder_ffn_dim,
                self_attention=True,
            )
            for _ in range(config.decoder_layers)
        )
        heads = config.decoder_layers + 1
        self.class_heads = nn.ModuleList(nn.Linear(width, len(config.id2label or {})) for _ in range(heads))
        self.keypoint_heads = nn.ModuleList(
            KeypointHead(width, config.keypoint_head_dim, joints * 2, 3) for _ in range(heads)
        )

    @property
    def queries(self) -> Queries:
        """The module that makes the queries."""
        return cast(Queries, getattr(self, self.queries_name))

    def forward(
        self, memory: Tensor, grid: Grid, proposals: Proposals, groups: Sequence[QueryGroup]
    ) -> tuple[Predictions, list[int]]:
        """Return the poses of every layer.

        Args:
            memory: (B, S, D).
            grid: of the memory's tokens.
            proposals: from `propose`.
            groups: the query groups to run. No group sees another one: leaving one out changes nothing else.

        Returns:
            Predictions (layers, B, Q, ...), one group after the other, and the groups' sizes. An image with fewer
            tokens than queries leaves the last queries out.
        """
        sizes = self.queries.sizes(groups, memory.shape[1])
        start = self.queries.start(proposals, grid, sizes)
        x, references = start.content, start.references
        logits, keypoints = [], []
        for layer, class_head, keypoint_head in zip(self.layers, self.class_heads, self.keypoint_heads, strict=False):
            x = layer(
                x,
                self.queries.positions(references),
                grid.scale_references(references),
                memory,
                grid.padding_mask,
                grid.spatial_shapes,
                [size for size in sizes if size],
            )
            offsets = keypoint_head(x).unflatten(-1, (self.num_joints, 2))  # (B, Q, K, 2)
            logits.append(start.logits + outside_autocast(class_head, x))
            keypoints.append(self.steps.move_poses(references, offsets, grid))
            references = keypoints[-1].detach()
        return Predictions(torch.stack(logits), torch.stack(keypoints)), sizes
