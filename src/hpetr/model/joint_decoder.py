"""The joint decoder: refines each keypoint of a pose by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpetr.model.attention import DeformableAttention, DeformableLayer, DeformableLayers
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.proposals import KeypointHead
from hpetr.model.steps import Steps


class JointDecoder(nn.Module):
    """K queries for each pose, which attend to one another and to the pose's image.

    Args:
        config: sizes of the layers.
        steps: what the heads' offsets mean.
    """

    def __init__(self, config: HPetrConfig, steps: Steps):
        super().__init__()
        width = config.d_model
        self.steps = steps
        self.query_embedding = nn.Embedding(config.num_keypoints, 2 * width)  # position, then content
        self.layers = DeformableLayers(
            DeformableLayer(
                config,
                DeformableAttention(config, config.num_feature_levels, config.num_points),
                config.joint_decoder_ffn_dim,
                self_attention=True,
            )
            for _ in range(config.joint_decoder_layers)
        )
        self.heads = nn.ModuleList(KeypointHead(width, width, 2, 2) for _ in range(config.joint_decoder_layers))
        self.score_head = KeypointHead(width, width, 1, 1) if config.keypoint_scores else None

    def forward(self, memory: Tensor, grid: Grid, poses: Tensor) -> tuple[Tensor, Tensor | None]:
        """Refine poses.

        The value is projected once for each image; the T x K queries of all its poses sample that one projection.

        Args:
            memory: (B, S, D).
            grid: of the memory's tokens.
            poses: (B, T, K, 2).

        Returns:
            The poses after every layer (layers, B, T, K, 2), and the logits of the keypoint scores after the last one
            (B, T, K), or None for a model without keypoint scores.
        """
        batch, count, joints, _ = poses.shape
        per_image = (batch, count, joints, -1)
        position, x = (
            part.expand(per_image).reshape(batch, count * joints, -1)  # (B, T * K, D)
            for part in self.query_embedding.weight.chunk(2, -1)
        )
        references = poses.flatten(1, 2)  # (B, T * K, 2)
        outputs = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            scaled = grid.scale_references(references[:, :, None])
            x = layer(x, position, scaled, memory, grid.padding_mask, grid.spatial_shapes, joints)
            references = self.steps.move_keypoints(references, head(x), grid)
            outputs.append(references.view(batch, count, joints, 2))
            references = references.detach()
        scores = None if self.score_head is None else self.score_head(x).view(batch, count, joints)
        return torch.stack(outputs), scores
