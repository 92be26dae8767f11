"""Samples to a training batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info

from hpetr.data.processor import HPetrImageProcessor
from hpetr.data.sample import Sample
from hpetr.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize_and_pad


@dataclass(frozen=True)
class PoseCollator:
    """Normalise and pad the pictures of B samples as the processor does, and make tensors of their labels.

    As `collate_fn` of a DataLoader with worker processes, the tensors are made in the process that reads the batch.

    Args:
        image_mean, image_std, pad_size_divisor: see `HPetrImageProcessor`; `from_processor` takes them from one.

    Returns, when called:
        dict with `pixel_values` (B, 3, H, W) float32, `pixel_mask` (B, H, W) int64, 1 = picture, and `labels`, a list
        of B dicts of tensors, in pixels of the picture before padding: `keypoints` (n, K, 3) x, y, visibility;
        `boxes` (n, 4) x1, y1, x2, y2; `areas` (n,); `class_labels` (n,) int64; `ignore_boxes` (m, 4). `pictures` is a
        list of B pairs of image id and path, which no device gets to see.
    """

    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    pad_size_divisor: int = 1

    @classmethod
    def from_processor(cls, processor: HPetrImageProcessor) -> PoseCollator:
        """A collator with the processor's normalisation and padding."""
        return cls(processor.image_mean, processor.image_std, processor.pad_size_divisor)

    def __call__(self, samples: Sequence[Sample]) -> Any:
        return self.batch(samples) if get_worker_info() is None else _Parcel(self, samples)

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch itself, in any process."""
        images = [sample.image for sample in samples]
        pixel_values, pixel_mask = normalize_and_pad(images, self.image_mean, self.image_std, self.pad_size_divisor)
        return {
            "pixel_values": torch.from_numpy(pixel_values),
            "pixel_mask": torch.from_numpy(pixel_mask),
            "labels": [_label_tensors(sample) for sample in samples],
            "pictures": [(sample.image_id, str(sample.path)) for sample in samples],
        }


@dataclass(frozen=True)
class _Parcel:
    """What a worker process of a DataLoader sends: unpickled, it is the batch.

    Tensors would travel through shared memory, one file descriptor each, and the batch has about seven times the bytes
    of its uint8 pictures. Sending the samples instead takes less than half the processor time, and no more of the
    receiver's.
    """

    collator: PoseCollator
    samples: Sequence[Sample]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.collator.batch, (self.samples,)


def _label_tensors(sample: Sample) -> dict[str, torch.Tensor]:
    return {
        "keypoints": torch.from_numpy(sample.keypoints),
        "boxes": torch.from_numpy(sample.boxes),
        "areas": torch.from_numpy(sample.areas),
        "class_labels": torch.from_numpy(sample.class_labels),
        "ignore_boxes": torch.from_numpy(sample.ignore_boxes),
    }
