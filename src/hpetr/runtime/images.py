"""Reading images with OpenCV alone, where Pillow is not installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cv2
import numpy as np

from hpetr.errors import InputError
from hpetr.images.pixels import rgb_of_array

if TYPE_CHECKING:
    from hpetr.images.read import ImageSource

START_OF_IMAGE, START_OF_SCAN, END_OF_IMAGE = b"\xff\xd8", 0xDA, b"\xff\xd9"


def read_image(source: ImageSource) -> np.ndarray:
    """An image as RGB, EXIF orientation applied, as `hpetr.data.load_image` reads JPEG and PNG files.

    Args:
        source: path, encoded bytes, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) RGB of uint8 or uint16.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: missing, empty, truncated, not an image that OpenCV can read, or of an unsupported type.
    """
    if isinstance(source, np.ndarray):
        return rgb_of_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), f"image of {len(source)} bytes")
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"image of type {type(source).__name__}: expected a path, bytes or NumPy array")
    name = os.fspath(source)
    try:
        with open(name, "rb") as file:
            return _decode(file.read(), name)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{name}: cannot be read ({reason}), expected an image") from error


def _decode(data: bytes, name: str) -> np.ndarray:
    if data.startswith(START_OF_IMAGE) and not _jpeg_ends(data):  # OpenCV would fill what is missing with grey
        raise InputError(f"{name}: the image is truncated")
    encoded = np.frombuffer(data, np.uint8)
    try:
        # As stored, without rotation, to see whether there are 16 bits or an alpha channel.
        stored = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED) if data else None
        if stored is not None and stored.ndim == 3 and stored.shape[2] == 4:
            return rgb_of_array(cv2.cvtColor(stored, cv2.COLOR_BGRA2RGBA))
        if stored is not None and stored.dtype == np.uint16:
            return rgb_of_array(stored if stored.ndim == 2 else cv2.cvtColor(stored, cv2.COLOR_BGR2RGB))
        upright = None if stored is None else cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise InputError(f"{name}: the image is truncated or broken") from error
    if upright is None:
        raise InputError(f"{name}: is not an image that OpenCV can read")
    return cv2.cvtColor(upright, cv2.COLOR_BGR2RGB)


def _jpeg_ends(data: bytes) -> bool:
    """Whether the end of the image is there; a thumbnail in the header has an end of its own."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == START_OF_SCAN:
            return data.find(END_OF_IMAGE, place) >= 0
        place += 2 + length
    return False
