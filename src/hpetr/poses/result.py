"""The poses of an image, and how they become a drawing, a file, or data of other libraries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpetr.errors import InputError, needs_extra
from hpetr.images.files import check_output, write_bytes
from hpetr.images.read import JPEG_SUFFIXES, ImageSource, encode_image, load_image
from hpetr.poses.draw import DrawingStyle, draw_poses
from hpetr.poses.postprocess import KEYPOINT_THRESHOLD, are_found, boxes_around, select_poses
from hpetr.poses.skeleton import COCO, Skeleton

if TYPE_CHECKING:
    import pandas as pd
    import supervision as sv

# Fields with an entry for each pose: their shapes after (n,), None for the number of keypoints, and their types.
POSE_FIELDS: dict[str, tuple[tuple[int | None, ...], type]] = {
    "keypoints": ((None, 2), np.float32),
    "keypoint_scores": ((None,), np.float32),
    "scores": ((), np.float32),
    "boxes": ((4,), np.float32),
    "labels": ((), np.int64),
}


@dataclass(frozen=True, eq=False)
class PoseResult:
    """The poses of one image, best first; n poses of K keypoints, in pixels of the original image.

    `len` gives n, and iteration one result for each pose. Two results are equal if all fields are.

    Attributes:
        keypoints: (n, K, 2) float32 x, y.
        keypoint_scores: (n, K) float32 in 0..1.
        scores: (n,) float32 in 0..1.
        boxes: (n, 4) float32 xyxy around the keypoints that count as found, around all if none does.
        labels: (n,) int64 class indices.
        skeleton: names and edges of the K keypoints.
        image_size: (height, width).
        path: the file that the image came from, or None.
        keypoint_threshold: keypoints with a lower score do not count as found.

    Raises:
        InputError: shapes disagree, a number is NaN or infinite, or a class index is negative.
    """

    keypoints: np.ndarray
    keypoint_scores: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    skeleton: Skeleton
    image_size: tuple[int, int]
    path: Path | None = None
    keypoint_threshold: float = KEYPOINT_THRESHOLD

    def __post_init__(self) -> None:
        count = len(self.scores)
        for name, (shape, kind) in POSE_FIELDS.items():
            values = np.asarray(getattr(self, name))
            expected = (count, *(self.skeleton.num_keypoints if side is None else side for side in shape))
            if values.shape != expected:
                raise InputError(f"poses: {name} of shape {values.shape}, expected {expected}")
            if not np.isfinite(values).all():
                raise InputError(f"poses: {name} is not finite everywhere, expected numbers")
            object.__setattr__(self, name, values.astype(kind, copy=False))
        if (self.labels < 0).any():
            raise InputError(f"poses: labels has {self.labels.min()}, expected class indices from 0")
        height, width = (int(side) for side in self.image_size)
        object.__setattr__(self, "image_size", (height, width))

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

    def __iter__(self) -> Iterator[PoseResult]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PoseResult):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((len(self), self.skeleton, self.image_size, self.path))

    @property
    def found(self) -> np.ndarray:
        """(n, K) bool, see `are_found`."""
        return are_found(self.keypoint_scores, self.keypoint_threshold)

    @property
    def extents(self) -> np.ndarray:
        """(n, 4) float32 xyxy around all keypoints, also uncertain ones, as in published results."""
        return boxes_around(self.keypoints, self.keypoint_scores)

    def with_keypoint_threshold(self, threshold: float) -> PoseResult:
        """Return the same poses with another `keypoint_threshold` and the boxes that follow from it."""
        boxes = boxes_around(self.keypoints, self.keypoint_scores, threshold)
        return replace(self, boxes=boxes, keypoint_threshold=threshold)

    @classmethod
    def from_outputs(
        cls,
        outputs: Mapping[str, np.ndarray],
        sizes: Sequence[tuple[int, int]],
        skeleton: Skeleton,
        threshold: float,
        keypoint_threshold: float,
    ) -> list[PoseResult]:
        """Return the result of each image of a batch; arguments and errors are those of `select_poses`."""
        return [
            cls(**poses, skeleton=skeleton, image_size=size, keypoint_threshold=keypoint_threshold)  # type: ignore[arg-type]
            for size, poses in zip(sizes, select_poses(outputs, sizes, threshold, keypoint_threshold), strict=True)
        ]

    def to_supervision(self) -> sv.KeyPoints:
        """Return the poses for supervision's annotators and trackers, with all scores; found keypoints are visible.

        Raises:
            InputError: supervision is not installed.
        """
        with needs_extra("supervision", "to_supervision"):
            import supervision as sv
        return sv.KeyPoints(
            xy=self.keypoints,
            class_id=self.labels.astype(int),
            keypoint_confidence=self.keypoint_scores,
            detection_confidence=self.scores,
            visible=self.found,
        )

    @classmethod
    def from_supervision(
        cls,
        key_points: sv.KeyPoints,
        image_size: tuple[int, int],
        skeleton: Skeleton | None = None,
        path: str | os.PathLike[str] | None = None,
        keypoint_threshold: float = KEYPOINT_THRESHOLD,
    ) -> PoseResult:
        """Return poses of another library, or ones that supervision filtered, as a result.

        Args:
            key_points: n poses of K keypoints. Without confidences every score is 1, without classes every label 0.
                Keypoints that are NaN or not `visible` get score 0, those that are NaN also place 0, 0.
            image_size: (height, width) of the image.
            skeleton: of the K keypoints; None takes COCO's for K = 17 and a generic one otherwise.
            path: of the image, for `draw` and the formats.
            keypoint_threshold: keypoints with a lower score do not count as found.

        Raises:
            InputError: the skeleton has another K, or see `PoseResult`.
        """
        count, joints = key_points.xy.shape[:2]
        if skeleton is None:
            skeleton = COCO if joints == COCO.num_keypoints else Skeleton.generic(max(joints, 1))
        if count and skeleton.num_keypoints != joints:
            raise InputError(f"key points: {joints} a pose, expected the skeleton's {skeleton.num_keypoints}")
        shape = count, skeleton.num_keypoints
        keypoints = np.asarray(key_points.xy, dtype=np.float32)[..., :2].reshape(*shape, 2)
        keypoint_scores = _or_ones(key_points.keypoint_confidence, shape)
        known = np.isfinite(keypoints).all(axis=2) & np.isfinite(keypoint_scores)  # (n, K)
        keypoints = np.where(known[..., None], keypoints, np.float32(0))
        if key_points.visible is not None:
            # Scores below the threshold are kept: their keypoints are not found anyway.
            known &= np.asarray(key_points.visible, bool) | (keypoint_scores < keypoint_threshold)
        keypoint_scores = np.where(known, keypoint_scores, np.float32(0))
        scores = _or_ones(key_points.detection_confidence, (count,))
        result = cls(
            keypoints=keypoints,
            keypoint_scores=keypoint_scores,
            scores=scores,
            boxes=boxes_around(keypoints, keypoint_scores, keypoint_threshold),
            labels=np.zeros(count) if key_points.class_id is None else np.asarray(key_points.class_id),
            skeleton=skeleton,
            image_size=image_size,
            path=None if path is None else Path(path),
            keypoint_threshold=keypoint_threshold,
        )
        return result[np.argsort(-scores, kind="stable")]

    def to_coco(self, image_id: int, category_id: int | Sequence[int] | np.ndarray = 1) -> list[dict[str, Any]]:
        """Return the poses as COCO keypoint results, ready for JSON.

        Args:
            image_id: the image's id in the annotation file.
            category_id: one id for all poses, or a sequence that gives each label its id.

        Returns:
            n dicts `image_id`, `category_id`, `keypoints` (3K numbers x, y, score), `bbox` (x, y, width, height of
            all keypoints) and `score`.
        """
        ids = (
            np.broadcast_to(category_id, len(self)) if np.ndim(category_id) == 0 else np.take(category_id, self.labels)
        )
        triplets = np.concatenate([self.keypoints, self.keypoint_scores[..., None]], 2, dtype=np.float64)  # (n, K, 3)
        corners = self.extents.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)  # (n, 4)
        return [
            {"image_id": int(image_id), "category_id": number, "keypoints": keypoints, "bbox": box, "score": score}
            for number, keypoints, box, score in zip(
                ids.tolist(),
                triplets.round(3).reshape(len(self), 3 * self.keypoints.shape[1]).tolist(),
                boxes.round(3).tolist(),
                self.scores.tolist(),
                strict=True,
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return `file_name` (or None), `width`, `height` and `poses` as of `to_coco`, ready for JSON."""
        height, width = self.image_size
        poses = self.to_coco(0, range(1, int(self.labels.max(initial=0)) + 2))
        for pose in poses:
            del pose["image_id"]
        return {
            "file_name": None if self.path is None else str(self.path),
            "width": width,
            "height": height,
            "poses": poses,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON in one line."""
        return json.dumps(self.to_dict())

    def to_columns(self) -> dict[str, np.ndarray]:
        """Return the poses as columns of a table.

        Returns:
            Arrays (n,) `person` (from 1, best first), `label`, `score`, the box's `left`, `top`, `right`, `bottom`, and
            for each keypoint NAME `NAME_x`, `NAME_y`, `NAME_score`.
        """
        columns = {"person": np.arange(1, len(self) + 1), "label": self.labels, "score": self.scores}
        columns |= dict(zip(("left", "top", "right", "bottom"), self.boxes.T, strict=True))
        for index, name in enumerate(self.skeleton.names):
            columns |= {f"{name}_x": self.keypoints[:, index, 0], f"{name}_y": self.keypoints[:, index, 1]}
            columns[f"{name}_score"] = self.keypoint_scores[:, index]
        return columns

    def to_dataframe(self) -> pd.DataFrame:
        """Return `to_columns` as a pandas DataFrame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise InputError(
                "to_dataframe: the package pandas is missing, expected after pip install pandas"
            ) from error
        return pd.DataFrame(self.to_columns())

    def draw(
        self,
        image: ImageSource | None = None,
        keypoint_threshold: float | None = None,
        track_ids: np.ndarray | None = None,
        style: DrawingStyle | None = None,
    ) -> np.ndarray:
        """Draw the poses on a copy of the image.

        Args:
            image: the image; None reads it again from `path`.
            keypoint_threshold: keypoints with a lower score and their limbs are left out; None takes the result's.
            track_ids: (n,) numbers of the persons in a video, which choose the colors and precede the scores.
            style: line width, labels and boxes; None means the default.

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
        found = self.found if keypoint_threshold is None else are_found(self.keypoint_scores, keypoint_threshold)
        edges, pairs = self.skeleton.edges, self.skeleton.flip_pairs
        return draw_poses(canvas, self.keypoints, found, self.scores, self.boxes, edges, pairs, track_ids, style)

    def save(self, path: str | os.PathLike[str], image: ImageSource | None = None) -> Path:
        """Write `draw` (.jpg, .png) or `to_json` (.json), by the suffix; returns the path.

        Raises:
            InputError: another suffix, the predicted image itself, or see `draw`.
        """
        inputs = [] if self.path is None else [self.path]
        target = check_output(path, inputs, (".json", ".png", *sorted(JPEG_SUFFIXES)))
        is_json = target.suffix.lower() == ".json"
        write_bytes(target, self.to_json().encode() if is_json else encode_image(self.draw(image), target.suffix))
        return target

    def show(self, image: ImageSource | None = None) -> None:
        """Show `draw` in this computer's image viewer."""
        from PIL import Image

        Image.fromarray(self.draw(image)).show()


def _or_ones(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32) if values is None else np.asarray(values, dtype=np.float32).reshape(shape)
