"""Flip test: the poses of an image and of its mirror image, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.result import PoseResult

# As published for PETR on CrowdPose: linear decay of boxes that overlap by half, and nothing below this score.
IOU_THRESHOLD = 0.5
MIN_SCORE = 1e-3


def predict_batch_flipped(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    images: Sequence[np.ndarray],
    threshold: float | None = None,
) -> list[PoseResult]:
    """`predict_batch` with a flip test: two passes, and at most as many poses an image as one pass gives.

    Args:
        images: B arrays (H, W, 3) uint8 RGB.
        threshold: only poses with a higher score go into the merge; None takes the processor's.
    """
    plain = predict_batch(model, processor, images, threshold)
    mirrored = predict_batch(model, processor, [np.ascontiguousarray(p[:, ::-1]) for p in images], threshold)
    most = model.config.num_poses
    return [merge_poses(a, mirror_poses(b))[:most] for a, b in zip(plain, mirrored, strict=True)]


def mirror_poses(result: PoseResult) -> PoseResult:
    """The poses in the mirrored image: x becomes width - x, left and right of the skeleton change places."""
    width = np.float32(result.image_size[1])
    order = result.skeleton.flip_index
    keypoints = result.keypoints[:, order].copy()  # (n, K, 2)
    keypoints[..., 0] = width - keypoints[..., 0]
    boxes = result.boxes.copy()  # (n, 4)
    boxes[:, [0, 2]] = width - result.boxes[:, [2, 0]]
    return replace(result, keypoints=keypoints, keypoint_scores=result.keypoint_scores[:, order], boxes=boxes)


def merge_poses(first: PoseResult, second: PoseResult) -> PoseResult:
    """The poses of both, best first, with the scores that soft NMS on their boxes leaves; of one image."""
    both = replace(
        first,
        keypoints=np.concatenate([first.keypoints, second.keypoints]),
        keypoint_scores=np.concatenate([first.keypoint_scores, second.keypoint_scores]),
        scores=np.concatenate([first.scores, second.scores]),
        boxes=np.concatenate([first.boxes, second.boxes]),
        labels=np.concatenate([first.labels, second.labels]),
    )
    kept, scores = soft_nms(both.boxes, both.scores, both.labels)
    return replace(both[kept], scores=scores)


def soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float = IOU_THRESHOLD,
    min_score: float = MIN_SCORE,
) -> tuple[np.ndarray, np.ndarray]:
    """Linear soft NMS: the best pose is taken, every pose of its class whose box overlaps its by at least
    `iou_threshold` has its score multiplied with 1 - IoU, and so on with the best of the rest.

    Args:
        boxes: (n, 4) xyxy.
        scores: (n,).
        labels: (n,) classes.
        iou_threshold: the overlap from which on a score falls.
        min_score: poses that fall below it are dropped.

    Returns:
        Indices (m,) of the poses that are left, best first, and their new scores (m,) float32.
    """
    left = scores.astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)  # (n,)
    kept: list[int] = []
    kept_scores: list[float] = []
    waiting = left >= min_score  # (n,)
    while waiting.any():
        best = int(np.where(waiting, left, -1).argmax())
        kept.append(best)
        kept_scores.append(left[best])
        waiting[best] = False
        low, high = np.maximum(boxes[best, :2], boxes[:, :2]), np.minimum(boxes[best, 2:], boxes[:, 2:])  # (n, 2)
        shared = (high - low).clip(0).prod(axis=1)  # (n,)
        # A pose in one point has a box without area: it overlaps nothing.
        iou = shared / np.maximum(areas[best] + areas - shared, np.finfo(np.float32).tiny)
        touched = (iou >= iou_threshold) & (labels == labels[best])
        left = np.where(touched, left * (1 - iou), left)
        waiting &= left >= min_score
    return np.array(kept, dtype=np.int64), np.array(kept_scores, dtype=np.float32)
