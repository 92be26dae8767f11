"""A query group is added beside the decoder, not in it: what a researcher needs for a new kind of supervision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.model.groups import QueryGroup, query_groups
from tiny_model import TINY, TINY_RESNET


@dataclass(frozen=True)
class InOrder:
    """Query i learns person i, whatever the costs: a fixed assignment, as denoising has."""

    def __call__(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = np.arange(min(cost.shape))
        return pairs, pairs


def test_a_new_group_learns_and_leaves_the_others_alone() -> None:
    config = HPetrConfig.preset("petr-r50", **{**TINY, "backbone_config": TINY_RESNET, "dropout": 0.0})
    config.deformable_dropout = 0.0
    torch.manual_seed(0)
    plain = HPetrForPoseEstimation(config)
    extended = HPetrForPoseEstimation(config, [*query_groups(config), QueryGroup("in order", 4, InOrder())])
    weights = plain.state_dict()
    own = weights["pose_decoder.query_embedding.weight"]
    weights["pose_decoder.query_embedding.weight"] = torch.cat([own, torch.randn(4, own.shape[1])])
    extended.load_state_dict(weights)
    keypoints = torch.cat(
        [torch.rand(2, config.num_keypoints, 2) * 60, torch.full((2, config.num_keypoints, 1), 2)], -1
    )
    label = {
        "keypoints": keypoints,
        "boxes": torch.tensor([[0.0, 0.0, 60.0, 60.0]] * 2),
        "areas": torch.tensor([900.0] * 2),
    }
    label["class_labels"] = torch.zeros(2, dtype=torch.long)
    pixels = torch.randn(1, 3, 64, 96)
    before, after = (model(pixels, labels=[label]) for model in (plain, extended))
    torch.testing.assert_close(after.keypoints, before.keypoints, rtol=0, atol=1e-6)
    assert after.loss_dict["decoder.0.l1"] > before.loss_dict["decoder.0.l1"]
    after.loss.backward()
    learned = extended.pose_decoder.query_embedding.weight.grad[len(own) :].norm(dim=1) > 0
    assert learned.all(), "all of its queries learn: two from their person, two that there is nobody"
