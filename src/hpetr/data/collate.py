"""Training batches of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from hpetr.data.sample import LABEL_FIELDS, Sample
from hpetr.images.pixels import IMAGENET_MEAN, IMAGENET_STD, batch_side
from hpetr.model.image_processor import HPetrImageProcessor


@dataclass(frozen=True)
class PoseCollator:
    """Put the images of B samples into one batch, padded as the processor does, and make tensors of their labels.

    The pixels stay bytes: they are copied between processes and to a device at a quarter of the size of floats, and
    `normalize` converts them there.

    Args:
        image_mean: see `HPetrImageProcessor`; `from_processor` takes all three from one.
        image_std: see `HPetrImageProcessor`.
        pad_size_divisor: see `HPetrImageProcessor`.

    Returns, when called:
        dict with `pixel_values` (B, 3, H, W) uint8, 0 on padding, `pixel_mask` (B, H, W) bool, true on the image, and
        `labels`, a list of B dicts of tensors, in pixels of the image before padding: `keypoints` (n, K, 3) x, y,
        visibility; `boxes` (n, 4) x1, y1, x2, y2; `areas` (n,); `class_labels` (n,) int64; `ignore_boxes` (m, 4).
        `images` is a list of B pairs of image id and path, which stay on the host.
    """

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    pad_size_divisor: int = 1

    @classmethod
    def from_processor(cls, processor: HPetrImageProcessor) -> PoseCollator:
        """Return a collator with the processor's normalization and padding."""
        return cls(processor.image_mean, processor.image_std, processor.pad_size_divisor)

    def __call__(self, samples: Sequence[Sample]) -> Any:
        packed = _Packed.of(samples, self.pad_size_divisor)
        return packed if get_worker_info() is not None else packed.batch()

    def normalize(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32, 0 on padding, of a batch's (B, 3, H, W) uint8 and (B, H, W), on their device.

        Equal to the processor's within float32's rounding.
        """
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixel_values.device)[:, None, None] * 255
            for values in (self.image_mean, self.image_std)
        )
        return pixel_values.float().sub_(mean).div_(std).mul_(pixel_mask[:, None])


@dataclass(frozen=True)
class _Packed:
    """The arrays of a batch, which a worker process of a DataLoader sends; unpickled, they are the batch.

    Tensors would be sent through shared memory, one file descriptor each.
    """

    pixels: np.ndarray  # (B, 3, H, W) uint8
    sizes: list[tuple[int, int]]  # height and width of each image
    labels: list[dict[str, np.ndarray]]
    images: list[tuple[int, str]]

    @classmethod
    def of(cls, samples: Sequence[Sample], divisor: int) -> _Packed:
        sizes = [sample.image.shape[:2] for sample in samples]
        height, width = (batch_side(sides, divisor) for sides in zip(*sizes, strict=True))
        pixels = np.empty((len(samples), 3, height, width), dtype=np.uint8)
        for planes, sample, (h, w) in zip(pixels, samples, sizes, strict=True):
            for plane, channel in zip(planes, cv2.split(sample.image), strict=True):
                plane[:h, :w] = channel
            planes[:, h:] = 0
            planes[:, :h, w:] = 0
        labels = [{name: getattr(sample, name) for name in LABEL_FIELDS} for sample in samples]
        return cls(pixels, sizes, labels, [(sample.image_id, str(sample.path)) for sample in samples])

    def batch(self) -> dict[str, Any]:
        batch, _, height, width = self.pixels.shape
        mask = torch.zeros(batch, height, width, dtype=torch.bool)
        for image, (h, w) in zip(mask, self.sizes, strict=True):
            image[:h, :w] = True
        return {
            "pixel_values": torch.from_numpy(self.pixels),
            "pixel_mask": mask,
            "labels": [{name: torch.from_numpy(array) for name, array in person.items()} for person in self.labels],
            "images": self.images,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.pixels, self.sizes, self.labels, self.images)


def _unpack(*parts: Any) -> dict[str, Any]:
    return _Packed(*parts).batch()
