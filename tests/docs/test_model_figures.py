"""The figures of docs/model.md show what the network computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpetr import PosePredictor
from paths import ROOT

IMAGE = ROOT / "examples" / "000000000785.jpg"
sys.path.insert(0, str(ROOT / "docs" / "figures"))

from make_model_figures import Trace, trace, write_figures  # noqa: E402


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> PosePredictor:
    return PosePredictor(checkpoint, "cpu")


@pytest.fixture(scope="module")
def traced(predictor: PosePredictor) -> Trace:
    return trace(predictor, IMAGE)


def test_the_last_poses_are_those_of_the_prediction(predictor: PosePredictor, traced: Trace) -> None:
    result = predictor(IMAGE)
    height, width = result.image_size
    np.testing.assert_allclose(traced.after.clip(0, [width, height]), result.keypoints, atol=1e-2)
    np.testing.assert_allclose(traced.final_scores, result.scores, atol=1e-6)


def test_the_last_layer_feeds_the_joint_decoder(traced: Trace) -> None:
    queries = [traced.query_of(rank) for rank in range(len(traced.before))]
    np.testing.assert_allclose(traced.layers[-1][queries], traced.before, atol=1e-3)


def test_pose_attention_of_an_untrained_model_looks_exactly_at_its_joints(traced: Trace) -> None:
    """Offsets start at zero, and all weights are equal."""
    looks = traced.points[0]  # (N, M, L, K, 2)
    np.testing.assert_allclose(looks, np.broadcast_to(traced.proposals[:, None, None], looks.shape), atol=1e-2)
    np.testing.assert_allclose(traced.weights.sum((-1, -2)), 1, atol=1e-5)


def test_the_best_tokens_are_the_queries(traced: Trace) -> None:
    heat = np.concatenate([level.ravel() for level in traced.heat])
    assert len(traced.centers) == len(traced.proposals) == 20
    assert heat.max() == pytest.approx(np.sort(heat)[-1])
    height, width = traced.image.shape[:2]
    inside = (traced.centers > 0).all(-1) & (traced.centers < [width, height]).all(-1)
    assert inside.any()


def test_images_are_written(traced: Trace, tmp_path: Path) -> None:
    for path in write_figures(traced, tmp_path, threshold=0.0):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert np.ptp(np.asarray(image)) > 200  # dark lines on a bright ground
