"""Pixels for the network: the one resize, normalization and padding of training, prediction and exports.

With NumPy and OpenCV alone, since exported models run without other packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from hpetr.errors import InputError

# ImageNet, for pixels in 0..1; times 255 they are the official 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The network's coarsest map has stride 64, so a batch is never padded to less than one of its cells.
MIN_BATCH_SIDE = 64


def rgb_of_array(array: np.ndarray) -> np.ndarray:
    """Convert gray, RGB or RGBA to (H, W, 3) uint8 RGB, with transparent pixels on white.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 or uint16.

    Raises:
        InputError: another shape or dtype.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"image array of shape {array.shape}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
    elif array.dtype != np.uint8:
        raise InputError(f"image array of type {array.dtype}: expected uint8 or uint16 RGB")
    if array.shape[2] == 4:
        return on_white(array)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Lay (H, W, 4) uint8 RGBA on white; returns (H, W, 3) uint8."""
    alpha = rgba[:, :, 3:].astype(np.uint32)
    mixed = rgba[:, :, :3] * alpha + 255 * (255 - alpha)  # (H, W, 3), 0..255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)


@dataclass(frozen=True)
class Resize:
    """The resize of images for a network: the largest scale at which neither side exceeds its limit.

    Attributes:
        shortest_edge: limit of the short side in pixels.
        longest_edge: limit of the long side in pixels.
        antialias: see `keep_ratio_size` and `resize_image`.
    """

    shortest_edge: int
    longest_edge: int
    antialias: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of a resized image."""
        return keep_ratio_size(height, width, self.shortest_edge, self.longest_edge, antialias=self.antialias)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Resize an image (H, W, 3) uint8."""
        return resize_image(image, *self.size(*image.shape[:2]), antialias=self.antialias)


def keep_ratio_size(height: int, width: int, short: int, long: int, *, antialias: bool = False) -> tuple[int, int]:
    """Return height and width of an image scaled so that neither the short nor the long side exceeds its limit.

    Args:
        height: of the image.
        width: of the image.
        short: limit of the short side.
        long: limit of the long side.
        antialias: round as Group Pose's official pipeline does, which truncates the long side; else as PETR's.

    Returns:
        Height and width, at least one pixel each.
    """
    if antialias:
        low, high = min(height, width), max(height, width)
        side = round(long * low / high) if high / low * short > long else short
        other = max(1, int(side * high / low))
        return (max(1, side), other) if height < width else (other, max(1, side))
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, height: int, width: int, *, antialias: bool = False) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to (height, width, 3) uint8, bilinearly.

    Args:
        image: RGB.
        height: in pixels.
        width: in pixels.
        antialias: filter as Pillow does, as Group Pose's official pipeline; else as OpenCV does, as PETR's.
    """
    if image.shape[:2] == (height, width):
        return image
    if not antialias:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return _filtered(_filtered(image, width, 1), height, 0)


def _filtered(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize one axis of a uint8 image as Pillow does, bit for bit: a triangle filter in 22-bit fixed point."""
    scale = image.shape[axis] / size
    support = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale  # (size,)
    first = (center - support + 0.5).astype(np.int64).clip(0)
    last = (center + support + 0.5).astype(np.int64).clip(max=image.shape[axis])
    taps = first[:, None] + np.arange((last - first).max())  # (size, k)
    weights = 1 - np.abs((taps - center[:, None] + 0.5) / support)
    weights = np.where(taps < last[:, None], weights.clip(0), 0)
    weights /= weights.sum(1, keepdims=True)
    fixed = np.floor(weights * 2**22 + 0.5).astype(np.int32)
    taps = taps.clip(max=image.shape[axis] - 1)
    shape = [1, 1, 1]
    shape[axis] = size
    total = np.full(1, 2**21, np.int32)
    for tap, weight in zip(taps.T, fixed.T, strict=True):
        total = total + image.take(tap, axis).astype(np.int32) * weight.reshape(shape)
    return (total >> 22).clip(0, 255).astype(np.uint8)


def batch_side(sides: Sequence[int], divisor: int) -> int:
    """Return the height or width of a batch of images with these heights or widths."""
    return -(-max(MIN_BATCH_SIDE, *sides) // divisor) * divisor


def normalize_and_pad(
    images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float], divisor: int
) -> tuple[np.ndarray, np.ndarray]:
    """Make a batch of images, each at the top left, with zeros beyond it.

    Args:
        images: B arrays (H_i, W_i, 3) uint8 RGB.
        mean: three numbers, for pixels in 0..1.
        std: three numbers, likewise.
        divisor: height and width of the batch are multiples of it (and at least `MIN_BATCH_SIDE`).

    Returns:
        pixel_values (B, 3, H, W) float32 and pixel_mask (B, H, W) int64, 1 = image, 0 = padding.
    """
    heights = [image.shape[0] for image in images]
    widths = [image.shape[1] for image in images]
    height, width = batch_side(heights, divisor), batch_side(widths, divisor)
    pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
    pixel_mask = np.empty((len(images), height, width), dtype=np.int64)
    # A pixel has 256 values: looking the normalized ones up is exact, and faster than arithmetic on floats.
    levels = np.arange(256, dtype=np.float64)
    tables = [((levels - 255 * m) / (255 * s)).astype(np.float32) for m, s in zip(mean, std, strict=True)]
    for values, mask, image, h, w in zip(pixel_values, pixel_mask, images, heights, widths, strict=True):
        for plane, channel, table in zip(values, cv2.split(image), tables, strict=True):
            cv2.LUT(channel, table, dst=plane[:h, :w])  # writes into the batch itself
        mask[:h, :w] = 1
        for array in (values, mask):
            array[..., h:, :] = 0
            array[..., :h, w:] = 0
    return pixel_values, pixel_mask
