"""Poses of pictures, from Python: `PosePredictor`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from hpetr.checkpoint import load_checkpoint
from hpetr.data.images import ImageSource, load_image
from hpetr.data.processor import HPetrImageProcessor
from hpetr.errors import InputError
from hpetr.inference import set_up_inference
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.results import PoseResult
from hpetr.skeleton import Skeleton


class PosePredictor:
    """A model that takes pictures and gives poses.

    Args:
        checkpoint: a folder that `save_pretrained` wrote; None takes the one that comes with the package.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ...
        threshold: only poses with a higher score are given; None takes the checkpoint's own.
        precision, compiled: see `set_up_inference`.

    Raises:
        InputError: the checkpoint cannot be loaded, the device is not there, the threshold is not in 0..1, or the
            precision is unknown.

    Examples:
        >>> predictor = PosePredictor()
        >>> result = predictor("photo.jpg")
        >>> result.keypoints.shape  # (people, 17, 2)
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        threshold: float | None = None,
        *,
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}, expected a number in 0..1")
        model, self.processor = load_checkpoint(checkpoint, device)
        self.model = set_up_inference(model, precision, compiled=compiled)
        self.threshold = threshold

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return [name for _, name in sorted((self.model.config.id2label or {}).items())]

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
            batch_size: pictures that go through the network together; None takes 8 on a GPU and 1 on the CPU, where
                the padding of a batch costs more than it gains.

        Returns:
            One `PoseResult`, or for a list (also an empty one) a list of them in its order.

        Raises:
            InputError: a picture cannot be read.
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

    @property
    def default_batch_size(self) -> int:
        """Pictures in a batch when a call does not say."""
        return default_batch_size(self.model)

    def _predict(self, images: Sequence[ImageSource]) -> list[PoseResult]:
        results = predict_batch(self.model, self.processor, [load_image(image) for image in images], self.threshold)
        return [
            replace(result, path=Path(image)) if isinstance(image, str | os.PathLike) else result
            for image, result in zip(images, results, strict=True)
        ]


def default_batch_size(model: HPetrForPoseEstimation) -> int:
    """Pictures that go through the network together when nobody says: 8 on a GPU, and 1 on the CPU, where the padding
    of a batch costs more than it gains.
    """
    return 8 if model.device.type == "cuda" else 1


@torch.inference_mode()
def predict_batch(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    pictures: Sequence[np.ndarray],
    threshold: float | None = None,
) -> list[PoseResult]:
    """The poses of a batch of pictures, each (H, W, 3) uint8 RGB, in one pass of a model in eval mode.

    Args:
        threshold: only poses with a higher score are given; None takes the processor's.
    """
    batch = processor(list(pictures))
    outputs = model(**batch.to(model.device))
    sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    skeleton = Skeleton.from_dict(model.config.skeleton)
    found = processor.post_process_pose_estimation(outputs, sizes, threshold)
    return [
        PoseResult(
            keypoints=poses["keypoints"].float().cpu().numpy(),
            keypoint_scores=poses["keypoint_scores"].float().cpu().numpy(),
            scores=poses["scores"].float().cpu().numpy(),
            boxes=poses["boxes"].float().cpu().numpy(),
            labels=poses["labels"].cpu().numpy(),
            skeleton=skeleton,
            image_size=size,
        )
        for size, poses in zip(sizes, found, strict=True)
    ]
