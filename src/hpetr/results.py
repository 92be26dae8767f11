"""What a prediction is, in pixels, and how it becomes supervision key points, a drawing or COCO JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpetr.data.images import ImageSource, load_image
from hpetr.errors import InputError
from hpetr.skeleton import Skeleton

if TYPE_CHECKING:
    import supervision as sv


@dataclass(frozen=True)
class PoseResult:
    """The poses of one picture, best first; n poses of K keypoints, pixels of the original picture, x to the right.

    Attributes:
        keypoints: (n, K, 2) float32 x, y.
        keypoint_scores: (n, K) float32 in 0..1.
        scores: (n,) float32 in 0..1.
        boxes: (n, 4) float32 xyxy.
        labels: (n,) int64 class indices.
        skeleton: names and edges of the K keypoints.
        image_size: (height, width).
        path: the file, where the picture came from one.
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

    def to_supervision(self) -> sv.KeyPoints:
        """The same poses for supervision's annotators and trackers, with a confidence for each keypoint and pose."""
        import supervision as sv

        return sv.KeyPoints(
            xy=self.keypoints.astype(np.float32),
            class_id=self.labels.astype(int),
            keypoint_confidence=self.keypoint_scores.astype(np.float32),
            detection_confidence=self.scores.astype(np.float32),
        )

    def to_coco(self, image_id: int, category_id: int | Sequence[int] = 1) -> list[dict[str, Any]]:
        """The poses as COCO keypoint results, ready for JSON.

        Args:
            image_id: the picture's id in the annotation file.
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

    def draw(self, image: ImageSource | None = None, keypoint_threshold: float = 0.3) -> np.ndarray:
        """A copy of the picture with the poses drawn on it.

        Args:
            image: the picture; None reads it again from `path`.
            keypoint_threshold: keypoints with a lower score, and the limbs that end there, are left out.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            InputError: there is no picture to draw on, or it has another size than the one predicted on.
        """
        from hpetr.draw import draw_poses

        source = self.path if image is None else image
        if source is None:
            raise InputError("draw: the prediction did not come from a file, expected the picture as argument")
        picture = load_image(source)
        if picture.shape[:2] != self.image_size:
            raise InputError(
                f"draw: the picture is {picture.shape[:2]} (height, width), expected the predicted one's "
                f"{self.image_size}"
            )
        return draw_poses(picture, self, keypoint_threshold)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or none: a reader never sees half of it, and a failure leaves an older file as it was.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of JSON; numbers that JSON does not have (NaN, infinity) are an error, not a broken file."""
    write_bytes(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def check_writable(folder: Path) -> None:
    """Create the folder and prove that a file can be made in it, before any work is done.

    Raises:
        InputError: it cannot be created or written.
    """
    probe = folder / f".hpetr-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder ({error.strerror})") from error
