"""Backbones of transformers: sizes and saving."""

from __future__ import annotations

import pytest
import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation
from tiny_model import TINY_RESNET, TINY_SWIN

SMALL = {"d_model": 32, "num_heads": 4, "encoder_layers": 1, "num_queries": 20, "num_poses": 5}


@pytest.mark.parametrize("backbone", [TINY_SWIN, TINY_RESNET], ids=["swin", "resnet"])
def test_any_transformers_backbone_saves_and_loads(tmp_path, backbone: dict) -> None:
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig(backbone_config=backbone, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    loaded = HPetrForPoseEstimation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 75, 101)  # multiples of no stride
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels).poses, model(pixels).poses)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_number_of_levels(levels: int) -> None:
    model = HPetrForPoseEstimation(HPetrConfig(backbone_config=TINY_RESNET, num_feature_levels=levels, **SMALL)).eval()
    with torch.inference_mode():
        maps, masks, _ = model.backbone(torch.randn(1, 3, 96, 160), None)
    assert masks is None
    expected = [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]
    assert [tuple(level.shape[-2:]) for level in maps] == expected[:levels]
