"""The decoder of Group Pose (Liu et al., ICCV 2023, arXiv 2308.07313): K keypoint queries and an instance query a pose.

Coordinates are x, y with 1 = the unpadded image's width and height. Slot 0 of a pose is its instance query, slots 1 to
K are its keypoint queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hpetr.model.attention import DeformableAttention, FeedForward
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid, sine_encoding
from hpetr.model.groups import QueryGroup
from hpetr.model.proposals import KeypointHead, Predictions, Proposals, ProposingDecoder, outside_autocast
from hpetr.model.queries import consecutive_sizes, image_index
from hpetr.model.steps import LogitSteps


class GroupLayer(GradientCheckpointingLayer):
    """Attention within each pose, across poses, and to the image; an FFN; a residual and a LayerNorm around each.

    As published, positions are added to the queries themselves: they reach keys, values and residuals, too.
    """

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width, heads = config.d_model, config.num_heads
        self.within_attention = nn.MultiheadAttention(width, heads, config.dropout, batch_first=True)
        self.within_norm = nn.LayerNorm(width)
        self.across_attention = nn.MultiheadAttention(width, heads, config.dropout, batch_first=True)
        self.across_norm = nn.LayerNorm(width)
        self.attention = DeformableAttention(config, config.num_feature_levels, config.num_points)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, config.decoder_ffn_dim, config.dropout)
        self.ffn_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.deformable_dropout)

    def forward(
        self, x: Tensor, positions: Tensor, references: Tensor, memory: Tensor, grid: Grid, sizes: list[int]
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: (B, Q, K + 1, D).
            positions: (B, Q, K + 1, D), 0 for the instance queries.
            references: (B, Q, K + 1, 2).
            memory: (B, S, D).
            grid: of the memory's tokens.
            sizes: number of poses of each query group; no group attends to another one.

        Returns:
            (B, Q, K + 1, D)
        """
        batch, poses, slots, width = x.shape
        x = (x + positions).flatten(0, 1)  # (B * Q, K + 1, D)
        x = self.within_norm(x + self.within_attention(x, x, x, need_weights=False)[0])
        x = x.view(batch, poses, slots, width).transpose(1, 2)  # (B, K + 1, Q, D)
        groups = [part.flatten(0, 1) for part in x.split([size for size in sizes if size], 2)]  # (B * (K + 1), Q_g, D)
        across = [self.across_norm(g + self.across_attention(g, g, g, need_weights=False)[0]) for g in groups]
        x = torch.cat(across, 1).view(batch, slots, poses, width).transpose(1, 2)
        x = (x + positions).flatten(1, 2)  # (B, Q * (K + 1), D)
        value = self.attention.project_value(memory, grid.padding_mask)
        scaled = grid.scale_references(references.flatten(1, 2)[:, :, None])
        x = self.attention_norm(x + self.dropout(self.attention(x, scaled, value, grid.spatial_shapes)))
        return self.ffn_norm(x + self.ffn(x)).view(batch, poses, slots, width)


class GroupDecoder(ProposingDecoder):
    """Proposals from the encoder's tokens, and decoder layers over keypoint queries.

    Each layer has its own heads for classes and keypoints; the last heads are those of the proposals.

    Args:
        config: sizes of the layers.
    """

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width, joints = config.d_model, config.num_keypoints
        self.steps = LogitSteps(eps=1e-3)
        self.keypoint_embedding = nn.Embedding(joints, width)
        self.instance_embedding = nn.Embedding(1, width)
        self.position_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.proposal_proj = nn.Linear(width, width)
        self.proposal_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(GroupLayer(config) for _ in range(config.decoder_layers))
        columns = len(config.id2label or {}) + config.leading_columns
        self.class_heads = nn.ModuleList(nn.Linear(width, columns) for _ in range(config.decoder_layers + 1))
        self.keypoint_heads = nn.ModuleList(KeypointHead(width, width, 2, 2) for _ in range(config.decoder_layers))
        self.keypoint_heads.append(KeypointHead(width, config.keypoint_head_dim, joints * 2, 3))

    def forward(
        self, memory: Tensor, grid: Grid, proposals: Proposals, groups: Sequence[QueryGroup]
    ) -> tuple[Predictions, list[int]]:
        """Return the poses of every layer; see `PoseDecoder.forward`.

        The published predictions of all layers but the last contain the next layer's positions: the official code adds
        positions in place, before the heads run. The references that enter a layer are detached, those that its
        prediction adds to are not.
        """
        sizes = consecutive_sizes(groups, memory.shape[1])
        # Two class columns may rank a token; each proposal is one pose.
        best = proposals.logits.amax(-1).topk(sum(sizes), dim=1).indices  # (B, Q)
        image = image_index(best)
        selected = Predictions(proposals.logits[image, best], proposals.keypoints_at(image, best))
        tokens = proposals.features[image, best].detach()  # (B, Q, D)
        keypoint_queries = tokens[:, :, None] + self.keypoint_embedding.weight  # (B, Q, K, D)
        instance_queries = self.instance_embedding.weight.expand(*tokens.shape[:2], 1, -1)
        x = torch.cat([instance_queries, keypoint_queries], 2)  # (B, Q, K + 1, D)
        keypoints = selected.keypoints.detach()
        entering = before = attached = keypoints  # `entering` has the same values, attached to the layer before
        logits, predicted = [], []
        for number, layer in enumerate(self.layers):
            positions = self.positions(keypoints, grid)
            if number > 0:
                predicted.append(self.move(number - 1, entering, before + positions, grid))
                entering = attached
            references = torch.cat([keypoints.mean(2, keepdim=True), keypoints], 2)
            x = layer(x, F.pad(positions, (0, 0, 1, 0)), references, memory, grid, sizes)
            before = x[:, :, 1:]
            logits.append(outside_autocast(self.class_heads[number], x[:, :, 0]))
            attached = self.move(number, keypoints, before, grid)
            keypoints = attached.detach()
        predicted.append(self.move(number, entering, before, grid))
        proposals.selected = selected
        return Predictions(torch.stack(logits), torch.stack(predicted)), sizes

    def positions(self, keypoints: Tensor, grid: Grid) -> Tensor:
        """Return the position embedding (B, Q, K, D) of keypoints (B, Q, K, 2), from the finest level's padded map."""
        places = grid.scale_references(keypoints.flatten(1, 2)[:, :, None])[:, :, 0, 0]  # (B, Q * K, 2)
        encoding = sine_encoding(places.flip(-1), self.keypoint_embedding.embedding_dim // 2).flatten(-2)  # y, then x
        positions = self.position_head(encoding.to(self.keypoint_embedding.weight.dtype))
        return positions.view(*keypoints.shape[:3], -1)

    def move(self, layer: int, keypoints: Tensor, queries: Tensor, grid: Grid) -> Tensor:
        """Return keypoints (B, Q, K, 2) moved by a layer's head of keypoint queries (B, Q, K, D)."""
        return self.steps.move_poses(keypoints, self.keypoint_heads[layer](queries), grid)
