"""The loss of the places that a prior gives to keypoints."""

from __future__ import annotations

from torch import Tensor

from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.losses import mean_over_processes
from hpetr.model.matching import Matches, Targets
from hpetr.model.nano.prior import GuidedProposals


def place_losses(
    proposals: GuidedProposals, grid: Grid, config: HPetrConfig, matches: Matches, targets: Targets, sigmas: Tensor
) -> dict[str, Tensor]:
    """Return the loss of the places that `Prior.snap` gives to matched proposals, averaged over labelled keypoints.

    Args:
        proposals: of all tokens.
        grid: of the tokens.
        config: weight.
        matches: of the proposals.
        targets: people of the batch.
        sigmas: (K,).
    """
    poses = proposals.keypoints_at(matches.image, matches.query).detach()  # (m, K, 2); they have a loss of their own
    visible = targets.visible[matches.image, matches.target]  # (m, K)

    def likelihoods(places: Tensor, chosen: Tensor) -> Tensor:
        image, target = matches.image[chosen], matches.target[chosen]
        difference = places * targets.sizes[image][:, None, None] - targets.keypoints[image, target][:, :, None]
        squared = difference.square().sum(-1)  # (n, K, cells) pixels^2
        return -squared / (2 * targets.areas[image, target][:, None] * (2 * sigmas) ** 2)[..., None]

    loss = proposals.prior.place_loss(poses, matches.image, matches.query, grid, likelihoods)
    return {"prior.place": config.loss_place * (loss * visible).sum() / mean_over_processes(visible.sum().float())}
