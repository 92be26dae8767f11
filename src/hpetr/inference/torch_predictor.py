"""Poses of images, from Python: `PosePredictor`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.images.pixels import keep_ratio_size
from hpetr.images.read import ImageSource, load_image
from hpetr.inference.precision import set_up_inference
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.predictor import Predictor, check_threshold
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton


class PosePredictor(Predictor):
    """A model that takes images and gives poses.

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
        check_threshold(threshold)
        model, self.processor = load_checkpoint(checkpoint, device)
        self.model = set_up_inference(model, precision, compiled=compiled)
        self.threshold = self.processor.threshold if threshold is None else threshold

    @property
    def skeleton(self) -> Skeleton:
        """Names, edges, flip pairs and sigmas of the keypoints."""
        return Skeleton.from_dict(self.model.config.skeleton)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return [name for _, name in sorted((self.model.config.id2label or {}).items())]

    @property
    def default_batch_size(self) -> int:
        """Images in a batch when a call does not say."""
        return default_batch_size(self.model)

    @property
    def num_poses(self) -> int:
        """Poses an image, most."""
        return self.model.config.num_poses

    @property
    def device_name(self) -> str:
        """What the network runs on: cpu, cuda:0, ..."""
        return str(self.model.device)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image has in the network, before padding."""
        limits = self.processor.size
        return keep_ratio_size(height, width, limits["shortest_edge"], limits["longest_edge"])

    def read(self, image: ImageSource) -> np.ndarray:
        """An image as (H, W, 3) uint8 RGB, see `load_image`."""
        return load_image(image)

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Poses of one batch of images, each (H, W, 3) uint8 RGB."""
        return predict_batch(self.model, self.processor, images, self.threshold if threshold is None else threshold)


def default_batch_size(model: HPetrForPoseEstimation) -> int:
    """Images that go through the network together when nobody says: 8 on a GPU, and 1 on the CPU, where the padding
    of a batch costs more than it gains.
    """
    return 8 if model.device.type == "cuda" else 1


@torch.inference_mode()
def predict_batch(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    images: Sequence[np.ndarray],
    threshold: float | None = None,
) -> list[PoseResult]:
    """The poses of a batch of images, each (H, W, 3) uint8 RGB, in one pass of a model in eval mode.

    Args:
        threshold: only poses with a higher score are given; None takes the processor's.
    """
    batch = processor(list(images))
    outputs = model(**batch.to(model.device))
    sizes = [(image.shape[0], image.shape[1]) for image in images]
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
