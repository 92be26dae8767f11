"""Drawing of poses on images, in place or on a copy."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np

Color: TypeAlias = tuple[int, int, int]

OUTLINE: Color = (20, 20, 20)
# Limbs between keypoints of different colors.
MIDDLE: Color = (255, 235, 80)
# Hues of neighboring ranks differ by this share of the circle, and those of all ranks from each other.
GOLDEN_RATIO = 0.618034


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    shown: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    track_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Draw limbs, keypoints and the score of n poses on a copy of the image, the first pose on top.

    Args:
        image: (H, W, 3) uint8 RGB.
        keypoints: (n, K, 2) pixels.
        shown: (n, K) bool: the keypoints to draw, with the limbs that connect two of them.
        scores: (n,).
        boxes: (n, 4) xyxy pixels: they set the line widths and the places of the scores.
        edges: pairs of keypoint indices.
        track_ids: (n,) numbers of the persons in a video, which choose the colors and precede the scores.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    scene = image.copy()
    labels = [f"{score:.2f}" for score in scores]
    ids = range(len(scores)) if track_ids is None else track_ids.tolist()
    if track_ids is not None:
        labels = [f"{number}: {label}" for number, label in zip(ids, labels, strict=True)]
    colors = [person_color(number) for number in ids]
    for index in reversed(range(len(scores))):
        width = line_width(boxes[index], scene.shape)
        joint_colors = [colors[index]] * len(shown[index])
        draw_person(scene, keypoints[index].round(), shown[index], edges, joint_colors, width)
    for index in reversed(range(len(scores))):
        _draw_label(scene, boxes[index], labels[index], colors[index])
    return scene


def draw_person(
    scene: np.ndarray,
    xy: np.ndarray,
    shown: np.ndarray,
    edges: Sequence[tuple[int, int]],
    colors: Sequence[Color],
    width: int,
    *,
    radius: int | None = None,
    hollow: np.ndarray | None = None,
) -> None:
    """Draw the limbs and keypoints of one person in place, with a dark rim.

    Args:
        scene: (H, W, 3) uint8, its channels in the order of the colors.
        xy: (K, 2) pixels; decimals are cut off.
        shown: (K,) bool: the keypoints to draw, with the limbs that connect two of them.
        edges: pairs of keypoint indices.
        colors: of the K keypoints; limbs between two colors are drawn in `MIDDLE`.
        width: of limbs, in pixels.
        radius: of keypoints, in pixels; None means 1.4 widths.
        hollow: (K,) bool: keypoints to draw as rings.
    """
    points = [(int(x), int(y)) for x, y in xy]
    radius = round(1.4 * width) if radius is None else radius
    limbs = [(a, b) for a, b in edges if shown[a] and shown[b]]
    rim = max(1, width // 2)
    # The dark pass below keeps every color readable on every background.
    for a, b in limbs:
        cv2.line(scene, points[a], points[b], OUTLINE, width + 2 * rim)
    indices = np.flatnonzero(shown).tolist()
    for index in indices:
        cv2.circle(scene, points[index], radius + rim, OUTLINE, cv2.FILLED)
    for a, b in limbs:
        cv2.line(scene, points[a], points[b], colors[a] if colors[a] == colors[b] else MIDDLE, width)
    for index in indices:
        if hollow is not None and hollow[index]:
            cv2.circle(scene, points[index], radius, OUTLINE, cv2.FILLED)
            cv2.circle(scene, points[index], radius, colors[index], 1)
        else:
            cv2.circle(scene, points[index], radius, colors[index], cv2.FILLED)


def person_color(index: int) -> Color:
    """Return a bright RGB color for the person of this rank or track."""
    lightness = (0.55, 0.68, 0.45)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(index * GOLDEN_RATIO % 1, lightness, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def line_width(box: np.ndarray, image_shape: tuple[int, ...]) -> int:
    """Return the width of limbs in pixels: it grows with the person's box (4,) xyxy and with the image."""
    person = float(max(box[2] - box[0], box[3] - box[1]))
    image = float(max(image_shape[:2]))
    return max(1, round(min(0.012 * person + 0.0015 * image, 0.008 * image)))


def _draw_label(scene: np.ndarray, box: np.ndarray, text: str, color: Color) -> None:
    """Draw a text in a box of the person's color, above the person if there is room, and inside the image."""
    height, width = scene.shape[:2]
    scale = min(1.5, max(0.35, 0.0007 * max(height, width)))
    thickness = max(1, round(scale * 1.5))
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    pad = max(2, round(4 * scale))
    x = int(np.clip(box[0], 0, max(0, width - text_width - 2 * pad)))
    above = box[1] - line_width(box, scene.shape) - pad
    bottom = int(np.clip(above, text_height + 2 * pad, height - 1))
    cv2.rectangle(scene, (x, bottom - text_height - 2 * pad), (x + text_width + 2 * pad, bottom), color, cv2.FILLED)
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    ink = (0, 0, 0) if luminance > 120 else (255, 255, 255)
    cv2.putText(scene, text, (x + pad, bottom - pad), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thickness, cv2.LINE_AA)
