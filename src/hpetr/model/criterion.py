"""The criterion: matching and all loss terms of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpetr.model.config import HPetrConfig
from hpetr.model.groups import QueryGroup
from hpetr.model.host import to_device
from hpetr.model.losses import (
    Matching,
    decoder_losses,
    finish_matching,
    heatmap_loss,
    joint_losses,
    match_counts,
    proposal_losses,
    start_matching,
)
from hpetr.model.matching import Targets
from hpetr.model.proposals import Predictions, Proposals
from hpetr.model.stages import ASSIGNMENT, COSTS, HEATMAP, stage


class Criterion:
    """The weighted loss terms of PETR (section 3.4) and of its query groups.

    Args:
        config: weights of the terms, sigmas.
    """

    def __init__(self, config: HPetrConfig):
        self.config = config

    def __call__(
        self,
        proposals: Proposals,
        layers: Predictions,
        groups: Sequence[QueryGroup],
        sizes: list[int],
        targets: Targets,
        image_width: int,
        *,
        refine: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        heatmap: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> dict[str, Tensor]:
        """Return the loss terms by name.

        Args:
            proposals: of all tokens.
            layers: of the pose decoder, (layers, B, Q, ...), one group after the other.
            groups: the query groups.
            sizes: their numbers of queries.
            targets: people of the batch.
            image_width: of the padded images, in pixels.
            refine: the joint decoder, from poses (B, T, K, 2) to its layers' poses and the keypoint scores.
            heatmap: the heatmap branch: logits (B, K, H, W), and padding (B, H, W) or None. It is called while the
                matching costs travel to the host, and not at all for a model without heatmap loss.
        """
        config, device = self.config, layers.logits.device
        sigmas = to_device(torch.tensor(config.skeleton["sigmas"], dtype=torch.float32), device)
        every = proposals.predictions()
        with stage(COSTS):
            pending = start_matching(every, layers, groups, sizes, targets, config, sigmas)
        terms: dict[str, Tensor] = {}
        if config.loss_heatmap:
            with stage(HEATMAP):
                logits, padding = heatmap()
                stride = round(image_width / logits.shape[-1])
                terms = heatmap_loss(logits, padding, targets, stride, config)
        with stage(ASSIGNMENT):
            matching = finish_matching(pending, sizes, device)
        counts = match_counts(matching, targets)
        poses, scores = refine(matched_poses(layers.keypoints[-1].detach(), matching))
        return (
            proposal_losses(proposals, every.keypoints, matching.proposals, targets, config, sigmas, counts[0])
            | decoder_losses(layers, sizes, matching.layers, targets, config, sigmas, counts[1])
            | terms
            | joint_losses(poses, scores, matching.joint, targets, config, sigmas, counts[2])
        )


def matched_poses(keypoints: Tensor, matching: Matching) -> Tensor:
    """Return the matched poses of each image side by side: keypoints (B, Q, K, 2) -> (B, T, K, 2).

    T is the largest number of matches of an image, at least 1; the places left over are copies of query 0 that no loss
    counts.
    """
    index = torch.zeros(len(keypoints), matching.most, dtype=torch.long, device=keypoints.device)
    index[matching.joint.image, matching.joint.slot] = matching.joint.query
    return keypoints.gather(1, index[..., None, None].expand(-1, -1, *keypoints.shape[-2:]))
