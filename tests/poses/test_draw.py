"""Drawings: what is drawn where, in which color."""

from __future__ import annotations

import numpy as np
import pytest

from hpetr.poses.draw import MIDDLE, DrawingStyle, draw_person, draw_poses, line_width, person_color, side_colors

EDGES, PAIRS = [(0, 1), (0, 2), (1, 2)], [(1, 2)]
GRAY = np.full((200, 300, 3), 128, np.uint8)
POINTS = np.array([[[100, 40], [60, 150], [140, 150]]], np.float32)
BOX = np.array([[60, 40, 140, 150]], np.float32)


def drawn(points: np.ndarray = POINTS, shown: tuple[bool, ...] = (True, True, True), **options) -> np.ndarray:
    return draw_poses(GRAY, points, np.array([shown]), np.array([0.75]), BOX, EDGES, PAIRS, **options)


def changed(image: np.ndarray, other: np.ndarray = GRAY) -> np.ndarray:
    """(H, W) bool."""
    return (image != other).any(axis=-1)


def test_sides_have_a_tint_and_a_shade_of_the_person_s_color() -> None:
    own, left, right = side_colors(person_color(0), 3, PAIRS)
    assert own == person_color(0)
    assert sum(left) > sum(own) > sum(right)
    image = drawn()
    for (x, y), color in zip(POINTS[0].astype(int), (own, left, right), strict=True):
        assert tuple(image[y - 1, x - 1]) == color
    assert tuple(image[150, 100]) == own, "the limb between the sides"
    assert (GRAY == 128).all()


def test_keypoints_that_are_not_shown_have_no_limbs() -> None:
    style = DrawingStyle(labels=False)
    rows, columns = np.nonzero(changed(drawn(shown=(False, True, True), style=style)))
    assert 140 < rows.min() < rows.max() < 160
    assert 50 < columns.min() < columns.max() < 150
    assert not changed(drawn(shown=(False, False, False), style=style)).any()


def test_styles() -> None:
    plain = drawn(style=DrawingStyle(labels=False))
    assert changed(drawn(), plain).any(), "the score"
    assert changed(drawn(track_ids=np.array([0])), drawn()).any(), "the number of the person"
    assert changed(drawn(style=DrawingStyle(labels=False, boxes=True)), plain)[41:130, 60].all(), "the box"
    widths = [changed(drawn(style=DrawingStyle(width, labels=False))).sum() for width in (0.5, 1, 2.5, 4, 8)]
    assert widths == sorted(set(widths))


def test_faces_stay_readable() -> None:
    """Close keypoints are drawn smaller than distant ones."""
    style, near = DrawingStyle(12, labels=False), POINTS[:, :1] + np.float32([[0, 0], [-12, 8], [12, 8]])
    assert changed(drawn(near, style=style)).sum() < 600
    assert changed(drawn(style=style)).sum() > 4000


def test_lines_grow_with_person_and_image() -> None:
    small, large = np.array([0, 0, 10, 20]), np.array([0, 0, 400, 600])
    assert line_width(small, (640, 480)) < line_width(large, (640, 480))
    assert line_width(large, (640, 480)) < line_width(large * 6, (3840, 2880))
    assert line_width(np.zeros(4), (8, 8)) == 1


@pytest.mark.parametrize("far", [-1e4, 1e6, 3e9, 1e30])
def test_places_outside_the_image(far: float) -> None:
    points = POINTS.copy()
    points[0, 0] = 100, far
    image = drawn(points)
    rows, _ = np.nonzero(changed(image))
    assert len(rows)
    same = np.broadcast_to(points[:, 1:2], points.shape)
    assert changed(drawn(same)).any(), "limbs without length"


def test_rings_and_limbs_between_two_colors() -> None:
    scene = GRAY.copy()
    colors = [(255, 0, 0), (0, 255, 0), (0, 255, 0)]
    ring = np.array([False, False, True])
    draw_person(scene, POINTS[0], np.array([True] * 3), EDGES, colors, 3, radius=8, hollow=ring)
    assert tuple(scene[149, 59]) == (0, 255, 0)
    assert tuple(scene[149, 139]) == (20, 20, 20)
    assert scene[149, 140:150, 1].max() > 150, "the ring"
    assert (scene == MIDDLE).all(axis=-1).sum() > 100
