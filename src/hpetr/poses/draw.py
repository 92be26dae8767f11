"""Drawing of poses on images, antialiased, in place or on a copy."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np

Color: TypeAlias = tuple[int, int, int]

OUTLINE: Color = (20, 20, 20)
INK: Color = (255, 255, 255)
# Limbs between keypoints of different colors.
MIDDLE: Color = (255, 235, 80)
# Hues of neighboring ranks differ by this share of the circle, and those of all ranks from each other.
GOLDEN_RATIO = 0.618034
# OpenCV takes coordinates in units of 1/16 pixel, as integers of 32 bits.
FRACTION_BITS, FARTHEST = 4, 1e6
FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class DrawingStyle:
    """The look of drawings.

    Args:
        line_width: of limbs, in pixels; None lets it grow with the person and the image.
        labels: write scores and track numbers.
        boxes: draw the boxes of the persons.
    """

    line_width: float | None = None
    labels: bool = True
    boxes: bool = False


def draw_poses(
    image: np.ndarray,
    keypoints: np.ndarray,
    shown: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray,
    edges: Sequence[tuple[int, int]],
    flip_pairs: Sequence[tuple[int, int]] = (),
    track_ids: np.ndarray | None = None,
    style: DrawingStyle | None = None,
) -> np.ndarray:
    """Draw limbs, keypoints and the score of n poses on a copy of the image, the first pose on top.

    Each person has a hue; left keypoints are light and right ones dark.

    Args:
        image: (H, W, 3) uint8 RGB.
        keypoints: (n, K, 2) pixels.
        shown: (n, K) bool: the keypoints to draw, with the limbs that connect two of them.
        scores: (n,).
        boxes: (n, 4) xyxy pixels: they set the line widths and the places of the scores.
        edges: pairs of keypoint indices.
        flip_pairs: pairs (left, right) of keypoint indices.
        track_ids: (n,) numbers of the persons in a video, which choose the colors and precede the scores.
        style: None means the default.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    style = style or DrawingStyle()
    scene = image.copy()
    labels = [f"{score:.2f}" for score in scores]
    ids = range(len(scores)) if track_ids is None else np.asarray(track_ids).tolist()
    if track_ids is not None:
        labels = [f"{number}: {label}" for number, label in zip(ids, labels, strict=True)]
    colors = [person_color(number) for number in ids]
    for index in reversed(range(len(scores))):
        width = line_width(boxes[index], scene.shape) if style.line_width is None else style.line_width
        if style.boxes:
            (left, top), (right, bottom) = boxes[index].reshape(2, 2).round().astype(int).tolist()
            cv2.rectangle(scene, (left, top), (right, bottom), colors[index], max(1, round(width / 2)), cv2.LINE_AA)
        sides = side_colors(colors[index], keypoints.shape[1], flip_pairs)
        draw_person(scene, keypoints[index], shown[index], edges, sides, width, between=colors[index])
    for index in reversed(range(len(scores))) if style.labels else ():
        _draw_label(scene, boxes[index], labels[index], colors[index])
    return scene


def draw_person(
    scene: np.ndarray,
    xy: np.ndarray,
    shown: np.ndarray,
    edges: Sequence[tuple[int, int]],
    colors: Sequence[Color],
    width: float,
    *,
    radius: float | None = None,
    hollow: np.ndarray | None = None,
    between: Color = MIDDLE,
) -> None:
    """Draw the limbs and keypoints of one person in place, with a dark rim.

    Short limbs and close keypoints, as in a face, are drawn smaller.

    Args:
        scene: (H, W, 3) uint8, its channels in the order of the colors.
        xy: (K, 2) pixels, from the image's left and upper edge.
        shown: (K,) bool: the keypoints to draw, with the limbs that connect two of them.
        edges: pairs of keypoint indices.
        colors: of the K keypoints.
        width: of limbs, in pixels.
        radius: of keypoints, in pixels; None means 1.4 widths.
        hollow: (K,) bool: keypoints to draw as rings.
        between: color of limbs that connect two colors.
    """
    points = np.clip(np.asarray(xy, np.float64) - 0.5, -FARTHEST, FARTHEST)  # OpenCV counts from pixel centers
    limbs = [(a, b, float(np.hypot(*(points[a] - points[b])))) for a, b in edges if shown[a] and shown[b]]
    limbs = [limb for limb in limbs if limb[2] > 0]
    radii = np.full(len(points), 1.4 * width if radius is None else radius)
    for a, b, length in limbs:
        radii[[a, b]] = np.minimum(radii[[a, b]], max(1.0, 0.2 * length))
    rim = max(1.0, width / 2) / 2
    # The dark pass below keeps every color readable on every background.
    for extra in (rim, 0.0):
        for a, b, length in limbs:
            color = colors[a] if colors[a] == colors[b] else between
            thickness = min(width, max(1.0, 0.15 * length)) + 2 * extra
            side = (points[b] - points[a])[::-1] * (-0.5, 0.5) * thickness / length
            corners = np.stack([points[a] + side, points[b] + side, points[b] - side, points[a] - side])
            cv2.fillConvexPoly(scene, _fixed(corners), OUTLINE if extra else color, cv2.LINE_AA, FRACTION_BITS)
        for index in np.flatnonzero(shown).tolist():
            is_ring = hollow is not None and hollow[index]
            _disc(scene, points[index], radii[index] + extra, OUTLINE if extra or is_ring else colors[index])
            if is_ring and not extra:
                _disc(scene, points[index], radii[index], colors[index], 1)


def _disc(scene: np.ndarray, center: np.ndarray, radius: float, color: Color, thickness: int = cv2.FILLED) -> None:
    x, y, size = _fixed([*center, radius]).tolist()
    cv2.circle(scene, (x, y), size, color, thickness, cv2.LINE_AA, FRACTION_BITS)


def _fixed(numbers: np.ndarray | Sequence[float]) -> np.ndarray:
    return (np.asarray(numbers) * 2**FRACTION_BITS).round().astype(np.int32)


def person_color(index: int) -> Color:
    """Return a bright RGB color for the person of this rank or track."""
    lightness = (0.55, 0.68, 0.45)[index % 3]
    red, green, blue = colorsys.hls_to_rgb(index * GOLDEN_RATIO % 1, lightness, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def side_colors(color: Color, num_keypoints: int, flip_pairs: Sequence[tuple[int, int]]) -> list[Color]:
    """Return the colors of K keypoints: a light tint on the left, a dark shade on the right, else the color itself."""
    colors = [color] * num_keypoints
    for left, right in flip_pairs:
        colors[left] = _mix(color, INK, 0.5)
        colors[right] = _mix(color, OUTLINE, 0.3)
    return colors


def _mix(color: Color, other: Color, share: float) -> Color:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(color, other, strict=True))
    return red, green, blue


def line_width(box: np.ndarray, image_shape: tuple[int, ...]) -> float:
    """Return the width of limbs in pixels: it grows with the person's box (4,) xyxy and with the image."""
    person = float(max(box[2] - box[0], box[3] - box[1]))
    image = float(max(image_shape[:2]))
    return max(1.0, min(0.008 * person + 0.001 * image, 0.006 * image))


def _draw_label(scene: np.ndarray, box: np.ndarray, text: str, color: Color) -> None:
    """Draw a text in a box of the person's color, above the person if there is room, and inside the image."""
    height, width = scene.shape[:2]
    scale = min(2.8, max(0.35, 0.0007 * max(height, width)))
    thickness = max(1, round(scale * 1.5))
    (text_width, text_height), _ = cv2.getTextSize(text, FONT, scale, thickness)
    pad = max(2, round(4 * scale))
    x = int(np.clip(box[0], 0, max(0, width - text_width - 2 * pad)))
    above = box[1] - line_width(box, scene.shape) - pad
    bottom = int(np.clip(above, text_height + 2 * pad, height - 1))
    cv2.rectangle(scene, (x, bottom - text_height - 2 * pad), (x + text_width + 2 * pad, bottom), color, cv2.FILLED)
    ink = (0, 0, 0) if np.dot(color, (0.299, 0.587, 0.114)) > 120 else INK
    cv2.putText(scene, text, (x + pad, bottom - pad), FONT, scale, ink, thickness, cv2.LINE_AA)
