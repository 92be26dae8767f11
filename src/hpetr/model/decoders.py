"""Proposals, the pose decoder and the joint decoder: from memory to poses.

Coordinates are x, y with 1 = the unpadded picture's width and height; a "logit" of a coordinate is its inverse sigmoid.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpetr.model.attention import DeformableAttention, DeformableLayer, DeformableLayers, PoseAttention
from hpetr.model.config import HPetrConfig
from hpetr.model.encoder import Grid, sine_encoding
from hpetr.model.host import to_device
from hpetr.model.prior import FLOOR, REPETITION, REPETITION_POWER, repeated

# Steps of the pose decoder count in so many half extents of the pose, those of the joint decoder in so many cells.
# Adam changes a fresh head's weights by the learning rate whatever the gradient: larger units shake poses by pixels.
EXTENT_SHARE, CELL_SHARE = 0.1, 0.25
# Tokens nearer to the picture's border propose nothing: 1% as published, and a little, so that a centre at exactly 1%
# (on 50 or 150 cells) is outside however a runtime rounds its quotient.
BORDER = 0.01 + 1e-6


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both clamped to at least eps; written out because OpenVINO has no logit."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def half_extent(poses: Tensor, least: Tensor) -> Tensor:
    """Half the width and height of poses (..., K, 2), at least `least`, which broadcasts: (..., 1, 2)."""
    return torch.maximum((poses.amax(-2, keepdim=True) - poses.amin(-2, keepdim=True)) / 2, least)


def moved(places: Tensor, steps: Tensor, unit: Tensor | None) -> Tensor:
    """Places plus steps, in `unit`s, or where that is None, in logits."""
    return (steps + inverse_sigmoid(places)).sigmoid() if unit is None else places + steps * unit


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
    """An MLP of `depth` hidden layers with ReLU and a linear layer, whose result is a step or a logit."""

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
        centres: (B, S, 2) of each token, the picture's far corner where a token has none.
        unit: (B, S, 2) what the head's steps count in; None for logits.
        head: MLP from features to steps (..., 2 K).
        first_steps: (B, S, 2 K) that the head's add to, from the prior; None without one.
        first_logits: (B, S, C) what decoder layers change: the prior's, or without one those of the proposals.
    """

    logits: Tensor
    features: Tensor
    centres: Tensor
    unit: Tensor | None
    head: nn.Module
    first_steps: Tensor | None
    first_logits: Tensor

    def keypoints_at(self, image: Tensor, token: Tensor) -> Tensor:
        """Keypoints (..., K, 2) of tokens of images, indices (...,) that broadcast."""
        unit, first_steps = (None if x is None else x[image, token] for x in (self.unit, self.first_steps))
        return self._poses(self.features[image, token], self.centres[image, token], unit, first_steps)

    @torch.no_grad()
    def predictions(self) -> Predictions:
        """Logits (B, S, C) and keypoints (B, S, K, 2) of all tokens, without gradient."""
        return Predictions(self.logits.detach(), self._poses(self.features, self.centres, self.unit, self.first_steps))

    def _poses(self, features: Tensor, centres: Tensor, unit: Tensor | None, first_steps: Tensor | None) -> Tensor:
        steps = self.head(features)
        steps = (steps if first_steps is None else steps + first_steps).unflatten(-1, (-1, 2))  # (..., K, 2)
        if unit is None:
            # The far corner's logit stays infinite: whatever the step, such a token predicts the corner.
            return (steps + (centres / (1 - centres)).log()[..., None, :]).sigmoid()
        return centres[..., None, :] + steps * unit[..., None, :]


class ProposalQueries(nn.Module):
    """Queries out of proposals: the content is the token's, the position that of the pose.

    Both groups of hybrid matching begin from the best proposals; a vector on the content tells the one-to-many queries
    from the others. The published ones take the proposals ranked after the one-to-one queries': of the few tokens of a
    small model these are background, and far from every person.
    """

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width = config.d_model
        self.content = nn.Linear(width, width)
        self.content_norm = nn.LayerNorm(width)
        self.one_to_many = nn.Parameter(torch.zeros(width))
        self.position = nn.Sequential(
            nn.Linear(width + 2 * config.num_keypoints + 2, width), nn.ReLU(), nn.Linear(width, width)
        )

    def contents(self, features: Tensor, groups: list[int]) -> Tensor:
        """Features (B, Q, D) of the proposing tokens -> (B, Q, D); they learn from the proposals' losses alone."""
        contents = self.content_norm(self.content(features.detach()))
        if not groups[1]:
            return contents
        first, second = contents.split(groups, 1)
        return torch.cat([first, second + self.one_to_many], 1)

    def positions(self, poses: Tensor) -> Tensor:
        """Poses (B, Q, K, 2), 1 = the picture -> (B, Q, D): where the middle is, the shape, and the size."""
        centre = (poses.amax(-2) + poses.amin(-2)) / 2  # (B, Q, 2)
        extent = half_extent(poses, poses.new_tensor(1e-3))  # (B, Q, 1, 2)
        shape = ((poses - centre[..., None, :]) / extent).flatten(-2)  # (B, Q, 2 K)
        place = sine_encoding(centre, self.content.in_features // 2).flatten(-2)  # (B, Q, D)
        return self.position(torch.cat([place, shape, extent.flatten(-2).log()], -1))


class PoseDecoder(nn.Module):
    """Proposals from the encoder's tokens, and decoder layers that refine whole poses.

    A head (class and keypoints) a layer, and a last one for the proposals.
    """

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width, joints = config.d_model, config.num_keypoints
        self.num_queries, self.num_joints = config.num_queries, joints
        self.num_one_to_many = config.num_one_to_many_queries
        self.size_steps = config.steps == "size"
        self.sigmas = tuple(config.skeleton["sigmas"])
        if config.queries == "learned":
            self.query_embedding = nn.Embedding(self.num_queries + self.num_one_to_many, 2 * width)
        else:
            self.proposal_queries = ProposalQueries(config)
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

        Tokens on padding or within 1% of the border have no centre: their memory is zeroed and their centre is the
        picture's far corner. As published, they still take part in the ranking.
        """
        centres = grid.centres
        valid = ((centres > BORDER) & (centres < 1 - BORDER)).all(-1, keepdim=True)  # (B, S, 1)
        if grid.padding_mask is not None:
            valid = valid & ~grid.padding_mask[..., None]
        features = self.proposal_norm(self.proposal_proj(memory.masked_fill(~valid, 0.0)))
        logits, first_steps = outside_autocast(self.class_heads[-1], features), None
        first_logits = logits
        if grid.prior is not None:
            first_logits = torch.where(valid, grid.prior.logits, FLOOR)
            logits = logits + first_logits
            first_steps = grid.prior.steps.masked_fill(~valid, 0.0) / 2
        return Proposals(
            logits=logits,
            features=features,
            centres=torch.where(valid, centres, 1.0),
            unit=grid.cells_of_tokens() if self.size_steps else None,
            head=self.keypoint_heads[-1],
            first_steps=first_steps,
            first_logits=first_logits.detach(),
        )

    def repetition(self, poses: Tensor, logits: Tensor, grid: Grid, groups: list[int]) -> Tensor:
        """What queries (B, Q, K, 2) lose of their class logits (B, Q, C) for repeating likelier ones: (B, Q, 1).

        One-to-many queries may repeat each other.
        """
        first = groups[0]
        # In cells, which are square: x and y of the picture's shares are of different lengths.
        lengths = poses[:, :first] / grid.cells[:, None, :1]
        sigmas = to_device(torch.tensor(self.sigmas, dtype=lengths.dtype), lengths.device)
        again = repeated(lengths, logits[:, :first, 0], sigmas) ** REPETITION_POWER * REPETITION
        return F.pad(again, (0, groups[1]))[..., None]

    def forward(self, memory: Tensor, grid: Grid, *, one_to_many: bool) -> tuple[Proposals, Predictions, list[int]]:
        """Proposals, then every layer's poses.

        Args:
            memory: (B, S, D).
            one_to_many: also run the queries of hybrid matching (training). Learned ones take the proposals ranked
                after the one-to-one queries'. Neither group sees the other: leaving them out changes nothing else.
        Returns:
            The proposals, the layers' predictions (layers, B, Q, ...), and the two groups' sizes. A
            picture with fewer tokens than queries leaves the last queries out.
        """
        proposals = self.propose(memory, grid)
        learned, tokens = hasattr(self, "query_embedding"), memory.shape[1]
        # Python's min would tie an exported graph to the traced picture's side of the comparison.
        one_to_one = torch.sym_min(self.num_queries, tokens)
        more = self.num_one_to_many if one_to_many else 0
        groups = [one_to_one, torch.sym_min(more, tokens - one_to_one if learned else tokens)]
        count = sum(groups) if learned else torch.sym_max(*groups)
        ranking = proposals.logits[..., 0]
        if learned or torch.compiler.is_exporting():
            best = ranking.topk(count, dim=1).indices  # (B, Q)
        else:
            # Of equal tokens, as all at the border are, the first: topk takes any, but in ONNX the first.
            best = ranking.sort(dim=1, descending=True, stable=True).indices[:, :count]
        if not learned and groups[1]:
            best = torch.cat([best[:, :size] for size in groups], 1)
        # torch.export stumbles over a change of the gradient mode; its parameters have no gradients anyway.
        with nullcontext() if torch.compiler.is_exporting() else torch.no_grad():
            # best.shape[0], not len(best): an export would fix the batch.
            image = torch.arange(best.shape[0], device=best.device)[:, None]
            references = proposals.keypoints_at(image, best)
            if grid.prior is not None:
                references = grid.prior.snap(references, best, grid)
        if learned:
            position, x = self.query_embedding.weight[:count].expand(memory.shape[0], -1, -1).chunk(2, -1)
        else:
            x = self.proposal_queries.contents(proposals.features[image, best], groups)  # (B, Q, D)
            first_logits = proposals.first_logits[image, best]  # (B, Q, C)
            if grid.prior is not None:
                first_logits = first_logits - self.repetition(references, first_logits, grid, groups)
        logits, keypoints = [], []
        for i, layer in enumerate(self.layers):
            if not learned:
                position = self.proposal_queries.positions(references)
            x = layer(
                x,
                position,
                grid.scale_references(references),
                memory,
                grid.padding_mask,
                grid.spatial_shapes,
                [size for size in groups if size],
            )
            steps = self.keypoint_heads[i](x).unflatten(-1, (self.num_joints, 2))  # (B, Q, K, 2)
            unit = half_extent(references, grid.cells[:, None, :1]) * EXTENT_SHARE if self.size_steps else None
            change = outside_autocast(self.class_heads[i], x)
            logits.append(change if learned else first_logits + change)
            keypoints.append(moved(references, steps, unit))
            references = keypoints[-1].detach()
        return proposals, Predictions(torch.stack(logits), torch.stack(keypoints)), groups


class JointDecoder(nn.Module):
    """Refines each joint of a pose by itself: K queries a pose, which see each other and the pose's image."""

    def __init__(self, config: HPetrConfig):
        super().__init__()
        width = config.d_model
        self.size_steps = config.steps == "size"
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
        self.score_head = KeypointHead(width, width, 1, 1) if config.keypoint_scores else None

    def forward(self, memory: Tensor, grid: Grid, poses: Tensor) -> tuple[Tensor, Tensor | None]:
        """Refine poses (B, T, K, 2) with memory (B, S, D).

        Returns:
            The poses after every layer (layers, B, T, K, 2), and the logits of the joints' scores after the last one
            (B, T, K), where the model has such.

        The value is projected once an image; the T * K queries of all its poses sample that one projection.
        """
        batch, count, joints, _ = poses.shape
        per_image = (batch, count, joints, -1)
        position, x = (
            part.expand(per_image).reshape(batch, count * joints, -1)  # (B, T * K, D)
            for part in self.query_embedding.weight.chunk(2, -1)
        )
        references = poses.flatten(1, 2)  # (B, T * K, 2)
        unit = grid.cells[:, :1] * CELL_SHARE if self.size_steps else None  # (B, 1, 2)
        outputs = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            scaled = grid.scale_references(references[:, :, None])
            x = layer(x, position, scaled, memory, grid.padding_mask, grid.spatial_shapes, joints)
            outputs.append(moved(references, head(x), unit).view(batch, count, joints, 2))
            references = outputs[-1].flatten(1, 2).detach()
        scores = None if self.score_head is None else self.score_head(x).view(batch, count, joints)
        return torch.stack(outputs), scores
