"""Backbones: sizes, saving, and the ImageNet weights of the small one."""

from __future__ import annotations

import pytest
import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.model.backbones.efficientnet_lite import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    imagenet_state_dict,
)

TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 7,
    "out_features": ["stage2", "stage3", "stage4"],
}
TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
SMALL = {"d_model": 32, "num_heads": 4, "encoder_layers": 1, "num_queries": 20, "num_poses": 5}


@pytest.mark.parametrize("backbone", [TINY_SWIN, TINY_RESNET], ids=["swin", "resnet"])
def test_any_transformers_backbone_saves_and_loads(tmp_path, backbone: dict) -> None:
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig(backbone_config=backbone, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    loaded = HPetrForPoseEstimation.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 75, 101)  # every stride leaves a rest
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


def test_efficientnet_lite_on_odd_sizes() -> None:
    """Maps have ceil(size / stride) cells, and a cell sees the same pixels whatever is to the right of them."""
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=["stage3", "stage5", "stage7"])).eval()
    backbone.load_state_dict(imagenet_state_dict())
    pixels = torch.randn(1, 3, 97, 131)
    with torch.inference_mode():
        maps = backbone(pixels).feature_maps
        wider = backbone(torch.nn.functional.pad(pixels, (0, 29))).feature_maps
    assert [tuple(level.shape[1:]) for level in maps] == [(40, 13, 17), (112, 7, 9), (320, 4, 5)]
    torch.testing.assert_close(maps[0][..., :8], wider[0][..., :8], atol=1e-4, rtol=1e-4)


def test_imagenet_weights_fit_exactly() -> None:
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=["stage7"]))
    missing, unexpected = backbone.load_state_dict(imagenet_state_dict(), strict=True)
    assert not missing
    assert not unexpected
    assert sum(p.numel() for p in backbone.parameters()) < 3_000_000
