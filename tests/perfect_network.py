"""A network that answers with the annotations."""

from __future__ import annotations

from typing import Any

import torch

from hpetr import HPetrConfig
from hpetr.data.dataset import PoseDataset
from hpetr.poses.skeleton import COCO


class PerfectNetwork(torch.nn.Module):
    """Answers with the people of the dataset's images, which it sees in order, one at a time.

    Args:
        config: of the model it stands for.
        dataset: with COCO's keypoints.
        mirrored: every image is followed by its mirror image.
    """

    device = torch.device("cpu")

    def __init__(self, config: HPetrConfig, dataset: PoseDataset, *, mirrored: bool = False):
        super().__init__()
        self.config, self.dataset, self.looks, self.seen = config, dataset, 1 + mirrored, 0

    def forward(self, **_: torch.Tensor) -> Any:
        index, mirror = divmod(self.seen, self.looks)
        self.seen += 1
        sample = self.dataset[index]
        height, width = sample.image.shape[:2]
        poses = torch.from_numpy(sample.keypoints[..., :2]) / torch.tensor([width, height])
        if mirror:
            poses = poses[:, COCO.flip_index]
            poses[..., 0] = 1 - poses[..., 0]
        scores = torch.linspace(0.9, 0.5, len(poses))
        return type("Output", (), {"scores": scores[None], "poses": poses[None]})()
