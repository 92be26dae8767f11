"""Pixels as the network takes them: the one resize, normalization and padding of training, prediction and exports.

On NumPy and OpenCV alone: exported models run without anything else.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from hpetr.errors import InputError

# ImageNet, for pixels in 0..1; times 255 they are the official 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The network's coarsest map has stride 64, so a batch is never padded to less than one of its cells.
MIN_BATCH_SIDE = 64


def rgb_of_array(array: np.ndarray) -> np.ndarray:
    """Grey, RGB or RGBA, (H, W) to (H, W, 4) uint8 or uint16, as (H, W, 3) uint8 RGB; transparent pixels on white.

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
    """(H, W, 4) uint8 -> (H, W, 3) uint8."""
    alpha = rgba[:, :, 3:].astype(np.uint32)
    mixed = rgba[:, :, :3] * alpha + 255 * (255 - alpha)  # (H, W, 3), 0..255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)


def keep_ratio_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) after scaling so that the short side is at most `short` and the long side at most `long`.

    The official rounding; a side never falls below one pixel.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, bilinear without antialiasing, as the official pipeline does."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def batch_side(sides: Sequence[int], divisor: int) -> int:
    """Height or width of a batch of images with these heights or widths."""
    return -(-max(MIN_BATCH_SIDE, *sides) // divisor) * divisor


def normalize_and_pad(
    images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float], divisor: int
) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the images, each at the top left, with zeros where an image ends.

    Args:
        images: B arrays (H_i, W_i, 3) uint8 RGB.
        mean, std: three numbers each, for pixels in 0..1.
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
