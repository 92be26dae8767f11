"""An exported model that takes images and gives poses, as `PosePredictor` does with a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpetr.errors import InputError
from hpetr.images.pixels import keep_ratio_size, normalize_and_pad, resize_image
from hpetr.images.read import ImageSource, load_image
from hpetr.poses.predictor import Predictor, check_threshold
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton
from hpetr.runtime.engine import load_engine


class ExportedPredictor(Predictor):
    """A model that `hpetr export` wrote.

    Args:
        path: the `.onnx` file, or OpenVINO's `.xml` with its `.bin` beside it.
        threshold: only poses with a higher score are given; None takes the model's own.
        threads: of the CPU; None leaves it to the runtime.
        device: "auto" (CUDA where this ONNX Runtime has it, else the CPU), "cpu", "cuda"; with OpenVINO any of its
            devices, such as "gpu".

    Raises:
        InputError: the file is not there, broken or not hpetr's, the runtime or the device is not there, or the
            threshold is not in 0..1.

    Examples:
        >>> predictor = ExportedPredictor("model.onnx")
        >>> predictor("photo.jpg").keypoints.shape  # (people, 17, 2)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threshold: float | None = None,
        *,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        check_threshold(threshold)
        self._engine = load_engine(Path(path), threads, device)
        self.description = self._engine.description
        self.threshold = self.description.threshold if threshold is None else threshold

    @property
    def skeleton(self) -> Skeleton:
        """Names, edges, flip pairs and sigmas of the keypoints."""
        return self.description.skeleton

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return list(self.description.classes)

    @property
    def default_batch_size(self) -> int:
        """1: the padding of a batch costs a CPU more than it gains."""
        return 1

    @property
    def num_poses(self) -> int:
        """Poses an image, most."""
        return self.description.num_poses

    @property
    def device_name(self) -> str:
        """The runtime and what it runs on."""
        return self._engine.device_name

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image has in the network, before padding."""
        return keep_ratio_size(height, width, self.description.shortest_edge, self.description.longest_edge)

    def read(self, image: ImageSource) -> np.ndarray:
        """An image as (H, W, 3) uint8 RGB, see `load_image`."""
        return load_image(image)

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Poses of one batch of images, each (H, W, 3) uint8 RGB."""
        batch = self.preprocess(images)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return self.postprocess(self._engine.run(*batch), sizes, self.threshold if threshold is None else threshold)

    def preprocess(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """`pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64 of B arrays (H_i, W_i, 3) uint8 RGB."""
        about = self.description
        resized = [resize_image(image, *self.network_size(image.shape[0], image.shape[1])) for image in images]
        return normalize_and_pad(resized, about.image_mean, about.image_std, about.pad_size_divisor)

    def postprocess(
        self, outputs: dict[str, np.ndarray], sizes: Sequence[tuple[int, int]], threshold: float
    ) -> list[PoseResult]:
        """What `HPetrImageProcessor.post_process_pose_estimation` does, in NumPy.

        Args:
            outputs: of the network.
            sizes: B pairs (height, width) of the original images.

        Raises:
            InputError: scores or poses that are NaN or infinite.
        """
        if not (np.isfinite(outputs["scores"]).all() and np.isfinite(outputs["poses"]).all()):
            raise InputError("the model's poses are no finite numbers, its weights are damaged or were never trained")
        results = []
        for index, (height, width) in enumerate(sizes):
            scores = outputs["scores"][index]  # (T,)
            order = np.argsort(-scores, kind="stable")
            kept = order[scores[order] > threshold]  # (n,)
            keypoints = outputs["poses"][index][kept].clip(0, 1) * np.array([width, height], np.float32)  # (n, K, 2)
            results.append(
                PoseResult(
                    keypoints=keypoints,
                    keypoint_scores=outputs["keypoint_scores"][index][kept],
                    scores=scores[kept],
                    boxes=np.concatenate([keypoints.min(axis=1), keypoints.max(axis=1)], axis=1),
                    labels=outputs["pose_labels"][index][kept],
                    skeleton=self.skeleton,
                    image_size=(height, width),
                )
            )
        return results
