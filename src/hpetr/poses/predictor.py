"""What all predictors share, whatever runs their network: images of any kind in, results out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

import numpy as np

from hpetr.errors import InputError
from hpetr.images.pixels import Resize
from hpetr.images.read import ImageSource, load_image
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton


class ResultStream(Iterator[PoseResult]):
    """Results that are predicted as they are taken; `len` predicts the rest and counts it."""

    def __init__(self, results: Iterator[PoseResult]) -> None:
        self._results = results
        self._counted: deque[PoseResult] = deque()

    def __next__(self) -> PoseResult:
        return self._counted.popleft() if self._counted else next(self._results)

    def __len__(self) -> int:
        self._counted.extend(self._results)
        return len(self._counted)


class Predictor(ABC):
    """Predict the poses of images.

    Attributes:
        threshold: minimum score of a pose, exclusive.
        keypoint_threshold: keypoints with a lower score do not count as found.
        skeleton: names, edges, flip pairs and sigmas of the keypoints.
        class_names: names of the classes, by label.
        default_batch_size: images in a batch, unless a call gives a number.
        num_poses: maximum number of poses per image.
        device_name: device of the network, after the name of its runtime.
        resize: the resize of images for the network.
    """

    threshold: float
    keypoint_threshold: float
    skeleton: Skeleton
    class_names: list[str]
    default_batch_size: int
    num_poses: int
    device_name: str
    resize: Resize

    @abstractmethod
    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Predict the poses of one batch.

        Args:
            images: arrays (H, W, 3) uint8 RGB.
            threshold: minimum score of a pose, exclusive; None means the predictor's own.
        """

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image in the network, before padding."""
        return self.resize.size(height, width)

    @overload
    def __call__(
        self,
        images: list[Any] | tuple[Any, ...],
        batch_size: int | None = None,
        *,
        threshold: float | None = None,
        keypoint_threshold: float | None = None,
    ) -> list[PoseResult]: ...
    @overload
    def __call__(
        self,
        images: Iterator[Any],
        batch_size: int | None = None,
        *,
        threshold: float | None = None,
        keypoint_threshold: float | None = None,
    ) -> ResultStream: ...
    @overload
    def __call__(
        self,
        images: ImageSource,
        batch_size: int | None = None,
        *,
        threshold: float | None = None,
        keypoint_threshold: float | None = None,
    ) -> PoseResult: ...
    def __call__(
        self,
        images: Any,
        batch_size: int | None = None,
        *,
        threshold: float | None = None,
        keypoint_threshold: float | None = None,
    ) -> PoseResult | list[PoseResult] | ResultStream:
        """Predict the poses of images.

        Args:
            images: an image, see `load_image`; or a list of them, an array (B, H, W, 3), a tensor (B, 3, H, W) or a
                generator.
            batch_size: images that go through the network together; None means 8 on a GPU and 1 on the CPU, where
                the padding of a batch costs more than it gains.
            threshold: minimum score of a pose, exclusive; None means the predictor's own.
            keypoint_threshold: keypoints with a lower score do not count as found; None means the predictor's own.

        Returns:
            One `PoseResult`; for a list (also an empty one), array or tensor of images a list of them in its order; for
            a generator a `ResultStream`, which reads on as results are taken from it.

        Raises:
            InputError: an image cannot be read, or an argument is out of range.
        """
        check_threshold(threshold)
        check_threshold(keypoint_threshold, "keypoint_threshold")
        size = self.default_batch_size if batch_size is None else batch_size
        if not isinstance(size, Integral) or size < 1:
            raise InputError(f"batch_size is {size!r}, expected at least 1")
        if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
            return list(self._predict(images, size, threshold, keypoint_threshold))
        if isinstance(images, Iterator) and not hasattr(images, "read"):  # binary files are iterators too
            return ResultStream(self._predict(images, size, threshold, keypoint_threshold))
        return next(self._predict([images], size, threshold, keypoint_threshold))

    def _predict(
        self, images: Iterable[Any], size: int, threshold: float | None, keypoint_threshold: float | None
    ) -> Iterator[PoseResult]:
        images = iter(images)
        while batch := list(islice(images, size)):
            results = self.predict([load_image(image) for image in batch], threshold)
            for image, result in zip(batch, results, strict=True):
                if keypoint_threshold is not None:
                    result = result.with_keypoint_threshold(keypoint_threshold)
                yield replace(result, path=Path(image)) if isinstance(image, str | os.PathLike) else result


def check_threshold(threshold: float | None, name: str = "threshold") -> None:
    """Raise `InputError` unless it is None or a number in 0..1."""
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise InputError(f"{name} is {threshold!r}, expected a number in 0..1")
