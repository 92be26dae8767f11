"""The models of the zoo, as values of `HPetrConfig` that differ from its defaults."""

from __future__ import annotations

from typing import Any

from hpetr.poses.skeleton import CROWDPOSE

RESNET_50: dict[str, Any] = {
    "model_type": "resnet",
    "depths": [3, 4, 6, 3],
    "out_features": ["stage2", "stage3", "stage4"],
}
RESNET_101: dict[str, Any] = {**RESNET_50, "depths": [3, 4, 23, 3]}
SWIN_L: dict[str, Any] = {
    "model_type": "swin",
    "embed_dim": 192,
    "depths": [2, 2, 18, 2],
    "num_heads": [6, 12, 24, 48],
    "window_size": 7,
    "drop_path_rate": 0.5,
    "out_features": ["stage2", "stage3", "stage4"],
}
MOVENET: dict[str, Any] = {
    "model_type": "movenet",
    "out_features": ["heads4", "heads8", "half_heads4", "half_heads8", "top"],
}
# One-to-many queries and wider FFNs are what the hybrid models add; their dropout is 0.
HYBRID: dict[str, Any] = {
    "num_one_to_many_queries": 900,
    "decoder_ffn_dim": 2048,
    "joint_decoder_ffn_dim": 2048,
    "dropout": 0.0,
}
SWIN_T: dict[str, Any] = {
    **SWIN_L,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "drop_path_rate": 0.2,
}
SWIN_L_384: dict[str, Any] = {**SWIN_L, "window_size": 12, "drop_path_rate": 0.2}
GROUP_POSE: dict[str, Any] = {
    "batch_norm_buffers": True,
    "neck_bias": True,
    "position_temperature": 20.0,
    "position_offset": 0.0,
    "encoder_ffn_dim": 2048,
    "decoder": "group",
    "decoder_layers": 6,
    "decoder_ffn_dim": 2048,
    "joint_decoder_layers": 0,
    "num_queries": 100,
    "num_poses": 50,
    "leading_columns": 1,
    "dropout": 0.0,
    "deformable_dropout": 0.0,
    "cost_l1": 10.0,
    "cost_oks": 4.0,
    "loss_l1": 10.0,
    "loss_oks": 4.0,
    "oks_loss": "linear",
    "oks_space": "normalized",
    "divisor": "persons",
    "loss_heatmap": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "petr-r50": {"backbone_config": RESNET_50},
    "petr-r101": {"backbone_config": RESNET_101},
    "petr-swin-l": {"backbone_config": SWIN_L},
    "h-petr-r50": {"backbone_config": RESNET_50, **HYBRID},
    # The published h-petr-r101 keeps the joint decoder's FFN at 1024.
    "h-petr-r101": {"backbone_config": RESNET_101, **HYBRID, "joint_decoder_ffn_dim": 1024},
    "h-petr-swin-l": {"backbone_config": SWIN_L, **HYBRID},
    "petr-swin-l-crowdpose": {
        "backbone_config": {**SWIN_L, "drop_path_rate": 0.3},
        "num_keypoints": CROWDPOSE.num_keypoints,
        "skeleton": CROWDPOSE.to_dict(),
        "decoder_layers": 6,
        "joint_decoder_layers": 3,
    },
    "group-pose-r50": {"backbone_config": RESNET_50, **GROUP_POSE},
    "group-pose-swin-t": {"backbone_config": SWIN_T, **GROUP_POSE},
    "group-pose-swin-l": {"backbone_config": SWIN_L_384, **GROUP_POSE},
    "group-pose-swin-l-crowdpose": {
        "backbone_config": SWIN_L_384,
        **GROUP_POSE,
        "num_keypoints": CROWDPOSE.num_keypoints,
        "skeleton": CROWDPOSE.to_dict(),
    },
    "h-petr-nano": {
        "backbone_config": MOVENET,
        "num_frozen_stages": 0,
        "pose_prior": 2,
        "neck_norm": "token",
        "queries": "proposals",
        "steps": "size",
        "d_model": 128,
        "num_feature_levels": 3,
        "encoder_layers": 1,
        "encoder_first_level": 1,
        "decoder_layers": 2,
        "joint_decoder_layers": 1,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        "joint_decoder_ffn_dim": 512,
        "keypoint_head_dim": 256,
        "num_queries": 60,
        "num_one_to_many_queries": 100,
        "one_to_many_k": 4,
        "num_poses": 30,
        "dropout": 0.0,
        "deformable_dropout": 0.0,
        "class_target": "oks",
        "oks_loss": "linear",
        "loss_oks": 6.0,
        "loss_joint_oks": 10.0,
        "loss_heatmap": 1.0,
    },
}
