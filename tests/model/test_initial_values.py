"""What a fresh model starts from, as published: no golden value shows where training begins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.model.attention import DeformableAttention, PoseAttention
from tiny_model import TINY, tiny_model


@pytest.fixture(scope="module")
def fresh() -> HPetrForPoseEstimation:
    torch.manual_seed(0)
    return HPetrForPoseEstimation(HPetrConfig(**TINY))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_plain_attention_starts_on_a_ring(fresh: HPetrForPoseEstimation) -> None:
    attentions = [m for m in fresh.modules() if isinstance(m, DeformableAttention) and not isinstance(m, PoseAttention)]
    assert len(attentions) == 5  # 2 encoder layers, the heatmap's, 2 joint decoder layers
    for attention in attentions:
        assert not attention.sampling_offsets.weight.any()
        assert not attention.attention_weights.weight.any()
        bias = attention.sampling_offsets.bias.view(attention.num_heads, attention.num_levels, attention.num_points, 2)
        steps = torch.arange(1.0, attention.num_points + 1)
        torch.testing.assert_close(bias.abs().amax(-1), steps.expand(bias.shape[:-1]))
        # TINY has 4 heads: right, down, left, up
        directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        torch.testing.assert_close(bias[:, 0, 0], directions, atol=1e-6, rtol=0)


def test_pose_attention_starts_at_its_joints(fresh: HPetrForPoseEstimation) -> None:
    for layer in fresh.pose_decoder.layers:
        assert isinstance(layer.attention, PoseAttention)
        assert not layer.attention.sampling_offsets.weight.any()
        assert not layer.attention.sampling_offsets.bias.any()


def test_heads_start_at_their_priors(fresh: HPetrForPoseEstimation) -> None:
    for head in fresh.pose_decoder.class_heads:
        assert isinstance(head, nn.Linear)
        assert head.weight.any()
        torch.testing.assert_close(head.bias, torch.full_like(head.bias, logit(0.01)))
    for head in [*fresh.pose_decoder.keypoint_heads, *fresh.joint_decoder.heads]:
        assert isinstance(head, nn.Sequential)
        assert isinstance(head[-1].weight, Tensor)
        assert not head[-1].weight.any()
    bias = fresh.heatmap_head.bias
    torch.testing.assert_close(bias, torch.full_like(bias, logit(0.1)))
    assert 0.008 < fresh.heatmap_head.weight.std() < 0.012


def test_loading_keeps_what_training_made_of_them(tmp_path: Path) -> None:
    trained = tiny_model()  # its offsets and heads are not zero
    trained.save_pretrained(tmp_path / "trained")
    loaded = HPetrForPoseEstimation.from_pretrained(tmp_path / "trained")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
