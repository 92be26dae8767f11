"""From the network's outputs to poses in image pixels: the one rule of checkpoints and exported models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hpetr.errors import InputError

# Of models that state none.
KEYPOINT_THRESHOLD = 0.3


def select_poses(
    outputs: Mapping[str, np.ndarray],
    sizes: Sequence[Sequence[float]],
    threshold: float,
    keypoint_threshold: float,
) -> list[dict[str, np.ndarray]]:
    """Select the poses with a score above the threshold and scale them to their images.

    Args:
        outputs: `scores` (B, T) float32, `poses` (B, T, K, 2) float32 x, y, 1 = width and height of the image,
            `pose_labels` (B, T) class indices, `keypoint_scores` (B, T, K).
        sizes: B pairs (height, width) of the original images.
        threshold: of pose scores.
        keypoint_threshold: keypoints with a lower score do not count in boxes, see `boxes_around`.

    Returns:
        Per image a dict of arrays, best pose first: `scores` (n,), `keypoints` (n, K, 2) clipped to the image,
        `keypoint_scores` (n, K), `boxes` (n, 4) xyxy around the found keypoints, `labels` (n,).

    Raises:
        InputError: scores or poses that are NaN or infinite.
    """
    scores, poses = outputs["scores"], outputs["poses"]
    if not (np.isfinite(scores).all() and np.isfinite(poses).all()):
        raise InputError("the model's poses are no finite numbers, its weights are damaged or were never trained")
    results = []
    for index, (height, width) in enumerate(sizes):
        order = np.argsort(-scores[index], kind="stable")
        kept = order[scores[index][order] > threshold]  # (n,)
        # The official code goes through the resized image's pixels and back, which cancels.
        keypoints = poses[index][kept].clip(0, 1) * np.array([width, height], np.float32)  # (n, K, 2)
        keypoint_scores = outputs["keypoint_scores"][index][kept]  # (n, K)
        results.append(
            {
                "scores": scores[index][kept],
                "keypoints": keypoints,
                "keypoint_scores": keypoint_scores,
                "boxes": boxes_around(keypoints, keypoint_scores, keypoint_threshold),
                "labels": outputs["pose_labels"][index][kept],
            }
        )
    return results


def are_found(keypoint_scores: np.ndarray, keypoint_threshold: float) -> np.ndarray:
    """Return whether keypoints count as found: not for a score below the threshold, and never for 0."""
    return (keypoint_scores >= keypoint_threshold) & (keypoint_scores > 0)


def boxes_around(keypoints: np.ndarray, keypoint_scores: np.ndarray, keypoint_threshold: float = 0) -> np.ndarray:
    """Return boxes (n, 4) xyxy around the found of keypoints (n, K, 2).

    Of a pose without found keypoints the box is around those with a score above 0, else around all K.
    """
    counted = are_found(keypoint_scores, keypoint_threshold)  # (n, K)
    for others in (keypoint_scores > 0, np.ones_like(counted)):
        counted = np.where(counted.any(axis=1, keepdims=True), counted, others)
    low = np.where(counted[..., None], keypoints, np.float32(np.inf)).min(axis=1)
    high = np.where(counted[..., None], keypoints, np.float32(-np.inf)).max(axis=1)
    return np.concatenate([low, high], axis=1)
