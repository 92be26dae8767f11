"""The image processor: images in, a padded batch out; and network outputs back to poses in image pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypedDict

import numpy as np
import torch
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from hpetr.errors import InputError
from hpetr.images.pixels import IMAGENET_MEAN, IMAGENET_STD, Resize, normalize_and_pad
from hpetr.images.read import ImageSource, load_image
from hpetr.poses.postprocess import KEYPOINT_THRESHOLD, select_poses

DEFAULT_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
# A square batch of one image takes 800 MB: a larger side is a mistake, or somebody's attempt on the memory.
MAX_SIDE = 8_192


class PoseOutputs(Protocol):
    """What `post_process_pose_estimation` reads of the model's output, coordinates normalized to the image.

    `scores` (B, T) and `poses` (B, T, K, 2). `keypoint_scores` (B, T, K) and `pose_labels` (B, T) are optional.
    """

    scores: torch.Tensor
    poses: torch.Tensor


class ImageBatch(BatchFeature):
    """`pixel_values` and `pixel_mask`, and the images' sizes as an attribute.

    `original_sizes` is no key, so that `model(**batch)` works as it is.
    """

    original_sizes: list[tuple[int, int]]

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "original_sizes": self.original_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class HPetrImageProcessorKwargs(TypedDict, total=False):
    """The processor's parameters; transformers reads from here which ones `from_pretrained` may override."""

    size: dict[str, int]
    image_mean: list[float]
    image_std: list[float]
    pad_size_divisor: int
    threshold: float
    keypoint_threshold: float
    antialias: bool


class HPetrImageProcessor(BaseImageProcessor):
    """Resizes with the aspect ratio kept, normalizes and pads images; turns outputs into poses.

    Args:
        size: `shortest_edge` and `longest_edge` in pixels: the largest scale at which neither side exceeds its limit.
        image_mean: three numbers, for RGB pixels in 0..1 (the official 123.675, ... divided by 255).
        image_std: three numbers, likewise.
        pad_size_divisor: height and width of a batch are padded up to multiples of it.
        threshold: a pose is reported when its score is above it, unless a call gives another threshold.
        keypoint_threshold: keypoints with a lower score do not count as found in boxes, drawings and labels.
        antialias: resize as Group Pose's official pipeline does, with Pillow's filter and rounding; else as PETR's.

    Raises:
        InputError: a parameter has a wrong value, or an unknown parameter is given.
    """

    valid_kwargs = HPetrImageProcessorKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 (the base class declares it so)

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        pad_size_divisor: int = 1,
        threshold: float = 0.3,
        keypoint_threshold: float = KEYPOINT_THRESHOLD,
        antialias: bool = False,
        **kwargs: Any,
    ) -> None:
        # transformers writes these three beside the parameters in preprocessor_config.json.
        service_keys = {key: kwargs.pop(key) for key in ("processor_class", "auto_map") if key in kwargs}
        kwargs.pop("image_processor_type", None)
        if kwargs:
            known = ", ".join(HPetrImageProcessorKwargs.__annotations__)
            raise InputError(f"image processor: unknown parameter {next(iter(kwargs))!r}, expected one of {known}")
        super().__init__(**service_keys)
        self.size = _checked_size(DEFAULT_SIZE if size is None else size)
        self.image_mean = _checked_channels("image_mean", image_mean)
        self.image_std = _checked_channels("image_std", image_std)
        if not all(0 < std <= 1 for std in self.image_std) or not all(0 <= mean <= 1 for mean in self.image_mean):
            raise InputError("image processor: image_mean and image_std are for pixels in 0..1: divide by 255")
        if not _is_whole(pad_size_divisor) or not 1 <= pad_size_divisor <= MAX_SIDE:
            raise InputError(
                f"image processor: pad_size_divisor is {pad_size_divisor!r}, expected a whole number in 1..{MAX_SIDE:,}"
            )
        self.pad_size_divisor = int(pad_size_divisor)
        for name, value in (("threshold", threshold), ("keypoint_threshold", keypoint_threshold)):
            if not isinstance(value, Real) or not 0 <= value <= 1:
                raise InputError(f"image processor: {name} is {value!r}, expected a number in 0..1")
        self.threshold: float = float(threshold)
        self.keypoint_threshold: float = float(keypoint_threshold)
        if not isinstance(antialias, bool):
            raise InputError(f"image processor: antialias is {antialias!r}, expected true or false")
        self.antialias = antialias

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the processor of a model of the zoo, as its official code prepares images."""
        return cls(antialias=name.startswith("group-pose"))

    @property
    def resize(self) -> Resize:
        """The resize of images for the network."""
        return Resize(self.size["shortest_edge"], self.size["longest_edge"], self.antialias)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON; the file appears complete or not at all."""
        path = Path(json_file_path)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(self.to_json_string(), encoding="utf-8")
        unfinished.replace(path)

    def preprocess(
        self,
        images: ImageSource | Sequence[ImageSource],
        size: Mapping[str, int] | None = None,
        return_tensors: Literal["pt", "np"] = "pt",
    ) -> ImageBatch:
        """A batch of images for the model; `processor(images, ...)` is the same.

        Args:
            images: what `load_image` takes, or a list of B of them (also an array (B, H, W, 3) uint8).
            size: overrides the processor's own for this call.
            return_tensors: torch tensors ("pt") or NumPy arrays ("np").

        Returns:
            A BatchFeature with `pixel_values` (B, 3, H, W) float32, 0 on padding, and `pixel_mask` (B, H, W) int64,
            1 = image. Its attribute `original_sizes` is a list of B (height, width) of the images given, the
            `target_sizes` of `post_process_pose_estimation`.

        Raises:
            InputError: an image cannot be read, or no image is given.
        """
        if return_tensors not in ("pt", "np"):
            raise InputError(f"image processor: return_tensors is {return_tensors!r}, expected 'pt' or 'np'")
        limits = self.size if size is None else _checked_size(size)
        resize = Resize(limits["shortest_edge"], limits["longest_edge"], self.antialias)
        originals = [load_image(source) for source in _as_list(images)]
        resized = [resize(image) for image in originals]
        pixel_values, pixel_mask = normalize_and_pad(resized, self.image_mean, self.image_std, self.pad_size_divisor)
        batch = ImageBatch({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, tensor_type=return_tensors)
        batch.original_sizes = [(image.shape[0], image.shape[1]) for image in originals]
        return batch

    def post_process_pose_estimation(
        self,
        outputs: PoseOutputs,
        target_sizes: torch.Tensor | Sequence[Sequence[int]] | None = None,
        threshold: float | None = None,
        keypoint_threshold: float | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Return poses in pixels of the original images.

        Args:
            outputs: the model's output; see `PoseOutputs`.
            target_sizes: (B, 2) tensor, or B pairs, (height, width) in pixels of the original images; None gives
                coordinates in 0..1 of the image.
            threshold: minimum score of a pose, exclusive; None means the processor's.
            keypoint_threshold: keypoints with a lower score do not count in boxes; None means the processor's.

        Returns:
            Per image a dict, best pose first: `scores` (n), `keypoints` (n, K, 2) x, y clipped to the image,
            `keypoint_scores` (n, K), 1 if the model gives none, `boxes` (n, 4) x1, y1, x2, y2 around the keypoints that
            count, around all if none does, `labels` (n) int64.

        Raises:
            InputError: the number of target sizes is not that of images, or poses are NaN or infinite.
        """
        count = len(outputs.scores)
        sizes = torch.ones(count, 2) if target_sizes is None else torch.as_tensor(target_sizes)  # (B, 2)
        if sizes.shape != (count, 2):
            raise InputError(
                f"target_sizes of shape {tuple(sizes.shape)}: expected ({count}, 2), (height, width) per image"
            )
        found = select_poses(
            output_arrays(outputs),
            sizes.tolist(),
            self.threshold if threshold is None else float(threshold),
            self.keypoint_threshold if keypoint_threshold is None else float(keypoint_threshold),
        )
        device = outputs.scores.device
        return [{name: torch.from_numpy(values).to(device) for name, values in poses.items()} for poses in found]


def output_arrays(outputs: PoseOutputs) -> dict[str, np.ndarray]:
    """Return a model's output as `select_poses` takes it, with the optional fields."""
    scores, poses = outputs.scores.float(), outputs.poses.float()  # half precision holds no pixel of 1333
    keypoint_scores, labels = getattr(outputs, "keypoint_scores", None), getattr(outputs, "pose_labels", None)
    tensors = {
        "scores": scores,
        "poses": poses,
        "keypoint_scores": torch.ones_like(poses[..., 0]) if keypoint_scores is None else keypoint_scores.float(),
        "pose_labels": torch.zeros_like(scores, dtype=torch.int64) if labels is None else labels,
    }
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, (list, tuple)):
        return [images]
    if not images:
        raise InputError("images: the list is empty, expected at least one image")
    return list(images)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_size(size: Any) -> dict[str, int]:
    if not isinstance(size, Mapping) or set(size) != set(DEFAULT_SIZE):
        raise InputError(f"image processor: size is {size!r}, expected the keys {' and '.join(DEFAULT_SIZE)}")
    if not all(_is_whole(side) and 0 < side <= MAX_SIDE for side in size.values()):
        raise InputError(f"image processor: size is {dict(size)}, expected positive whole numbers up to {MAX_SIDE:,}")
    if size["longest_edge"] < size["shortest_edge"]:
        raise InputError(f"image processor: size is {dict(size)}, expected longest_edge >= shortest_edge")
    return {name: int(size[name]) for name in DEFAULT_SIZE}


def _checked_channels(name: str, values: Any) -> list[float]:
    if not isinstance(values, Sequence) or len(values) != 3 or not all(isinstance(value, Real) for value in values):
        raise InputError(f"image processor: {name} is {values!r}, expected three numbers")
    return [float(value) for value in values]
