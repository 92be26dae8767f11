"""Augmentation: callables `(sample, rng) -> sample` that do not modify their argument.

Every random choice comes from the generator given, so a sample and a seed give the same result in any process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cv2
import numpy as np

from hpetr.data.sample import LABEL_FIELDS, Sample, move_labels
from hpetr.errors import InputError
from hpetr.images.pixels import IMAGENET_MEAN, keep_ratio_size, resize_image

# OpenCV's warps index pixels with 16-bit integers.
_MAX_WARP_SIDE = 32766


class Transform(Protocol):
    """An augmentation."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...


@dataclass(frozen=True)
class Compose:
    """Apply one transform after the other."""

    transforms: Sequence[Transform]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


@dataclass(frozen=True)
class OneOf:
    """Apply one of the transforms, chosen with equal probability."""

    transforms: Sequence[Transform]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.transforms[int(rng.integers(len(self.transforms)))](sample, rng)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirror the image with probability `p`; left joints become right ones.

    Args:
        p: probability.
        flip_index: the skeleton's permutation of length K (`Skeleton.flip_index`).
    """

    p: float
    flip_index: Sequence[int]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.p:
            return sample
        matrix = np.array([[-1, 0, sample.image.shape[1]], [0, 1, 0]], dtype=np.float64)
        flipped = move_labels(sample, cv2.flip(sample.image, 1), matrix)
        return replace(flipped, keypoints=flipped.keypoints[:, list(self.flip_index)])


def _resize(sample: Sample, height: int, width: int) -> Sample:
    old_height, old_width = sample.image.shape[:2]
    matrix = np.array([[width / old_width, 0, 0], [0, height / old_height, 0]])
    return move_labels(sample, resize_image(sample.image, height, width), matrix)


@dataclass(frozen=True)
class KeepRatioResize:
    """Resize as the processor does: the largest scale with short side at most `short`, long side at most `long`."""

    short: int
    long: int

    def __call__(self, sample: Sample, rng: np.random.Generator | None = None) -> Sample:
        height, width = sample.image.shape[:2]
        return _resize(sample, *keep_ratio_size(height, width, self.short, self.long))


@dataclass(frozen=True)
class RandomResize:
    """Resize to one of `short_sides` (a list, or a `range`), long side at most `long_side`; see `KeepRatioResize`."""

    short_sides: Sequence[int]
    long_side: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        short = self.short_sides[int(rng.integers(len(self.short_sides)))]
        return KeepRatioResize(short, self.long_side)(sample)


@dataclass(frozen=True)
class RandomCropResize:
    """Resize, cut out a rectangle at a random place, and resize that.

    A cut without people shows background.

    Args:
        first: before the cut.
        second: after the cut.
        crop_height: smallest and largest height of the cut in pixels, drawn evenly; at most the image's.
        crop_width: likewise.
    """

    first: RandomResize
    second: RandomResize
    crop_height: tuple[int, int] = (384, 384)
    crop_width: tuple[int, int] = (600, 600)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        sample = self.first(sample, rng)
        height, width = sample.image.shape[:2]
        top, bottom = _random_span(height, self.crop_height, rng)
        left, right = _random_span(width, self.crop_width, rng)
        matrix = np.array([[1, 0, -left], [0, 1, -top]], dtype=np.float64)
        return self.second(move_labels(sample, sample.image[top:bottom, left:right], matrix), rng)


def _random_span(side: int, sizes: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    size = int(rng.integers(min(side, sizes[0]), min(side, sizes[1]) + 1))
    start = int(rng.integers(0, side - size + 1))
    return start, start + size


def mosaic(samples: Sequence[Sample], fill: tuple[float, float, float]) -> Sample:
    """Join four images, two by two, to show crowds and small people in data of mostly single people.

    Every image is resized to the mean of their long sides and centered in its square cell, filled with `fill`, RGB in
    0..255. Path and id are the first one's.
    """
    side = round(float(np.mean([max(sample.image.shape[:2]) for sample in samples])))
    canvas = np.full((2 * side, 2 * side, 3), np.rint(fill), dtype=np.uint8)
    parts = []
    for place, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        height, width = keep_ratio_size(height, width, side, side)
        resized = _resize(sample, height, width)
        left, top = place % 2 * side + (side - width) // 2, place // 2 * side + (side - height) // 2
        canvas[top : top + height, left : left + width] = resized.image
        parts.append(move_labels(resized, canvas, np.array([[1.0, 0, left], [0, 1, top]])))
    joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in LABEL_FIELDS}
    return replace(samples[0], image=canvas, **joined)


@dataclass(frozen=True)
class RandomAffine:
    """Rotate, shear and scale about the center of the image, whose size stays.

    Args:
        rotation: largest angle in degrees, either way.
        shear: largest angle in degrees, either way, along x and along y.
        scale: smallest and largest scale.
        fill: RGB of pixels from outside the image, 0..255; the mean of ImageNet, which normalizes to about 0.
    """

    rotation: float = 30.0
    shear: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    fill: tuple[float, float, float] = tuple(255 * mean for mean in IMAGENET_MEAN)  # type: ignore[assignment]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.image.shape[:2]
        if max(height, width) > _MAX_WARP_SIDE:
            raise InputError(f"{sample.path}: is {width} x {height}, expected sides of at most {_MAX_WARP_SIDE} pixels")
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation))
        shear_x, shear_y = np.tan(np.deg2rad(rng.uniform(-self.shear, self.shear, size=2)))
        rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = np.array([[1, shear_x], [shear_y, 1]]) @ rotate * rng.uniform(*self.scale)  # (2, 2)
        center = np.array([width / 2, height / 2])
        matrix = np.column_stack([linear, center - linear @ center])  # (2, 3)
        # OpenCV counts from the center of the first pixel, labels from the image's edge, half a pixel before it.
        warp = matrix.copy()
        warp[:, 2] += linear @ (0.5, 0.5) - 0.5
        image = cv2.warpAffine(sample.image, warp, (width, height), flags=cv2.INTER_LINEAR, borderValue=self.fill)
        return move_labels(sample, image, matrix)


@dataclass(frozen=True)
class PhotometricDistortion:
    """Change brightness, contrast, saturation, hue and the order of the channels, each with probability one half.

    Contrast comes, evenly, before or after saturation and hue. The result is rounded to uint8 and clipped to 0..255.

    Args:
        brightness: largest change of a pixel, in 0..255.
        contrast: smallest and largest factor on the pixels.
        saturation: smallest and largest factor on the saturation.
        hue: largest rotation in degrees.
        swap_channels: probability of a random order of the channels.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 18.0
    swap_channels: float = 0.5

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        shift = rng.uniform(-self.brightness, self.brightness) if rng.random() < 0.5 else 0.0
        contrast_first = rng.random() < 0.5
        factor = rng.uniform(*self.contrast) if rng.random() < 0.5 else 1.0
        saturation = rng.uniform(*self.saturation) if rng.random() < 0.5 else 1.0
        turn = rng.uniform(-self.hue, self.hue) if rng.random() < 0.5 else 0.0
        order = rng.permutation(3) if rng.random() < self.swap_channels else np.arange(3)

        levels = np.arange(256, dtype=np.float32) + np.float32(shift)
        if saturation == 1.0 and turn == 0.0:  # every channel value has one result
            table = np.rint(levels * np.float32(factor)).clip(0, 255).astype(np.uint8)
            image: np.ndarray = cv2.LUT(sample.image, table)
        else:
            before, after = (factor, 1.0) if contrast_first else (1.0, factor)
            # A negative value has no hue: dark pixels would come back bright.
            table = (levels * np.float32(before)).clip(min=0)
            # (H, W, 3) float32 up to the last step: values beyond 255 must survive until then.
            image = _turn_hue(cv2.LUT(sample.image, table), turn, saturation)
            image = cv2.addWeighted(image, after, image, 0, 0, dtype=cv2.CV_8U)  # the product, rounded and clipped
        if (order != np.arange(3)).any():
            image = cv2.transform(image, np.eye(3)[order])  # a permutation matrix is the fastest way
        return replace(sample, image=image)


def _turn_hue(image: np.ndarray, turn: float, saturation: float) -> np.ndarray:
    """Add `turn` degrees to the hue and multiply the saturation of (H, W, 3) float32 RGB, which is overwritten."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV, dst=image)  # hue 0..360, saturation 0..1, value
    # OpenCV wraps hues beyond 360, but not negative ones.
    hsv = cv2.transform(hsv, np.array([[1, 0, 0, turn % 360], [0, saturation, 0, 0], [0, 0, 1, 0]]))
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv)
