"""Track numbers that stay with their people, and keypoints without jitter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import COCO
from hpetr.video.tracking import UNTRACKED, OneEuroFilter, PoseSmoother, PoseTracker

RATE = 25
# A standing person in 0..1 of its box, x and y.
STANDING = np.array(
    [
        *([0.5, 0.05], [0.55, 0.03], [0.45, 0.03], [0.6, 0.06], [0.4, 0.06], [0.75, 0.2], [0.25, 0.2], [0.85, 0.4]),
        *([0.15, 0.4], [0.9, 0.55], [0.1, 0.55], [0.65, 0.55], [0.35, 0.55], [0.66, 0.78], [0.34, 0.78]),
        *([0.67, 1.0], [0.33, 1.0]),
    ]
)
SIZE = np.array([100.0, 300.0])


def poses(corners: list[tuple[float, float]], scores: list[float], seed: int = 0, noise: float = 0.0) -> PoseResult:
    """Standing people, 100 x 300 pixels, each with its top left corner."""
    jitter = np.random.default_rng(seed).normal(0, noise, (len(corners), 17, 2)) if noise else 0.0
    keypoints = (STANDING * SIZE + np.reshape(corners, (-1, 1, 2)) + jitter).astype(np.float32)
    return PoseResult(
        keypoints=keypoints,
        keypoint_scores=np.ones(keypoints.shape[:2], np.float32),
        scores=np.array(scores, np.float32),
        boxes=np.concatenate([keypoints.min(1), keypoints.max(1)], 1),
        labels=np.zeros(len(corners), np.int64),
        skeleton=COCO,
        image_size=(720, 1280),
    )


def tracker(**options: float) -> PoseTracker:
    return PoseTracker(COCO.sigmas, start_score=0.3, **options)


def crossing(noise: float) -> Iterator[tuple[float, PoseResult, list[int]]]:
    """Yield four seconds of two people who walk through each other, in random order in every frame."""
    rng = np.random.default_rng(0)
    for frame in range(100):
        corners = [(100 + 8.0 * frame, 200.0), (900 - 8.0 * frame, 212.0)]
        people = [int(person) for person in rng.permutation(2)]
        result = poses([corners[person] for person in people], [0.9, 0.8], seed=frame, noise=noise)
        yield frame / RATE, result, people


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_people_who_cross_keep_their_numbers(noise: float) -> None:
    tracking = tracker()
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for time, result, people in crossing(noise):
        for person, number in zip(people, tracking.update(result, time), strict=True):
            seen[person].add(int(number))
    assert sorted(map(len, seen.values())) == [1, 1]
    assert seen[0] != seen[1]
    assert tracking.count == 2


def test_a_hidden_person_keeps_the_number_along_the_predicted_path() -> None:
    tracking = tracker()
    for frame in range(10):
        first = tracking.update(poses([(100 + 10 * frame, 200)], [0.9]), frame / RATE)
    for frame in range(10, 25):
        assert len(tracking.update(poses([], []), frame / RATE)) == 0
    assert tracking.update(poses([(100 + 10 * 25, 200)], [0.9]), 25 / RATE).tolist() == first.tolist()


def test_a_person_back_after_the_patience_gets_a_new_number() -> None:
    tracking = tracker(patience=0.5)
    tracking.update(poses([(100, 200)], [0.9]), 0.0)
    assert tracking.update(poses([(100, 200)], [0.9]), 0.6).tolist() == [2]


def test_tracks_follow_time_not_frames() -> None:
    """The prediction spans ten missing frames, as a live source drops them."""
    tracking = tracker()
    for frame in (0, 1, 2, 3, 13, 14, 30):
        numbers = tracking.update(poses([(100 + 10 * frame, 200)], [0.9]), frame / RATE)
        assert numbers.tolist() == [1], frame


def test_doubtful_poses_continue_a_track_and_begin_none() -> None:
    tracking = tracker()
    assert tracking.update(poses([(100, 200)], [0.2]), 0.0).tolist() == [UNTRACKED]
    assert tracking.update(poses([(100, 200)], [0.9]), 0.04).tolist() == [1]
    assert tracking.update(poses([(101, 200), (600, 200)], [0.2, 0.2]), 0.08).tolist() == [1, UNTRACKED]
    # A sure pose has the first choice, however close a doubtful one is.
    assert tracking.update(poses([(110, 200), (102, 200)], [0.9, 0.2]), 0.12).tolist() == [1, UNTRACKED]


def test_a_person_far_away_gets_another_number() -> None:
    tracking = tracker()
    tracking.update(poses([(100, 200)], [0.9]), 0.0)
    assert tracking.update(poses([(500, 200)], [0.9]), 0.04).tolist() == [2]


def test_classes_do_not_mix() -> None:
    tracking = tracker()
    first, second = poses([(100, 200)], [0.9]), poses([(100, 200)], [0.9])
    second.labels[:] = 1
    tracking.update(first, 0.0)
    assert tracking.update(second, 0.04).tolist() == [2]


def smooth_path(speed: float, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True, measured and smoothed left edges of a pose, (frames, K), pixels, after the first second."""
    smoother = PoseSmoother()
    rows = []
    for frame in range(100):
        true = poses([(50 + speed * frame / RATE, 200)], [0.9])
        measured = poses([(50 + speed * frame / RATE, 200)], [0.9], seed=frame, noise=noise)
        smoothed = smoother.update(measured, np.array([1]), frame / RATE)
        rows.append([result.keypoints[0, :, 0] for result in (true, measured, smoothed)])
    true, measured, smoothed = np.array(rows)[25:].transpose(1, 0, 2)
    return true, measured, smoothed


def test_smoothing_takes_the_jitter_from_a_still_person() -> None:
    _, measured, smoothed = smooth_path(speed=0, noise=2.0)
    step_before, step_after = (np.abs(np.diff(path, axis=0)).mean() for path in (measured, smoothed))
    assert step_before > 2
    assert step_after < step_before / 3


def test_smoothing_keeps_up_with_a_running_person() -> None:
    true, _, smoothed = smooth_path(speed=400, noise=0.0)
    assert np.abs(true - smoothed).max() < 400 / RATE / 2, "half a frame behind"
    true, measured, smoothed = smooth_path(speed=400, noise=2.0)
    assert np.abs(true - smoothed).mean() < 2 * np.abs(true - measured).mean()


def test_smoothing_is_the_same_for_near_and_far() -> None:
    near, far = PoseSmoother(), PoseSmoother()
    for frame in range(20):
        result = poses([(100, 200)], [0.9], seed=frame, noise=3.0)
        small = PoseResult(**{**vars(result), "keypoints": result.keypoints / 4, "boxes": result.boxes / 4})
        large_smoothed = near.update(result, np.array([1]), frame / RATE)
        small_smoothed = far.update(small, np.array([1]), frame / RATE)
    np.testing.assert_allclose(small_smoothed.keypoints * 4, large_smoothed.keypoints, rtol=1e-4)


def test_smoothing_leaves_the_untracked_alone_and_moves_the_boxes() -> None:
    smoother = PoseSmoother()
    smoother.update(poses([(100, 200), (500, 200)], [0.9, 0.2]), np.array([1, UNTRACKED]), 0.0)
    moved = poses([(110, 200), (510, 200)], [0.9, 0.2])
    smoothed = smoother.update(moved, np.array([1, UNTRACKED]), 0.04)
    np.testing.assert_array_equal(smoothed.keypoints[1], moved.keypoints[1])
    assert smoothed.keypoints[0, 0, 0] < moved.keypoints[0, 0, 0]
    np.testing.assert_allclose(smoothed.boxes[0, :2], smoothed.keypoints[0].min(0))
    assert moved.keypoints[0, 0, 0] == poses([(110, 200)], [0.9]).keypoints[0, 0, 0], "the input stays as it was"


def test_one_euro_filter_by_hand() -> None:
    """The first two steps of the paper's algorithm with a cutoff of 1 Hz at 10 frames a second."""
    smoother = OneEuroFilter(min_cutoff=1.0, beta=0.5)
    assert smoother(np.array([2.0]), 0.0).tolist() == [2.0]
    share = 2 * np.pi * 0.1 / (2 * np.pi * 0.1 + 1)
    cutoff = 1.0 + 0.5 * share * 10.0  # the speed, filtered with 1 Hz: 1 unit in 0.1 s
    turn = 2 * np.pi * cutoff * 0.1
    assert smoother(np.array([3.0]), 0.1).tolist() == pytest.approx([2.0 + turn / (turn + 1)])
