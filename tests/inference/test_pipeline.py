"""transformers' pipeline gives the poses of `PosePredictor`, from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

import hpetr.inference.pipeline  # noqa: F401 (registers the task)
from hpetr import HPetrImageProcessor, PosePredictor
from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
from paths import EXAMPLES

IMAGES = sorted(str(path) for path in EXAMPLES.glob("*.jpg"))[:2]


@pytest.mark.parametrize("half", [False, True])
def test_pipeline_gives_the_predictors_poses(checkpoint: Path, tmp_path: Path, half: bool) -> None:
    folder = tmp_path / "half"
    save_checkpoint(*load_checkpoint(checkpoint, "cpu"), folder, half=half)
    detect = pipeline("keypoint-detection", model=str(folder), device="cpu")
    expected = PosePredictor(folder, "cpu", threshold=0.05)(IMAGES)
    found = detect(IMAGES, threshold=0.05)
    assert len(found) == 2
    assert all(found)
    for poses, result in zip(found, expected, strict=True):
        assert [pose["score"] for pose in poses] == pytest.approx(result.scores.tolist(), abs=1e-6)
        for pose, keypoints, box in zip(poses, result.keypoints, result.boxes, strict=True):
            np.testing.assert_allclose([[k["x"], k["y"]] for k in pose["keypoints"]], keypoints, atol=1e-2)
            np.testing.assert_allclose(list(pose["box"].values()), box, atol=1e-2)
            assert [k["name"] for k in pose["keypoints"]] == list(result.skeleton.names)
            assert pose["label"] == "person"


def test_processor_decides_without_a_threshold(checkpoint: Path) -> None:
    model, _ = load_checkpoint(checkpoint, "cpu")
    size = {"shortest_edge": 64, "longest_edge": 96}
    for threshold, count in ((0.0, model.config.num_poses), (1.0, 0)):
        processor = HPetrImageProcessor(size, threshold=threshold)
        detect = pipeline("keypoint-detection", model=model, image_processor=processor, device="cpu")
        with torch.inference_mode():
            assert len(detect(np.zeros((60, 80, 3), np.uint8))) == count
