"""A model of a few thousand weights with every part of the large ones, and people for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hpetr import HPetrConfig, HPetrForPoseEstimation

TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 3,
    "out_features": ["stage2", "stage3", "stage4"],
}
TINY = {
    "backbone_config": TINY_RESNET,
    "d_model": 32,
    "num_heads": 4,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "joint_decoder_ffn_dim": 48,
    "keypoint_head_dim": 32,
    "num_queries": 15,
    "num_one_to_many_queries": 30,
    "one_to_many_k": 3,
    "num_poses": 5,
    "dropout": 0.0,
    "deformable_dropout": 0.0,
}


def tiny_model(**options) -> HPetrForPoseEstimation:
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig(**{**TINY, **options}))
    for name, parameter in model.named_parameters():
        if "keypoint_heads" in name or "joint_decoder.heads" in name or "sampling_offsets" in name:
            torch.nn.init.normal_(parameter, std=0.05)  # the zeros of a fresh model would hide mistakes
    return model.train()


def people(count: int, height: int, width: int, seed: int, joints: int = 17) -> dict[str, Tensor]:
    """Labels of `count` people, two thirds of their keypoints labelled."""
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, joints, 2, generator=generator) * torch.tensor([width, height])
    visible = 2.0 * (torch.rand(count, joints, 1, generator=generator) > 0.3)
    visible[:, 0] = 2
    return {
        "keypoints": torch.cat([xy * (visible > 0), visible], -1),
        "boxes": torch.cat([xy.amin(1), xy.amax(1)], -1),
        "areas": torch.full((count,), 900.0),
        "class_labels": torch.zeros(count, dtype=torch.long),
    }
