"""Flip test: mirroring, merging, and the whole way through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.data.dataset import open_dataset
from hpetr.evaluation.evaluate import evaluate
from hpetr.images.read import load_image
from hpetr.inference.flip_test import merge_poses, mirror_poses, predict_batch_flipped, soft_nms
from hpetr.inference.torch_predictor import predict_batch
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import COCO
from paths import EXAMPLES
from perfect_network import PerfectNetwork

TINY = EXAMPLES / "tiny-coco"


def poses_in(boxes: list[list[float]], scores: list[float], seed: int = 0) -> PoseResult:
    """Poses that fill these boxes of an image 200 pixels wide."""
    rng = np.random.default_rng(seed)
    corners = np.array(boxes, dtype=np.float32)
    share = rng.random((len(boxes), 17, 2), dtype=np.float32)
    share[:, 0], share[:, 1] = 0, 1
    low, high = corners[:, None, :2], corners[:, None, 2:]
    return PoseResult(
        keypoints=low + share * (high - low),
        keypoint_scores=rng.random((len(boxes), 17), dtype=np.float32),
        scores=np.array(scores, dtype=np.float32),
        boxes=corners,
        labels=np.zeros(len(boxes), dtype=np.int64),
        skeleton=COCO,
        image_size=(100, 200),
    )


def slow_soft_nms(boxes: Any, scores: Any, labels: Any) -> tuple[list[int], list[float]]:
    """One pose and one overlap at a time, on plain numbers."""

    def iou(a: list[float], b: list[float]) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    waiting = [(float(score), index) for index, score in enumerate(scores)]
    kept, left = [], []
    while waiting := [(score, index) for score, index in waiting if score >= 0.001]:
        score, best = max(waiting)
        kept.append(best)
        left.append(score)
        others = []
        for other_score, other in waiting:
            overlap = iou(boxes[best], boxes[other]) if labels[other] == labels[best] else 0
            if other != best:
                others.append((other_score * (1 - overlap) if overlap >= 0.5 else other_score, other))
        waiting = others
    return kept, left


@pytest.mark.parametrize("seed", range(5))
def test_soft_nms_equals_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 30, (60, 2))
    boxes = np.concatenate([low, low + rng.uniform(20, 60, (60, 2))], axis=1)
    scores, labels = rng.random(60), rng.integers(0, 2, 60)
    scores[:3] = (0.0005, 0.001, 0)
    kept, left = soft_nms(boxes, scores, labels)
    expected, expected_left = slow_soft_nms(boxes.tolist(), scores, labels)
    assert kept.tolist() == expected
    assert left == pytest.approx(expected_left, rel=1e-6)
    assert len(kept) < 60, "a case where some poses go"
    assert (left < scores[kept] - 0.01).any(), "and some only fall"


def test_poses_in_one_point_and_no_poses() -> None:
    points = np.array([[5, 5, 5, 5], [5, 5, 5, 5]], dtype=np.float32)
    kept, left = soft_nms(points, np.array([0.4, 0.6]), np.zeros(2))
    assert kept.tolist() == [1, 0]
    assert left == pytest.approx([0.6, 0.4])
    kept, left = soft_nms(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    assert kept.shape == left.shape == (0,)


def test_mirror_swaps_left_and_right_and_is_its_own_inverse() -> None:
    result = poses_in([[10, 20, 50, 90]], [0.8])
    mirrored = mirror_poses(result)
    nose, left_wrist, right_wrist = (COCO.names.index(name) for name in ("nose", "left_wrist", "right_wrist"))
    assert mirrored.boxes[0].tolist() == [150, 20, 190, 90]
    assert mirrored.keypoints[0, nose].tolist() == [190, 20]
    x, y = result.keypoints[0, left_wrist]
    assert mirrored.keypoints[0, right_wrist] == pytest.approx([200 - x, y])
    assert mirrored.keypoint_scores[0, right_wrist] == result.keypoint_scores[0, left_wrist]
    again = mirror_poses(mirrored)
    np.testing.assert_allclose(again.keypoints, result.keypoints, atol=1e-4)
    np.testing.assert_array_equal(again.keypoint_scores, result.keypoint_scores)
    np.testing.assert_allclose(again.boxes, result.boxes, atol=1e-4)


def test_merging_a_result_with_itself_changes_nothing() -> None:
    result = poses_in([[0, 0, 40, 90], [30, 0, 80, 90], [100, 0, 150, 90]], [0.9, 0.5, 0.002])
    merged = merge_poses(result, result)
    for name in ("keypoints", "keypoint_scores", "scores", "boxes", "labels"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(result, name))


def test_merging_keeps_whom_only_one_pass_found_and_lowers_doubles() -> None:
    first = poses_in([[0, 0, 40, 100]], [0.7])
    second = poses_in([[0, 0, 40, 80], [100, 0, 150, 90]], [0.9, 0.3], seed=1)
    merged = merge_poses(first, second)
    assert merged.scores == pytest.approx([0.9, 0.3, 0.7 * (1 - 0.8)])
    np.testing.assert_array_equal(merged.keypoints[:2], second.keypoints)
    np.testing.assert_array_equal(merged.keypoints[2], first.keypoints[0])


def test_mirrored_image_gives_the_mirrored_poses(checkpoint: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    images = [load_image(EXAMPLES / name) for name in ("000000000885.jpg", "000000239537.jpg")]
    plain = predict_batch_flipped(model, processor, images)
    flipped = predict_batch_flipped(model, processor, [image[:, ::-1] for image in images])
    for one, other, alone in zip(plain, flipped, predict_batch(model, processor, images), strict=True):
        back = mirror_poses(other)
        assert 1 < len(one) <= model.config.num_poses
        np.testing.assert_allclose(back.scores, one.scores, atol=1e-5)
        np.testing.assert_allclose(back.keypoints, one.keypoints, atol=1e-2)
        assert len(one) != len(alone) or not np.allclose(one.scores, alone.scores, atol=1e-4), "the mirror took part"


def test_evaluation_with_a_perfect_network(checkpoint: Path) -> None:
    """A network that answers with the people of the image, and of its mirror image when it sees that one."""
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = open_dataset(TINY / "annotations.json")

    network = PerfectNetwork(model.config, dataset, mirrored=True)
    result = evaluate(network, processor, dataset, flip_test=True)
    assert result.metrics["AP"] == pytest.approx(1)
    assert result.flip_test
    assert len(result.results) == sum(len(dataset[index].keypoints) for index in range(len(dataset)))
