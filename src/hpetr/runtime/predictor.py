"""Prediction with an exported model, as `PosePredictor` does with a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpetr.images.pixels import Resize, normalize_and_pad
from hpetr.poses.predictor import Predictor, check_threshold
from hpetr.poses.result import PoseResult
from hpetr.runtime.engine import load_engine


class ExportedPredictor(Predictor):
    """Predict poses with a model that `hpetr export` wrote.

    Args:
        path: the `.onnx` file, or OpenVINO's `.xml` with its `.bin` beside it.
        threshold: minimum score of a pose, exclusive; None means the model's own.
        threads: threads of the CPU; None leaves the number to the runtime.
        device: "auto" (CUDA if this ONNX Runtime has it, else the CPU), "cpu", "cuda"; with OpenVINO any of its
            devices, such as "gpu".
        keypoint_threshold: keypoints with a lower score do not count as found; None means the model's own.

    Raises:
        InputError: the file does not exist, is broken or not hpetr's, the runtime or the device is missing, or a
            threshold is not in 0..1.

    Examples:
        >>> predictor = ExportedPredictor("model.onnx")
        >>> predictor("photo.jpg").keypoints.shape  # (persons, 17, 2)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threshold: float | None = None,
        *,
        threads: int | None = None,
        device: str = "auto",
        keypoint_threshold: float | None = None,
    ) -> None:
        check_threshold(threshold)
        check_threshold(keypoint_threshold, "keypoint_threshold")
        self._engine = load_engine(Path(path), threads, device)
        self.description = about = self._engine.description
        self.threshold = about.threshold if threshold is None else threshold
        self.keypoint_threshold = about.keypoint_threshold if keypoint_threshold is None else keypoint_threshold
        self.skeleton = about.skeleton
        self.class_names = list(about.classes)
        self.default_batch_size = 1  # the padding of a batch costs a CPU more than it gains
        self.num_poses = about.num_poses
        self.device_name = self._engine.device_name
        self.resize = Resize(about.shortest_edge, about.longest_edge, about.antialias)

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Predict the poses of one batch of images, each (H, W, 3) uint8 RGB."""
        about = self.description
        resized = [self.resize(image) for image in images]
        batch = normalize_and_pad(resized, about.image_mean, about.image_std, about.pad_size_divisor)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        limits = self.threshold if threshold is None else threshold, self.keypoint_threshold
        return PoseResult.from_outputs(self._engine.run(*batch), sizes, self.skeleton, *limits)
