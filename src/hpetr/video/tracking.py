"""Follow people from frame to frame: `PoseTracker` numbers them, `PoseSmoother` reduces the jitter of their keypoints.

Tracking follows ByteTrack (Zhang et al., ECCV 2022) with the similarity of poses, OKS, in place of the overlap of
boxes: it separates two people whose boxes cover each other. The package `trackers` is no choice: it requires
`opencv-python`, which overwrites `opencv-python-headless`. Smoothing is the one-euro filter (Casiez, Roussel and Vogel,
CHI 2012).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hpetr.errors import needs_extra
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import AREA_OF_BOX

UNTRACKED = 0
# Factor on the sigmas of OKS: people move more from frame to frame than annotators differ.
SIGMA_FACTOR = 2.0
MIN_SIMILARITY = 0.15
# Share of the newest measurement in a track's velocity.
VELOCITY_SHARE = 0.5


@dataclass
class _Track:
    number: int
    label: int
    keypoints: np.ndarray  # (K, 2) pixels
    area: float  # pixels^2
    time: float  # seconds, of the last match
    velocity: np.ndarray  # (2,) pixels per second

    def expected_at(self, time: float) -> np.ndarray:
        """Return the keypoints (K, 2) at a time, moved by the constant velocity."""
        return self.keypoints + self.velocity * (time - self.time)


class PoseTracker:
    """Give every person in a video a number.

    Args:
        sigmas: K standard deviations of OKS, those of the skeleton.
        start_score: only a pose with a higher score starts a track; one with a lower score can continue one.
        patience: seconds without a match after which a track ends, and a returning person gets a new number.
    """

    def __init__(self, sigmas: np.ndarray | tuple[float, ...], start_score: float, patience: float = 1.0) -> None:
        with needs_extra("video", "tracking"):
            from scipy.optimize import linear_sum_assignment
        self._assign = linear_sum_assignment
        self._variances = (2 * SIGMA_FACTOR * np.asarray(sigmas, np.float64)) ** 2  # (K,)
        self._start_score = start_score
        self._patience = patience
        self._tracks: list[_Track] = []
        self.count = 0

    def update(self, result: PoseResult, time: float) -> np.ndarray:
        """Match the poses of the next frame.

        Args:
            result: n poses, best first.
            time: seconds, of any origin, later than in the call before.

        Returns:
            (n,) int64 track numbers from 1; `UNTRACKED` for a doubtful pose that continues no track.
        """
        self._tracks = [track for track in self._tracks if time - track.time <= self._patience]
        numbers = np.full(len(result), UNTRACKED, np.int64)
        sure, areas = result.scores > self._start_score, _areas(result)  # (n,)
        free = list(self._tracks)
        for stage in (sure, ~sure):
            for track, pose in self._match(free, result, np.flatnonzero(stage), time):
                self._continue(track, result.keypoints[pose].astype(np.float64), areas[pose], time)
                numbers[pose] = track.number
            free = [track for track in free if track.number not in numbers]
        for pose in np.flatnonzero(sure & (numbers == UNTRACKED)).tolist():
            self.count += 1
            numbers[pose] = self.count
            label, keypoints = int(result.labels[pose]), result.keypoints[pose].astype(np.float64)
            self._tracks.append(_Track(self.count, label, keypoints, areas[pose], time, np.zeros(2)))
        return numbers

    def _match(
        self, tracks: list[_Track], result: PoseResult, poses: np.ndarray, time: float
    ) -> list[tuple[_Track, int]]:
        """Return the pairs of tracks and poses with the largest sum of similarities, each at least `MIN_SIMILARITY`."""
        if not tracks or not len(poses):
            return []
        expected = np.stack([track.expected_at(time) for track in tracks])  # (T, K, 2)
        areas = np.array([track.area for track in tracks])  # (T,)
        squares = ((expected[:, None] - result.keypoints[poses]) ** 2).sum(-1)  # (T, n, K)
        closeness = np.exp(-squares / (2 * areas[:, None, None] * self._variances))  # (T, n, K)
        weights = np.maximum(result.keypoint_scores[poses], 1e-3)  # (n, K)
        similarity = (closeness * weights).sum(-1) / weights.sum(-1)  # (T, n)
        labels = np.array([track.label for track in tracks])  # (T,)
        similarity[labels[:, None] != result.labels[poses]] = 0
        similarity[similarity < MIN_SIMILARITY] = 0  # a pair that does not count must not displace one that does
        rows, columns = self._assign(similarity, maximize=True)
        return [
            (tracks[row], int(poses[column]))
            for row, column in zip(rows, columns, strict=True)
            if similarity[row, column] > 0
        ]

    @staticmethod
    def _continue(track: _Track, keypoints: np.ndarray, area: float, time: float) -> None:
        elapsed = time - track.time
        if elapsed > 0:
            # The median: one keypoint that jumps does not move the whole person.
            measured = np.median(keypoints - track.keypoints, axis=0) / elapsed
            track.velocity += VELOCITY_SHARE * (measured - track.velocity)
        track.keypoints, track.area, track.time = keypoints, area, time


def _areas(result: PoseResult) -> np.ndarray:
    """Return the areas (n,) of the people, pixels^2."""
    sides = np.maximum(result.extents[:, 2:] - result.extents[:, :2], 1).astype(float)  # (n, 2)
    return AREA_OF_BOX * sides.prod(1)


class OneEuroFilter:
    """Low-pass filter whose cutoff frequency grows with speed: slow motion is calm, fast motion does not lag.

    Args:
        min_cutoff: Hz, at rest; lower is calmer.
        beta: Hz for each unit per second of speed; higher lags less.
        speed_cutoff: Hz, for the speed itself.
    """

    def __init__(self, min_cutoff: float, beta: float, speed_cutoff: float = 1.0) -> None:
        self._min_cutoff, self._beta, self._speed_cutoff = min_cutoff, beta, speed_cutoff
        self._time = 0.0
        self._value: np.ndarray | None = None
        self._speed: np.ndarray | None = None

    def __call__(self, value: np.ndarray, time: float) -> np.ndarray:
        """Filter the next value, of any shape, the same in every call; time in seconds, later than before."""
        if self._value is None or self._speed is None:
            self._value, self._speed = value, np.zeros_like(value)
        elif (elapsed := time - self._time) > 0:
            speed = (value - self._value) / elapsed
            self._speed = self._speed + _share(self._speed_cutoff, elapsed) * (speed - self._speed)
            cutoff = self._min_cutoff + self._beta * np.abs(self._speed)
            self._value = self._value + _share(cutoff, elapsed) * (value - self._value)
        self._time = time
        return self._value


def _share(cutoff: np.ndarray | float, elapsed: float) -> np.ndarray | float:
    """Return the share of a new value that a first-order low-pass filter takes."""
    turn = 2 * np.pi * cutoff * elapsed
    return turn / (turn + 1)


class PoseSmoother:
    """Smooth the keypoints of every track by one-euro filters, in units of the person's size.

    Args:
        min_cutoff: see `OneEuroFilter`; a unit is the square root of the area of the person's box.
        beta: see `OneEuroFilter`.
        patience: seconds without a pose after which the filter of a track is forgotten.
    """

    def __init__(self, min_cutoff: float = 1.0, beta: float = 10.0, patience: float = 1.0) -> None:
        self._min_cutoff, self._beta, self._patience = min_cutoff, beta, patience
        self._filters: dict[int, tuple[OneEuroFilter, float, float]] = {}  # filter, unit in pixels, last time

    def update(self, result: PoseResult, numbers: np.ndarray, time: float) -> PoseResult:
        """Return the poses with smoothed keypoints, and boxes around these.

        Args:
            result: n poses.
            numbers: (n,) from `PoseTracker.update`; an `UNTRACKED` pose is returned unchanged.
            time: seconds, later than in the call before.
        """
        self._filters = {n: entry for n, entry in self._filters.items() if time - entry[2] <= self._patience}
        keypoints, units = result.keypoints.copy(), _areas(result) ** 0.5
        for pose, number in enumerate(numbers.tolist()):
            if number == UNTRACKED:
                continue
            new = (OneEuroFilter(self._min_cutoff, self._beta), units[pose], time)
            smoother, unit, _ = self._filters.get(number, new)
            keypoints[pose] = smoother(result.keypoints[pose] / unit, time) * unit
            self._filters[number] = (smoother, unit, time)
        return replace(result, keypoints=keypoints).with_keypoint_threshold(result.keypoint_threshold)
