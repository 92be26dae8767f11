"""Poses drawn on an image: one color a person, lines as thick as person and image are large."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import cv2
import numpy as np
import supervision as sv

if TYPE_CHECKING:
    from hpetr.poses.result import PoseResult

OUTLINE = sv.Color(20, 20, 20)
# Neighboring ranks get hues this far apart, and no two of many people the same one.
GOLDEN_RATIO = 0.618034


def draw_poses(
    image: np.ndarray, result: PoseResult, keypoint_threshold: float = 0.3, track_ids: np.ndarray | None = None
) -> np.ndarray:
    """A copy of the image with limbs, joints and the score of every pose; the best pose is drawn on top.

    Args:
        image: (H, W, 3) uint8 RGB.
        result: poses in this image's pixels.
        keypoint_threshold: keypoints with a lower score, and the limbs that end there, are left out.
        track_ids: (n,) numbers of people in a video: they choose the colors and stand before the scores.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    numbers = range(len(result)) if track_ids is None else [int(number) for number in track_ids]
    colors = [person_color(number) for number in numbers]
    labels = [f"{score:.2f}" for score in result.scores]
    if track_ids is not None:
        labels = [f"{number}: {label}" for number, label in zip(numbers, labels, strict=True)]
    scene = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)  # supervision paints in OpenCV's channel order
    order = range(len(result) - 1, -1, -1)
    for index in order:
        _draw_person(scene, result, index, colors[index], keypoint_threshold)
    for index in order:
        _draw_label(scene, result.boxes[index], labels[index], colors[index])
    return cv2.cvtColor(scene, cv2.COLOR_BGR2RGB)


def person_color(index: int) -> sv.Color:
    """A bright color for the person of this rank or track."""
    lightness = (0.55, 0.68, 0.45)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(index * GOLDEN_RATIO % 1, lightness, 0.95)
    return sv.Color(round(red * 255), round(green * 255), round(blue * 255))


def line_width(box: np.ndarray, image_shape: tuple[int, ...]) -> int:
    """Pixels: grows with the person, box (4,) xyxy, and with the image, and never covers a small person."""
    person = float(max(box[2] - box[0], box[3] - box[1]))
    image = float(max(image_shape[:2]))
    return max(1, round(min(0.012 * person + 0.0015 * image, 0.008 * image)))


def _draw_person(
    scene: np.ndarray, result: PoseResult, index: int, own_color: sv.Color, keypoint_threshold: float
) -> None:
    person = sv.KeyPoints(
        xy=result.keypoints[index : index + 1].round().astype(np.float32),  # the annotators cut decimals off
        keypoint_confidence=result.keypoint_scores[index : index + 1],
        visible=result.keypoint_scores[index : index + 1] >= keypoint_threshold,
    )
    width = line_width(result.boxes[index], scene.shape)
    edges = [(first + 1, second + 1) for first, second in result.skeleton.edges]  # supervision counts from 1
    # A dark pass below the colored one keeps every hue readable on every background.
    rim = max(1, width // 2)
    for color, extra in ((OUTLINE, rim), (own_color, 0)):
        if edges:
            sv.EdgeAnnotator(color, thickness=width + 2 * extra, edges=edges).annotate(scene, person)
        sv.VertexAnnotator(color, radius=round(1.4 * width) + extra).annotate(scene, person)


def _draw_label(scene: np.ndarray, person_box: np.ndarray, text: str, color: sv.Color) -> None:
    """The score on the person's color, above the box where there is room, and inside the image."""
    height, width = scene.shape[:2]
    scale = min(1.5, max(0.35, 0.0007 * max(height, width)))
    thickness = max(1, round(scale * 1.5))
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    pad = max(2, round(4 * scale))
    x = int(np.clip(person_box[0], 0, max(0, width - text_width - 2 * pad)))
    above = person_box[1] - line_width(person_box, scene.shape) - pad
    y = int(np.clip(above, text_height + 2 * pad, height - 1))  # baseline of the label's box
    cv2.rectangle(scene, (x, y - text_height - 2 * pad), (x + text_width + 2 * pad, y), color.as_bgr(), cv2.FILLED)
    luminance = 0.299 * color.r + 0.587 * color.g + 0.114 * color.b
    ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
    cv2.putText(scene, text, (x + pad, y - pad), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thickness, lineType=cv2.LINE_AA)
