"""What a prediction is, in pixels, and how it becomes supervision key points, a drawing or COCO JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpetr.errors import InputError
from hpetr.images.read import ImageSource, load_image
from hpetr.poses.draw import draw_poses
from hpetr.poses.skeleton import COCO, Skeleton

if TYPE_CHECKING:
    import supervision as sv

# Fields with an entry for each pose.
POSE_FIELDS = ("keypoints", "keypoint_scores", "scores", "boxes", "labels")


@dataclass(frozen=True)
class PoseResult:
    """The poses of one image, best first; n poses of K keypoints, pixels of the original image, x to the right.

    Attributes:
        keypoints: (n, K, 2) float32 x, y.
        keypoint_scores: (n, K) float32 in 0..1.
        scores: (n,) float32 in 0..1.
        boxes: (n, 4) float32 xyxy.
        labels: (n,) int64 class indices.
        skeleton: names and edges of the K keypoints.
        image_size: (height, width).
        path: the file, where the image came from one.
    """

    keypoints: np.ndarray
    keypoint_scores: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    skeleton: Skeleton
    image_size: tuple[int, int]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: int | slice | Sequence[int] | np.ndarray) -> PoseResult:
        """Return the chosen poses, in the given order, as a result.

        Args:
            chosen: index, slice, boolean mask (n,) or array of indices.
        """
        if isinstance(chosen, int | np.integer):
            chosen = [int(chosen)]
        return replace(self, **{name: getattr(self, name)[chosen] for name in POSE_FIELDS})

    def to_supervision(self) -> sv.KeyPoints:
        """The same poses for supervision's annotators and trackers, with a confidence for each keypoint and pose."""
        import supervision as sv

        return sv.KeyPoints(
            xy=self.keypoints.astype(np.float32),
            class_id=self.labels.astype(int),
            keypoint_confidence=self.keypoint_scores.astype(np.float32),
            detection_confidence=self.scores.astype(np.float32),
        )

    @classmethod
    def from_supervision(
        cls,
        key_points: sv.KeyPoints,
        image_size: tuple[int, int],
        skeleton: Skeleton | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> PoseResult:
        """Poses of another library, or ones that supervision filtered, as a result; the inverse of `to_supervision`.

        Args:
            key_points: n poses of K keypoints. Without confidences every score is 1; a keypoint that is not `visible`
                gets score 0; without classes every label is 0.
            image_size: (height, width) of the image.
            skeleton: of the K keypoints; None takes COCO's for K = 17 and a generic one otherwise.
            path: of the image, for `draw` and the formats.

        Raises:
            InputError: the skeleton has another K.
        """
        count, joints = key_points.xy.shape[:2]
        if skeleton is None:
            skeleton = COCO if joints == COCO.num_keypoints else Skeleton.generic(max(joints, 1))
        if count and skeleton.num_keypoints != joints:
            raise InputError(f"key points: {joints} a pose, expected the skeleton's {skeleton.num_keypoints}")
        keypoints = np.asarray(key_points.xy, dtype=np.float32).reshape(count, skeleton.num_keypoints, 2)
        keypoint_scores = _or_ones(key_points.keypoint_confidence, keypoints.shape[:2])
        scores = _or_ones(key_points.detection_confidence, (count,))
        if key_points.visible is not None:
            keypoint_scores = np.where(key_points.visible, keypoint_scores, np.float32(0))
        labels = np.zeros(count) if key_points.class_id is None else key_points.class_id
        # The box of what is known: supervision puts missing keypoints at 0, 0.
        known = (keypoint_scores > 0) | ~(keypoint_scores > 0).any(axis=1, keepdims=True)
        low = np.where(known[..., None], keypoints, np.float32(np.inf)).min(axis=1)
        high = np.where(known[..., None], keypoints, np.float32(-np.inf)).max(axis=1)
        order = np.argsort(-scores, kind="stable")
        return cls(
            keypoints=keypoints[order],
            keypoint_scores=keypoint_scores[order],
            scores=scores[order],
            boxes=np.concatenate([low, high], axis=1)[order],
            labels=np.asarray(labels, dtype=np.int64)[order],
            skeleton=skeleton,
            image_size=image_size,
            path=None if path is None else Path(path),
        )

    def to_coco(self, image_id: int, category_id: int | Sequence[int] = 1) -> list[dict[str, Any]]:
        """The poses as COCO keypoint results, ready for JSON.

        Args:
            image_id: the image's id in the annotation file.
            category_id: one id for all poses, or a sequence that gives each label its id.

        Returns:
            n dicts `image_id`, `category_id`, `keypoints` (3K numbers x, y, score), `bbox` (x, y, width, height) and
            `score`.
        """
        poses = []
        for keypoints, keypoint_scores, score, box, label in zip(
            self.keypoints, self.keypoint_scores, self.scores, self.boxes, self.labels, strict=True
        ):
            triplets = np.concatenate([keypoints, keypoint_scores[:, None]], 1, dtype=np.float64)  # (K, 3)
            corner, far_corner = np.split(box.astype(np.float64), 2)
            poses.append(
                {
                    "image_id": image_id,
                    "category_id": category_id if isinstance(category_id, int) else category_id[int(label)],
                    "keypoints": triplets.round(3).ravel().tolist(),
                    "bbox": np.concatenate([corner, far_corner - corner]).round(3).tolist(),
                    "score": float(score),
                }
            )
        return poses

    def draw(
        self,
        image: ImageSource | None = None,
        keypoint_threshold: float = 0.3,
        track_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw the poses on a copy of the image.

        Args:
            image: the image; None reads it again from `path`.
            keypoint_threshold: keypoints with a lower score and their limbs are left out.
            track_ids: (n,) numbers of the persons in a video, which choose the colors and precede the scores.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            InputError: there is no image to draw on, or it has another size than the one predicted on.
        """
        source = self.path if image is None else image
        if source is None:
            raise InputError("draw: the prediction did not come from a file, expected the image as argument")
        canvas = load_image(source)
        if canvas.shape[:2] != self.image_size:
            raise InputError(
                f"draw: the image is {canvas.shape[:2]} (height, width), expected the predicted one's {self.image_size}"
            )
        poses = self.keypoints, self.keypoint_scores, self.scores, self.boxes
        return draw_poses(canvas, *poses, self.skeleton.edges, keypoint_threshold, track_ids)


def _or_ones(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32) if values is None else np.asarray(values, dtype=np.float32).reshape(shape)
