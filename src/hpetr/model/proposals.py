"""Proposals: a pose and class logits from every token of the encoder, of which the best become queries.

Coordinates are x, y with 1 = the unpadded image's width and height.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpetr.model.grid import Grid
from hpetr.model.steps import Steps

# Tokens nearer to the image's border propose nothing: 1% as published, and a little more, so that a center at exactly
# 1% (on 50 or 150 cells) is outside however a runtime rounds its quotient.
BORDER = 0.01 + 1e-6


def outside_autocast(module: nn.Module, x: Tensor) -> Tensor:
    """Return `module(x)` in the dtype of the module's weights.

    Coordinates and scores must not pass through bfloat16: its 8 bits are 2 pixels of 640, and make thousands of tokens
    equally good.
    """
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return module(x)
    with torch.autocast(device, enabled=False):
        return module(x.to(next(module.parameters()).dtype))


class KeypointHead(nn.Sequential):
    """An MLP with `depth` hidden layers, ReLU and a linear output layer."""

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
    """Class logits (..., Q, C) and keypoints (..., Q, K, 2) of one layer, or of several layers stacked in front."""

    logits: Tensor
    keypoints: Tensor


@dataclass
class Proposals:
    """A pose for every token, whose keypoints are computed on demand.

    The keypoint MLP over all tokens costs as much as an encoder layer. Inference needs it for the N best tokens only.
    Training needs it for all tokens in the matching, without gradient, and with gradient for the matched ones.

    Attributes:
        logits: (B, S, C) class logits. features: (B, S, D).
        valid: (B, S, 1) bool, false where a token lies on padding or at the border.
        centers: (B, S, 2) of the tokens; the image's far corner where a token is not valid.
        head: MLP from features to offsets (..., 2 K).
        steps: what the offsets mean.
        unit: (B, S, 2) unit of the offsets, from `steps`; None where they are logits.
        first_logits: (B, S, C) class logits that the decoder layers start from, detached.
        first_offsets: (B, S, 2 K) added to the head's offsets; None without a prior.
        selected: of the tokens that became queries (B, Q, ...), with gradient, where the losses are theirs alone.
    """

    logits: Tensor
    features: Tensor
    valid: Tensor
    centers: Tensor
    head: nn.Module
    steps: Steps
    unit: Tensor | None
    first_logits: Tensor
    first_offsets: Tensor | None = None
    selected: Predictions | None = None

    def keypoints_at(self, image: Tensor, token: Tensor) -> Tensor:
        """Return the keypoints (..., K, 2) of tokens, for indices (...,) of images and tokens that broadcast."""
        unit, first_offsets = (None if x is None else x[image, token] for x in (self.unit, self.first_offsets))
        return self._poses(self.features[image, token], self.centers[image, token], unit, first_offsets)

    @torch.no_grad()
    def predictions(self) -> Predictions:
        """Return logits (B, S, C) and keypoints (B, S, K, 2) of all tokens, without gradient."""
        poses = self._poses(self.features, self.centers, self.unit, self.first_offsets)
        return Predictions(self.logits.detach(), poses)

    def _poses(self, features: Tensor, centers: Tensor, unit: Tensor | None, first_offsets: Tensor | None) -> Tensor:
        offsets = self.head(features)
        offsets = (offsets if first_offsets is None else offsets + first_offsets).unflatten(-1, (-1, 2))  # (..., K, 2)
        return self.steps.place(centers, offsets, unit)


def proposing_tokens(grid: Grid) -> Tensor:
    """Return which tokens propose a pose, (B, S, 1): those inside the image and not within 1% of its border."""
    valid = ((grid.centers > BORDER) & (grid.centers < 1 - BORDER)).all(-1, keepdim=True)
    return valid if grid.padding_mask is None else valid & ~grid.padding_mask[..., None]


class ProposingDecoder(nn.Module):
    """What the decoders share: proposals from the encoder's tokens.

    A subclass makes the modules. The last heads are those of the proposals.
    """

    steps: Steps
    proposal_proj: nn.Linear
    proposal_norm: nn.LayerNorm
    class_heads: nn.ModuleList
    keypoint_heads: nn.ModuleList

    def propose(self, memory: Tensor, grid: Grid) -> Proposals:
        """Return a proposal for every token of memory (B, S, D).

        Tokens on padding or within 1% of the border have no center: their memory is zeroed and their center is the
        image's far corner. As published, they still take part in the ranking.
        """
        valid = proposing_tokens(grid)  # (B, S, 1)
        features = self.proposal_norm(self.proposal_proj(memory.masked_fill(~valid, 0.0)))
        logits = outside_autocast(self.class_heads[-1], features)
        return Proposals(
            logits=logits,
            features=features,
            valid=valid,
            centers=torch.where(valid, grid.centers, 1.0),
            head=self.keypoint_heads[-1],
            steps=self.steps,
            unit=self.steps.token_unit(grid),
            first_logits=logits.detach(),
        )
