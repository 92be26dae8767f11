"""Targets of a batch, and the assignment of predictions to them, batched over images, layers and groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig
from hpetr.model.groups import Assignment
from hpetr.model.host import HostCopy, to_device
from hpetr.model.proposals import Predictions

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@dataclass
class Targets:
    """The people of a batch, padded to n, the largest number of an image.

    Attributes:
        keypoints: (B, n, K, 2) x, y in pixels.
        visible: (B, n, K) bool, true where a keypoint is labelled.
        absent: (B, n, K) bool, true where a keypoint is known to be invisible.
        areas: (B, n) pixels^2.
        boxes: (B, n, 4) xyxy pixels.
        classes: (B, n).
        sizes: (B, 2) width and height of the unpadded images in pixels.
        ignore_boxes: (B, m, 4) xyxy pixels of regions that are neither person nor background; zeros pad.
        counts: people of each image.
    """

    keypoints: Tensor
    visible: Tensor
    absent: Tensor
    areas: Tensor
    boxes: Tensor
    classes: Tensor
    sizes: Tensor
    ignore_boxes: Tensor
    counts: list[int]

    def oks_unit(self, config: HPetrConfig) -> Tensor:
        """Return the unit of distances in the OKS, (B, 2) pixels: 1, or the image's size for normalized coordinates."""
        return self.sizes if config.oks_space == "normalized" else torch.ones_like(self.sizes)


@dataclass
class Matches:
    """The m matched pairs of several parts, on the device; a part is one query group of one decoder layer.

    Attributes:
        sizes: number of pairs of each part.
        part: (m,) index of the part.
        image: (m,) index of the image.
        query: (m,) index of the query, over all groups.
        target: (m,) index of the person in its image.
        slot: (m,) index of the pose among its image's poses in the joint decoder, 0 for other parts.
    """

    sizes: list[int]
    part: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    slot: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Return sums of values (m,) over each part, (parts,), added in the same order every time."""
        parts = torch.arange(len(self.sizes), device=values.device)
        return torch.where(self.part == parts[:, None], values, 0.0).sum(1)


def check_labels(labels: list[dict[str, Tensor]], batch: int, num_keypoints: int) -> None:
    """Raise InputError, which names the image and the field, for labels of other shapes than documented."""
    if len(labels) != batch:
        raise InputError(f"labels: {len(labels)} entries, expected one for each of the {batch} images")
    for i, label in enumerate(labels):
        for field in ("keypoints", "boxes", "areas", "class_labels"):
            if field not in label:
                raise InputError(f"labels[{i}]: field {field!r} is missing")
        n = len(label["keypoints"])
        expected = {"keypoints": (n, num_keypoints, 3), "boxes": (n, 4), "areas": (n,), "class_labels": (n,)}
        for field, shape in expected.items():
            if tuple(label[field].shape) != shape:
                raise InputError(f"labels[{i}].{field}: shape {tuple(label[field].shape)}, expected {shape}")


def make_targets(labels: list[dict[str, Tensor]], sizes: Tensor) -> Targets:
    """Return the targets of a batch.

    Args:
        labels: see `HPetrForPoseEstimation.forward`; on the host or on the device. From the host, each field is copied
            once.
        sizes: (B, 2) width and height of the unpadded images.
    """

    def batched(field: str, dtype: torch.dtype) -> Tensor:
        values = pad_sequence([label[field].to(dtype) for label in labels], batch_first=True)
        return to_device(values, sizes.device) if values.device.type == "cpu" else values

    keypoints = batched("keypoints", torch.float32)  # (B, n, K, 3)
    missing = labels[0]["boxes"].new_zeros(0, 4, dtype=torch.float32)
    ignored = pad_sequence([label.get("ignore_boxes", missing).to(missing) for label in labels], batch_first=True)
    return Targets(
        keypoints=keypoints[..., :2],
        visible=keypoints[..., 2] > 0,
        absent=keypoints[..., 2] < 0,
        areas=batched("areas", torch.float32).clamp(min=1e-6),
        boxes=batched("boxes", torch.float32),
        classes=batched("class_labels", torch.int64),
        sizes=sizes,
        ignore_boxes=to_device(ignored, sizes.device) if ignored.device.type == "cpu" else ignored,
        counts=[len(label["areas"]) for label in labels],
    )


def keypoint_similarity(squared_distances: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """Return exp(-d^2 / (2 area (2 sigma)^2)), (..., K), from d^2 (..., K) and areas (...,) in pixels^2."""
    return (-squared_distances / (2 * areas[..., None] * (2 * sigmas) ** 2)).exp()


def object_keypoint_similarity(squared_distances: Tensor, visible: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """Return COCO's OKS, the mean of `keypoint_similarity` over labelled keypoints.

    Args:
        squared_distances: (..., K) pixels^2.
        visible: (..., K).
        areas: (...,) pixels^2.
        sigmas: (K,).

    Returns:
        (...,); 0 for a person without labelled keypoints.
    """
    similarity = keypoint_similarity(squared_distances, areas, sigmas)
    return (similarity * visible).sum(-1) / visible.sum(-1).clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def pose_cost(predictions: Predictions, targets: Targets, config: HPetrConfig, sigmas: Tensor) -> Tensor:
    """Return the cost of assigning each prediction to each target: (..., B, Q, n) from predictions (..., B, Q, ...).

    Weighted focal cost + keypoint L1 - OKS (PETR, section 3.4). The keypoints are summed one by one: the
    (Q, n, K, 2) differences of all proposals at once take gigabytes.
    """
    probability = at_least_float32(predictions.logits).sigmoid()
    negative = -(1 - probability + 1e-12).log() * (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA
    positive = -(probability + 1e-12).log() * FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA
    focal = positive - negative  # (..., B, Q, C)
    # (..., B, Q, n); a product with one-hot classes would run in bfloat16 under autocast
    classes = (targets.classes[:, None] + config.leading_columns).expand(*focal.shape[:-1], -1)
    cost = config.cost_class * focal.gather(-1, classes)

    sizes = targets.sizes[:, None, None]  # (B, 1, 1, 2)
    keypoints = predictions.keypoints * sizes  # (..., B, Q, K, 2) pixels
    labelled = targets.visible.sum(-1).clamp(min=1)  # (B, n)
    unit = targets.oks_unit(config)[:, None, None]  # (B, 1, 1, 2)
    scale = 2 * (targets.areas / unit.prod(-1)[:, 0])[..., None] * (2 * sigmas) ** 2  # (B, n, K)
    distance, similarity = torch.zeros_like(cost), torch.zeros_like(cost)
    for k in range(len(sigmas)):
        seen = targets.visible[:, None, :, k]  # (B, 1, n)
        difference = keypoints[..., k, None, :] - targets.keypoints[:, None, :, k]  # (..., Q, n, 2)
        distance += (difference.abs() / sizes).sum(-1) * seen
        similarity += (-(difference / unit).square().sum(-1) / scale[:, None, :, k]).exp() * seen
    # (B, 1, n): PETR's L1 is a mean over coordinates, Group Pose's a sum
    coordinates = 2 * labelled[:, None] if config.divisor == "keypoints" else torch.ones_like(labelled[:, None])
    cost += config.cost_l1 * distance / coordinates
    return cost - config.cost_oks * similarity / labelled[:, None]


class PendingAssignments:
    """Assignments of predictions to targets, in two steps so that the device works while the costs travel to the host.

    Args:
        costs: one (B, Q_i, n) for each part.
        counts: number of people of each image; costs beyond them are padding.
        assignments: the rule of each part.
    """

    def __init__(self, costs: list[Tensor], counts: list[int], assignments: list[Assignment]):
        self.shapes, self.counts, self.assignments = [cost.shape for cost in costs], counts, assignments
        self.copy = HostCopy(torch.cat([cost.flatten() for cost in costs]))

    def solve(self) -> list[np.ndarray]:
        """Wait for the costs, and return for each part (3, m) image, query and target of its pairs, sorted by image.

        Raises:
            FloatingPointError: a cost is NaN or infinite.
        """
        host = self.copy.wait()
        pairs: list[np.ndarray] = []
        start = 0
        for shape, assign in zip(self.shapes, self.assignments, strict=True):
            matrices = host[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
            rows = [np.zeros((3, 0), np.int64)]
            for image, count in enumerate(self.counts):
                matrix = matrices[image, :, :count]
                if not np.isfinite(matrix).all():
                    raise FloatingPointError(f"matching: the cost of image {image} of the batch is not finite")
                query, target = assign(matrix)
                rows.append(np.stack([np.full_like(query, image), query, target]))
            pairs.append(np.concatenate(rows, 1))
        return pairs
