"""Poses of images, from Python: `PosePredictor`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.images.pixels import keep_ratio_size
from hpetr.images.read import ImageSource, load_image
from hpetr.inference.precision import autocast, check_precision
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.model.stages import POST_PROCESSING, RESIZE, stage
from hpetr.poses.predictor import Predictor, check_threshold
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton


class PosePredictor(Predictor):
    """Predict poses with a checkpoint.

    Args:
        checkpoint: folder that `save_pretrained` wrote, or `hf://OWNER/NAME`; None means the one in the package.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        threshold: minimum score of a pose, exclusive; None means the checkpoint's own.
        precision: see `hpetr.inference.precision.autocast`.
        compiled: run the network through torch.compile. The first image takes a minute or more; sizes and batches may
            change afterwards.

    Raises:
        InputError: the checkpoint cannot be loaded, the device does not exist, the threshold is not in 0..1, or the
            precision is unknown.

    Examples:
        >>> predictor = PosePredictor()
        >>> result = predictor("photo.jpg")
        >>> result.keypoints.shape  # (persons, 17, 2)
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
        check_precision(precision)
        self.model, self.processor = load_checkpoint(checkpoint, device)
        self.threshold = self.processor.threshold if threshold is None else threshold
        self.precision = precision
        if compiled:
            self.model.compile(dynamic=True)

    @property
    def skeleton(self) -> Skeleton:
        """Names, edges, mirror pairs and sigmas of the keypoints."""
        return Skeleton.from_dict(self.model.config.skeleton)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return class_names(self.model)

    @property
    def default_batch_size(self) -> int:
        """Images in a batch, unless a call gives a number."""
        return default_batch_size(self.model)

    @property
    def num_poses(self) -> int:
        """Maximum number of poses per image."""
        return self.model.config.num_poses

    @property
    def device_name(self) -> str:
        """Device of the network: cpu, cuda:0, ..."""
        return str(self.model.device)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image in the network, before padding."""
        limits = self.processor.size
        return keep_ratio_size(height, width, limits["shortest_edge"], limits["longest_edge"])

    def read(self, image: ImageSource) -> np.ndarray:
        """Return an image as (H, W, 3) uint8 RGB, see `load_image`."""
        return load_image(image)

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Predict the poses of one batch of images, each (H, W, 3) uint8 RGB."""
        chosen = self.threshold if threshold is None else threshold
        return predict_batch(self.model, self.processor, images, chosen, self.precision)


def class_names(model: HPetrForPoseEstimation) -> list[str]:
    """Return the names of a model's classes, by label."""
    return [name for _, name in sorted((model.config.id2label or {}).items())]


def default_batch_size(model: HPetrForPoseEstimation) -> int:
    """Return 8 on a GPU, and 1 on the CPU, where the padding of a batch costs more than it gains."""
    return 8 if model.device.type == "cuda" else 1


@torch.inference_mode()
def predict_batch(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    images: Sequence[np.ndarray],
    threshold: float | None = None,
    precision: str = "float32",
) -> list[PoseResult]:
    """Predict the poses of a batch of images in one pass.

    Args:
        model: in eval mode.
        processor: the model's own.
        images: B arrays (H, W, 3) uint8 RGB.
        threshold: minimum score of a pose, exclusive; None means the processor's.
        precision: see `hpetr.inference.precision.autocast`.
    """
    with stage(RESIZE):
        batch = processor(list(images))
    with autocast(model.device, precision):
        outputs = model(**batch.to(model.device))
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    skeleton = Skeleton.from_dict(model.config.skeleton)
    with stage(POST_PROCESSING):
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
