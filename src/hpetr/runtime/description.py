"""The description in an exported model beside its network: how images go in, and how poses come out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from hpetr.errors import InputError
from hpetr.images.pixels import MIN_BATCH_SIDE
from hpetr.poses.postprocess import KEYPOINT_THRESHOLD
from hpetr.poses.skeleton import Skeleton

FORMAT = 1
KEY = "hpetr"  # of the description in a file's metadata
# Names of the network's tensors; `ModelDescription.to_json` has their types and shapes.
INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("scores", "poses", "pose_labels", "keypoint_scores")


# The two ways to resize, in words, by `antialias`.
RESIZE = {
    False: {
        "scale": "min(longest_edge / longer side, shortest_edge / shorter side)",
        "sides": "max(1, floor(side * scale + 0.5))",
        "interpolation": "bilinear between pixel centers, without antialiasing",
    },
    True: {
        "shorter": "shortest_edge, or round(longest_edge * shorter side / longer side) where the longer would pass it",
        "longer": "floor(shorter * longer side / shorter side)",
        "interpolation": "bilinear with antialiasing, as Pillow's",
    },
}


@dataclass(frozen=True)
class ModelDescription:
    """The description of an exported model.

    Attributes:
        model: name of the checkpoint.
        hpetr: version that exported it.
        shortest_edge, longest_edge, image_mean, image_std, pad_size_divisor, threshold, keypoint_threshold: as in
            `HPetrImageProcessor`.
        num_poses: maximum number of poses per image.
        classes: names by label.
        skeleton: of the keypoints.

    Raises:
        InputError: a number is out of range.
    """

    model: str
    hpetr: str
    shortest_edge: int
    longest_edge: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    pad_size_divisor: int
    threshold: float
    num_poses: int
    classes: tuple[str, ...]
    skeleton: Skeleton
    keypoint_threshold: float = KEYPOINT_THRESHOLD
    antialias: bool = False

    def __post_init__(self) -> None:
        for name in ("shortest_edge", "longest_edge", "pad_size_divisor", "num_poses"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise InputError(f"{name!r} is {value!r}, expected a whole number of at least 1")
        for name in ("image_mean", "image_std"):
            if len(numbers := getattr(self, name)) != 3 or (name == "image_std" and 0 in numbers):
                raise InputError(f"{name!r} is {list(numbers)}, expected 3 numbers, of a deviation none of them 0")
        for name in ("threshold", "keypoint_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name!r} is {getattr(self, name)}, expected a number in 0..1")

    def to_json(self) -> str:
        """Return the description as programs in any language can follow it; `from_json` reads it back."""
        steps = {
            "format": FORMAT,
            "hpetr": self.hpetr,
            "model": self.model,
            "inputs": {
                "pixel_values": "float32 (batch, 3, height, width), RGB planes, each image in the top left corner",
                "pixel_mask": "int64 (batch, height, width), 1 = image, 0 = padding",
            },
            "outputs": {
                "scores": "float32 (batch, poses), best first",
                "poses": "float32 (batch, poses, keypoints, 2), x and y, 1 = width and height without padding",
                "pose_labels": "int64 (batch, poses), index into classes",
                "keypoint_scores": "float32 (batch, poses, keypoints), 1 where the model gives none",
            },
            "preprocessing": {
                "exif_orientation": "applied",
                "channels": "RGB",
                "resize": {
                    "shortest_edge": self.shortest_edge,
                    "longest_edge": self.longest_edge,
                    "antialias": self.antialias,
                    **RESIZE[self.antialias],
                },
                "normalize": "(pixel / 255 - mean) / std",
                "mean": list(self.image_mean),
                "std": list(self.image_std),
                "pad": {
                    "where": "right and bottom, after normalizing",
                    "value": 0,
                    "multiple_of": self.pad_size_divisor,
                    "least_side": MIN_BATCH_SIDE,
                },
            },
            "postprocessing": {
                "keep": "score > threshold",
                "threshold": self.threshold,
                "keypoint_threshold": self.keypoint_threshold,
                "keypoints": "clip to 0..1, multiply with the width and height of the original image",
                "box": "extent of the keypoints with score >= keypoint_threshold, of all if there is none",
                "suppression": "none",
            },
            "num_poses": self.num_poses,
            "classes": list(self.classes),
            "skeleton": self.skeleton.to_dict(),
        }
        return json.dumps(steps, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> ModelDescription:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.
            source: the file, for errors.

        Raises:
            InputError: it is not a description of hpetr, of a later format, or a field is wrong.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"{source}: its description is not JSON, expected what hpetr export writes") from error
        if not isinstance(values, Mapping) or "format" not in values:
            raise InputError(f"{source}: its description has no 'format', expected what hpetr export writes")
        if values["format"] != FORMAT:
            raise InputError(f"{source}: its description has format {values['format']!r}, expected {FORMAT}")
        try:
            before, after = values["preprocessing"], values["postprocessing"]
            return cls(
                model=str(values["model"]),
                hpetr=str(values["hpetr"]),
                shortest_edge=before["resize"]["shortest_edge"],
                longest_edge=before["resize"]["longest_edge"],
                image_mean=tuple(map(float, before["mean"])),
                image_std=tuple(map(float, before["std"])),
                pad_size_divisor=before["pad"]["multiple_of"],
                threshold=float(after["threshold"]),
                num_poses=values["num_poses"],
                classes=tuple(map(str, values["classes"])),
                skeleton=Skeleton.from_dict(values["skeleton"]),
                keypoint_threshold=float(after.get("keypoint_threshold", KEYPOINT_THRESHOLD)),
                antialias=bool(before["resize"].get("antialias", False)),
            )
        except InputError as error:
            raise InputError(f"{source}: its description: {error}") from error
        except KeyError as error:
            raise InputError(f"{source}: its description has no {error.args[0]!r}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"{source}: its description is not valid ({error})") from error
