"""Poses of images, from Python: `PosePredictor`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.inference.precision import autocast, check_precision
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor, output_arrays
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
        keypoint_threshold: keypoints with a lower score do not count as found; None means the checkpoint's own.

    Raises:
        InputError: the checkpoint cannot be loaded, the device does not exist, a threshold is not in 0..1, or the
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
        keypoint_threshold: float | None = None,
    ) -> None:
        check_threshold(threshold)
        check_threshold(keypoint_threshold, "keypoint_threshold")
        check_precision(precision)
        self.model, self.processor = load_checkpoint(checkpoint, device)
        own = self.processor
        self.threshold = own.threshold if threshold is None else threshold
        self.keypoint_threshold = own.keypoint_threshold if keypoint_threshold is None else keypoint_threshold
        self.skeleton = Skeleton.from_dict(self.model.config.skeleton)
        self.class_names = class_names(self.model)
        self.default_batch_size = default_batch_size(self.model)
        self.num_poses = self.model.config.num_poses
        self.device_name = str(self.model.device)
        self.resize = own.resize
        self.precision = precision
        if compiled:
            self.model.compile(dynamic=True)

    def predict(self, images: Sequence[np.ndarray], threshold: float | None = None) -> list[PoseResult]:
        """Predict the poses of one batch of images, each (H, W, 3) uint8 RGB."""
        chosen = self.threshold if threshold is None else threshold
        return predict_batch(self.model, self.processor, images, chosen, self.precision, self.keypoint_threshold)


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
    keypoint_threshold: float | None = None,
) -> list[PoseResult]:
    """Predict the poses of a batch of images in one pass.

    Args:
        model: in eval mode.
        processor: the model's own.
        images: B arrays (H, W, 3) uint8 RGB.
        threshold: minimum score of a pose, exclusive; None means the processor's.
        precision: see `hpetr.inference.precision.autocast`.
        keypoint_threshold: keypoints with a lower score do not count as found; None means the processor's.
    """
    with stage(RESIZE):
        batch = processor(list(images))
    with autocast(model.device, precision):
        outputs = model(**batch.to(model.device))
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    skeleton = Skeleton.from_dict(model.config.skeleton)
    limits = (
        processor.threshold if threshold is None else threshold,
        processor.keypoint_threshold if keypoint_threshold is None else keypoint_threshold,
    )
    with stage(POST_PROCESSING):
        return PoseResult.from_outputs(output_arrays(outputs), sizes, skeleton, *limits)
