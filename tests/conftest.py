"""Shared by all tests."""

from pathlib import Path

import pytest
import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor
from hpetr.checkpoints.folder import save_checkpoint
from training_runs import PUBLISHED_DESIGN

# With pytest-xdist every process would otherwise take all cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a small model with random weights, which reports 10 poses in every image."""
    torch.manual_seed(0)
    design = {**PUBLISHED_DESIGN, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 20, "num_poses": 10}
    design["num_one_to_many_queries"] = 0
    backbone = {"model_type": "movenet", "out_features": ["stage3", "stage5", "stage7"]}
    config = HPetrConfig.preset("h-petr-nano", backbone_config=backbone, **design)
    processor = HPetrImageProcessor(size={"shortest_edge": 128, "longest_edge": 192}, threshold=0.0)
    folder = tmp_path_factory.mktemp("checkpoint") / "random-nano"
    save_checkpoint(HPetrForPoseEstimation(config), processor, folder)
    return folder
