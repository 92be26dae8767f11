"""Proposals, the pose decoder and the joint decoder: from memory to poses.

Coordinates are x, y with 1 = the unpadded picture's width and height; a "logit" of a coordinate is its inverse sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpetr.model.attention import DeformableAttention, DeformableLayer, DeformableLayers, PoseAttention
from hpetr.model.config import HPetrConfig
from hpetr.model.encoder import Grid

# Tokens nearer to the picture's border propose nothing: 1% as published, and a little, so that a centre at exactly 1%
# (on 50 or 150 cells) is outside however a runtime rounds its quotient.
BORDER = 0.01 + 1e-6


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both clamped to at least eps; written out because OpenVINO has no logit."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def outside_autocast(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` in the dtype of the module's weights.

    What becomes a coordinate or a score must not pass through bfloat16, whose 8 bits are 2 pixels of 640 and make
    thousands of tokens equally good.
    """
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return module(x)
    with torch.autocast(device, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


class KeypointHead(nn.Sequential):
    """An MLP of `depth` hidden layers with ReLU and a linear layer, whose result is a step in coordinates' logits."""

    def __init__(self, d_model: int, hidden: int, outputs: int, depth: int):
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(d_model if i == 0 else hidden, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self
        for layer in hidden:
            x = layer(x)
        return outside_autocast(last, x)


@dataclass
class Predictions:
    """Class logits (..., Q, C) and keypoints (..., Q, K, 2) of one layer or, stacked in front, of several."""

    logits: Tensor
    keypoints: Tensor


@dataclass
class Proposals:
    """A pose from every token, its keypoints computed only where they are asked for.

    Their MLP over all tokens costs as much as an encoder layer. Inference needs it for the N best tokens only; training
    for all of them in the matching, which takes no gradient, and with gradient for the matched ones.

    Attributes:
        logits: (B, S, C) class logits. features: (B, S, D).
        centre_logits: (B, S, 2) logit of each token's centre, infinite where a token has none.
        head: MLP from features to offsets (..., 2 K).
    """

    logits: Tensor
    features: Tensor
    centre_logits: Tensor
    head: nn.Module

    def keypoints_at(self, image: Tensor, token: Tensor) -> Tensor:
        """Keypoints (..., K, 2) of tokens of images, indices (...,) that broadcast."""
        offsets = self.head(self.features[image, token]).unflatten(-1, (-1, 2))  # (..., K, 2)
        return (offsets + self.centre_logits[image, token][..., None, :]).sigmoid()

    @torch.no_grad()
    def predictions(self) -> Predictions:
        """Logits (B, S, C) and keypoints (B, S, K, 2) of all tokens, without gradient."""
        offsets = self.head(self.features).unflatten(-1, (-1, 2))
        return Predictions(self.logits.detach(), (offsets + self.centre_logits[..., None, :]).sigmoid())


class PoseDecoder(nn.Module):
    """Proposals from the encoder's tokens, and decoder layers that refine whole poses.

    A head (class and keypoints) a layer, and a last one for the proposals.
    """

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width, joints = config.d_model, config.num_keypoints
        self.num_queries, self.num_joints = config.num_queries, joints
        total = config.num_queries + config.num_one_to_many_queries
        self.query_embedding = nn.Embedding(total, 2 * width)
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

    def propose(self, memory: Tensor, grid: Grid) -> Proposals:
        """A pose from every token of memory (B, S, D).

        Tokens on padding or within 1% of the border have no centre: their memory is zeroed and their centre's logit is
        infinite, so that they predict the picture's far corner. As published, they still take part in the ranking.
        """
        centres = grid.centres
        valid = ((centres > BORDER) & (centres < 1 - BORDER)).all(-1, keepdim=True)  # (B, S, 1)
        if grid.padding_mask is not None:
            valid = valid & ~grid.padding_mask[..., None]
        centre_logits = torch.where(valid, (centres / (1 - centres)).log(), torch.inf)
        features = self.proposal_norm(self.proposal_proj(memory.masked_fill(~valid, 0.0)))
        return Proposals(
            outside_autocast(self.class_heads[-1], features), features, centre_logits, self.keypoint_heads[-1]
        )

    def forward(self, memory: Tensor, grid: Grid, *, one_to_many: bool) -> tuple[Proposals, Predictions, list[int]]:
        """Proposals, then every layer's poses.

        Args:
            memory: (B, S, D).
            one_to_many: also run the queries of hybrid matching (training). They take the proposals ranked after the
                one-to-one queries', and neither group sees the other: leaving them out changes nothing else.
        Returns:
            The proposals, the layers' predictions (layers, B, Q, ...), and the two groups' sizes. A
            picture with fewer tokens than queries leaves the last queries out.
        """
        proposals = self.propose(memory, grid)
        wanted = self.query_embedding.num_embeddings if one_to_many else self.num_queries
        # Python's min would tie an exported graph to the traced picture's side of the comparison.
        total = torch.sym_min(wanted, memory.shape[1])
        one_to_one = torch.sym_min(self.num_queries, memory.shape[1])
        groups = [one_to_one, total - one_to_one]
        best = proposals.logits[..., 0].topk(total, dim=1).indices  # (B, Q)
        with torch.no_grad():
            # best.shape[0], not len(best): an export would fix the batch.
            references = proposals.keypoints_at(torch.arange(best.shape[0], device=best.device)[:, None], best)
        position, x = self.query_embedding.weight[:total].expand(memory.shape[0], -1, -1).chunk(2, -1)  # (B, Q, D)
        logits, keypoints = [], []
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                position,
                grid.scale_references(references),
                memory,
                grid.padding_mask,
                grid.spatial_shapes,
                [size for size in groups if size],
            )
            offsets = self.keypoint_heads[i](x).unflatten(-1, (self.num_joints, 2))  # (B, Q, K, 2)
            logits.append(outside_autocast(self.class_heads[i], x))
            keypoints.append((offsets + inverse_sigmoid(references)).sigmoid())
            references = keypoints[-1].detach()
        return proposals, Predictions(torch.stack(logits), torch.stack(keypoints)), groups


class JointDecoder(nn.Module):
    """Refines each joint of a pose by itself: K queries a pose, which see each other and the pose's image."""

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width = config.d_model
        self.query_embedding = nn.Embedding(config.num_keypoints, 2 * width)
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

    def forward(self, memory: Tensor, grid: Grid, poses: Tensor) -> Tensor:
        """memory (B, S, D) and poses (B, T, K, 2) -> the poses after every layer (layers, B, T, K, 2).

        The value is projected once an image; the T * K queries of all its poses sample that one projection.
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
            outputs.append((head(x) + inverse_sigmoid(references)).sigmoid().view(batch, count, joints, 2))
            references = outputs[-1].flatten(1, 2).detach()
        return torch.stack(outputs)
