"""Pictures as arrays: reading them from anything, the one keep-ratio resize, normalisation and padding."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TypeAlias

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from hpetr.errors import InputError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# ImageNet, for pixels in 0..1; times 255 they are the official 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The network's coarsest map has stride 64, so a batch is never padded to less than one of its cells.
MIN_BATCH_SIDE = 64


def load_image(source: ImageSource) -> np.ndarray:
    """A picture as RGB.

    EXIF orientation is applied. Greyscale, palette, CMYK and other colour modes become RGB; transparent pixels are
    laid on white, as a browser shows them; 16-bit pictures are scaled to 8 bits; of an animation the first frame is
    taken. Arrays are RGB already (not OpenCV's BGR) and are never modified.

    Args:
        source: path, encoded bytes, PIL image, or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8 or uint16.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: missing, empty, truncated, not a picture, or of an unsupported type or size; names the source.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image")
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _decode(data, f"image of {len(data)} bytes")
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            with open(name, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise InputError(f"{name}: no such file, expected a picture") from error
        except IsADirectoryError as error:
            raise InputError(f"{name}: is a folder, expected a picture") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: cannot be read ({error})") from error
        return _decode(data, name)
    raise InputError(f"image of type {type(source).__name__}: expected a path, bytes, PIL image or NumPy array")


def _decode(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise InputError(f"{name}: the file is empty, expected a picture")
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _decode_plain_jpeg(data) if _is_plain_jpeg(image, data) else None
            return _from_pil(image, name) if pixels is None else pixels
    except (InputError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: is not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: has more pixels than Pillow's limit against decompression bombs") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on a broken file
        raise InputError(f"{name}: the picture is truncated or broken ({error})") from error


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whole, upright, RGB or grey: nothing that Pillow would have to do beyond decoding.

    OpenCV fills what is missing from a truncated file with grey, so only a file that ends as a JPEG must is whole.
    """
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.mode in ("RGB", "L") and upright and data.endswith(b"\xff\xd9")


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 RGB, or None if it cannot be decoded.

    Pillow and OpenCV both decode with libjpeg-turbo, to the same pixels; OpenCV copies them less often.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    if 0 in image.size:
        raise InputError(f"{name}: has {image.width} x {image.height} pixels, expected at least 1 x 1")
    try:
        image.load()
    except OSError as error:
        raise InputError(f"{name}: the picture is truncated or broken ({error})") from error
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(f"{name}: is a floating-point picture, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"{name}: is a 32-bit picture, expected 8 or 16 bits per channel")
        return _from_array(grey.astype(np.uint16))
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"image array of shape {array.shape}: expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded
    elif array.dtype != np.uint8:
        raise InputError(f"image array of type {array.dtype}: expected uint8 or uint16 RGB")
    if array.shape[2] == 4:
        return _on_white(array)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _on_white(rgba: np.ndarray) -> np.ndarray:
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


def normalize_and_pad(
    images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float], divisor: int
) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the pictures, each at the top left, with zeros where a picture ends.

    Args:
        images: B arrays (H_i, W_i, 3) uint8 RGB.
        mean, std: three numbers each, for pixels in 0..1.
        divisor: height and width of the batch are multiples of it (and at least `MIN_BATCH_SIDE`).

    Returns:
        pixel_values (B, 3, H, W) float32 and pixel_mask (B, H, W) int64, 1 = picture, 0 = padding.
    """
    heights = [image.shape[0] for image in images]
    widths = [image.shape[1] for image in images]
    height, width = (-(-max(MIN_BATCH_SIDE, *sides) // divisor) * divisor for sides in (heights, widths))
    pixel_values = np.empty((len(images), 3, height, width), dtype=np.float32)
    pixel_mask = np.empty((len(images), height, width), dtype=np.int64)
    # A pixel has 256 values: looking the normalised ones up is exact, and faster than arithmetic on floats.
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
