"""Flip test: the poses of an image and of its mirror image, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hpetr.errors import InputError
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.result import POSE_FIELDS, PoseResult
from hpetr.poses.skeleton import Skeleton

# As published for PETR on CrowdPose: linear decay of boxes that overlap by half, and nothing below this score.
IOU_THRESHOLD = 0.5
MIN_SCORE = 1e-3


def predict_batch_flipped(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    images: Sequence[np.ndarray],
    threshold: float | None = None,
    precision: str = "float32",
) -> list[PoseResult]:
    """Predict the poses of a batch of images and of their mirror images, merged to at most `num_poses` per image.

    Args:
        model: see `predict_batch`.
        processor: see `predict_batch`.
        images: see `predict_batch`.
        threshold: minimum score of a pose before the merge, exclusive; None means the processor's.
        precision: see `predict_batch`.

    Raises:
        InputError: the model's data do not say how keypoints change places (`Skeleton.can_flip`).
    """
    if not Skeleton.from_dict(model.config.skeleton).can_flip:
        raise InputError("flip test: the model's skeleton has no mirror pairs, expected a model trained with them")
    mirror_images = [np.ascontiguousarray(image[:, ::-1]) for image in images]
    plain, mirrored = (
        predict_batch(model, processor, batch, threshold, precision) for batch in (images, mirror_images)
    )
    most = model.config.num_poses
    return [merge_poses(a, mirror_poses(b))[:most] for a, b in zip(plain, mirrored, strict=True)]


def mirror_poses(result: PoseResult) -> PoseResult:
    """Return the poses in the mirror image: x becomes width - x, left and right keypoints change places."""
    width = np.float32(result.image_size[1])
    order = result.skeleton.flip_index
    keypoints = result.keypoints[:, order].copy()  # (n, K, 2)
    keypoints[..., 0] = width - keypoints[..., 0]
    boxes = result.boxes.copy()  # (n, 4)
    boxes[:, [0, 2]] = width - result.boxes[:, [2, 0]]
    return replace(result, keypoints=keypoints, keypoint_scores=result.keypoint_scores[:, order], boxes=boxes)


def merge_poses(first: PoseResult, second: PoseResult) -> PoseResult:
    """Return the poses of two results of one image, best first, with the scores after soft NMS on their boxes."""
    arrays: dict[str, Any] = {n: np.concatenate([getattr(first, n), getattr(second, n)]) for n in POSE_FIELDS}
    both = replace(first, **arrays)
    kept, scores = soft_nms(both.extents, both.scores, both.labels)
    return replace(both[kept], scores=scores)


def soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    iou_threshold: float = IOU_THRESHOLD,
    min_score: float = MIN_SCORE,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the poses that remain after linear soft NMS.

    The best pose is kept, and every pose of its class whose box overlaps by `iou_threshold` or more has its score
    multiplied by 1 - IoU. The best of the rest follows.

    Args:
        boxes: (n, 4) xyxy.
        scores: (n,).
        labels: (n,) classes.
        iou_threshold: minimum overlap that lowers a score.
        min_score: minimum score of a pose.

    Returns:
        Indices (m,) of the poses, best first, and their new scores (m,) float32.
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
        # The box of a pose in one point has no area and overlaps nothing.
        iou = shared / np.maximum(areas[best] + areas - shared, np.finfo(np.float32).tiny)
        touched = (iou >= iou_threshold) & (labels == labels[best])
        left = np.where(touched, left * (1 - iou), left)
        waiting &= left >= min_score
    return np.array(kept, dtype=np.int64), np.array(kept_scores, dtype=np.float32)
