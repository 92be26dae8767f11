"""What every predictor has, whatever runs its network: images of any kind in, a result for each out."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from hpetr.errors import InputError
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton

if TYPE_CHECKING:
    from hpetr.images.read import ImageSource


class Predictor(ABC):
    """Takes images and gives poses.

    Attributes:
        threshold: only poses with a higher score are given.
    """

    threshold: float

    @property
    @abstractmethod
    def skeleton(self) -> Skeleton:
        """Names, edges, flip pairs and sigmas of the keypoints."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""

    @property
    @abstractmethod
    def default_batch_size(self) -> int:
        """Images in a batch when a call does not say."""

    @property
    @abstractmethod
    def num_poses(self) -> int:
        """Poses an image, most."""

    @property
    @abstractmethod
    def device_name(self) -> str:
        """What the network runs on."""

    @abstractmethod
    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image has in the network, before padding."""

    @abstractmethod
    def read(self, image: ImageSource) -> np.ndarray:
        """An image as (H, W, 3) uint8 RGB, EXIF orientation applied."""

    @abstractmethod
    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Poses of one batch.

        Args:
            images: arrays (H, W, 3) uint8 RGB.
            threshold: only poses with a higher score are given; None takes the predictor's own.
        """

    @overload
    def __call__(self, images: ImageSource, batch_size: int | None = None) -> PoseResult: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...], batch_size: int | None = None) -> list[PoseResult]: ...
    def __call__(
        self, images: ImageSource | list[Any] | tuple[Any, ...], batch_size: int | None = None
    ) -> PoseResult | list[PoseResult]:
        """Estimate poses.

        Args:
            images: a path, PIL image, encoded bytes or RGB array (H, W, 3) uint8; or a list of them, or an array
                (B, H, W, 3).
            batch_size: images that go through the network together; None takes 8 on a GPU and 1 on the CPU, where
                the padding of a batch costs more than it gains.

        Returns:
            One `PoseResult`, or for a list (also an empty one) a list of them in its order.

        Raises:
            InputError: an image cannot be read.
        """
        if isinstance(images, np.ndarray) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, list | tuple):
            return self._predict([images])[0]
        size = self.default_batch_size if batch_size is None else batch_size
        if size < 1:
            raise InputError(f"batch_size is {size}, expected at least 1")
        return [
            result for start in range(0, len(images), size) for result in self._predict(images[start : start + size])
        ]

    def _predict(self, images: Sequence[ImageSource]) -> list[PoseResult]:
        results = self.predict([self.read(image) for image in images])
        return [
            replace(result, path=Path(image)) if isinstance(image, str | os.PathLike) else result
            for image, result in zip(images, results, strict=True)
        ]


def check_threshold(threshold: float | None) -> None:
    """Raises `InputError` where it is neither None nor a number in 0..1."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold is {threshold}, expected a number in 0..1")
