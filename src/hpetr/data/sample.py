"""An image with its labels, and the affine map of labels with their image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

LABEL_FIELDS = ("keypoints", "boxes", "areas", "class_labels", "ignore_boxes")


@dataclass
class Sample:
    """An image and its n people. Coordinates are pixels of `image`: x in 0..W, y in 0..H, 0 at the image's edge.

    A keypoint that is not labelled is 0, 0, 0, and one that is known to be invisible 0, 0, -1. `ignore_boxes` hold
    crowds and people without labelled keypoints: they are neither people to find nor background.
    """

    image: np.ndarray  # (H, W, 3) uint8 RGB
    keypoints: np.ndarray  # (n, K, 3) float32 x, y, visibility
    boxes: np.ndarray  # (n, 4) float32 x1, y1, x2, y2
    areas: np.ndarray  # (n,) float32 pixels^2
    class_labels: np.ndarray  # (n,) int64
    ignore_boxes: np.ndarray  # (m, 4) float32 x1, y1, x2, y2
    image_id: int
    path: Path


def move_labels(sample: Sample, image: np.ndarray, matrix: np.ndarray) -> Sample:
    """Return the sample with a new image, made from its own by an affine map, and the labels mapped with it.

    Keypoints outside the new image become unlabelled and people without any are dropped; boxes become the extent of
    their mapped corners, clipped to the image, and ignored boxes without extent are dropped; areas scale with the
    map's area.

    Args:
        sample: the image and labels before the map.
        image: (H', W', 3) uint8.
        matrix: (2, 3), maps old pixel coordinates x, y, 1 to new ones.
    """
    height, width = image.shape[:2]
    keypoints = np.zeros_like(sample.keypoints)
    xy = sample.keypoints[..., :2] @ matrix[:, :2].T + matrix[:, 2]  # (n, K, 2)
    inside = (xy >= 0).all(-1) & (xy <= (width, height)).all(-1) & (sample.keypoints[..., 2] > 0)  # (n, K)
    keypoints[inside, :2] = xy[inside]
    keypoints[..., 2] = np.where(inside, sample.keypoints[..., 2], np.minimum(sample.keypoints[..., 2], 0))
    kept = inside.any(axis=1)  # (n,)
    ignore_boxes = _move_boxes(sample.ignore_boxes, matrix, height, width)
    has_extent = (ignore_boxes[:, 2:] > ignore_boxes[:, :2]).all(axis=1)  # (m,)
    scale = np.float32(abs(np.linalg.det(matrix[:, :2])))
    return replace(
        sample,
        image=image,
        keypoints=keypoints[kept],
        boxes=_move_boxes(sample.boxes[kept], matrix, height, width),
        areas=sample.areas[kept] * scale,
        class_labels=sample.class_labels[kept],
        ignore_boxes=ignore_boxes[has_extent],
    )


def _move_boxes(boxes: np.ndarray, matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] @ matrix[:, :2].T + matrix[:, 2]  # (n, 4, 2)
    moved = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)  # (n, 4)
    return moved.clip(0, (width, height, width, height)).astype(np.float32)
