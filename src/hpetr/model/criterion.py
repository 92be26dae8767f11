"""The criterion: matching and all loss terms of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpetr.model.config import HPetrConfig
from hpetr.model.groups import QueryGroup
from hpetr.model.host import to_device
from hpetr.model.losses import (
    Matching,
    count_from_first_group,
    decoder_losses,
    finish_matching,
    heatmap_loss,
    joint_losses,
    layer_costs,
    match_counts,
    matches_on,
    person_counts,
    proposal_losses,
    start_matching,
)
from hpetr.model.matching import Matches, PendingAssignments, Targets
from hpetr.model.proposals import Predictions, Proposals
from hpetr.model.stages import ASSIGNMENT, COSTS, HEATMAP, stage


class Criterion:
    """The weighted loss terms of PETR (section 3.4) and of its query groups.

    Args:
        config: weights of the terms, sigmas.
    """

    def __init__(self, config: HPetrConfig):
        self.config = config

    def sigmas(self, device: torch.device) -> Tensor:
        """Return the keypoints' OKS sigmas (K,), float32."""
        return to_device(torch.tensor(self.config.skeleton["sigmas"], dtype=torch.float32), device)

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
        places: Callable[[Matches, Targets, Tensor], dict[str, Tensor]] | None = None,
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
            places: further terms from the matches of the proposals, the targets and the sigmas (K,).
        """
        config, device = self.config, layers.logits.device
        sigmas = self.sigmas(device)
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
        if places is not None:
            terms |= places(matching.proposals, targets, sigmas)
        counts = match_counts(matching, targets)
        poses, scores = refine(matched_poses(layers.keypoints[-1].detach(), matching))
        return (
            proposal_losses(proposals, every.keypoints, matching.proposals, targets, config, sigmas, counts[0])
            | decoder_losses(layers, sizes, matching.layers, targets, config, sigmas, counts[1], layer_names(layers))
            | terms
            | joint_losses(poses, scores, matching.joint, targets, config, sigmas, counts[2])
        )


class GroupCriterion(Criterion):
    """The loss terms of Group Pose: selected proposals learn like a decoder layer, and persons divide everything."""

    def __call__(
        self,
        proposals: Proposals,
        layers: Predictions,
        groups: Sequence[QueryGroup],
        sizes: list[int],
        targets: Targets,
        image_width: int,
        **branches: Callable | None,
    ) -> dict[str, Tensor]:
        """Return the loss terms by name; see `Criterion`. There is neither a joint decoder nor a heatmap branch."""
        config, device = self.config, layers.logits.device
        sigmas = self.sigmas(device)
        selected = proposals.selected
        assert selected is not None
        parts = Predictions(
            torch.cat([selected.logits[None], layers.logits]), torch.cat([selected.keypoints[None], layers.keypoints])
        )
        rules = [group.assignment for group in groups] * len(parts.logits)
        pending = PendingAssignments(layer_costs(parts, sizes, targets, config, sigmas), targets.counts, rules)
        pairs = pending.solve()
        count_from_first_group(pairs, sizes)
        (matches,) = matches_on([pairs], device, np.zeros(sum(own.shape[1] for own in pairs), np.int64))
        counts = person_counts(matches, targets, len(sizes))
        names = ["proposal", *layer_names(layers)]
        return decoder_losses(parts, sizes, matches, targets, config, sigmas, counts, names)


def layer_names(layers: Predictions) -> list[str]:
    """Return the names of the pose decoder's layers in the loss terms."""
    return [f"decoder.{layer}" for layer in range(len(layers.logits))]


def matched_poses(keypoints: Tensor, matching: Matching) -> Tensor:
    """Return the matched poses of each image side by side: keypoints (B, Q, K, 2) -> (B, T, K, 2).

    T is the largest number of matches of an image, at least 1; the places left over are copies of query 0 that no loss
    counts.
    """
    index = torch.zeros(len(keypoints), matching.most, dtype=torch.long, device=keypoints.device)
    index[matching.joint.image, matching.joint.slot] = matching.joint.query
    return keypoints.gather(1, index[..., None, None].expand(-1, -1, *keypoints.shape[-2:]))
