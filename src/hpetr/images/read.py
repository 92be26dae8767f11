"""Images as arrays, read from anything."""

from __future__ import annotations

import io
import os
from typing import TypeAlias

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps

from hpetr.errors import InputError
from hpetr.images.pixels import on_white, rgb_of_array

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def load_image(source: ImageSource) -> np.ndarray:
    """An image as RGB.

    EXIF orientation is applied. Greyscale, palette, CMYK and other color modes become RGB; transparent pixels are
    laid on white, as a browser shows them; 16-bit images are scaled to 8 bits; of an animation the first frame is
    taken. Arrays are RGB already (not OpenCV's BGR) and are never modified.

    Args:
        source: path, encoded bytes, PIL image, or array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8 or uint16.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: missing, empty, truncated, not an image, or of an unsupported type or size; names the source.
    """
    if isinstance(source, np.ndarray):
        return rgb_of_array(source)
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
            raise InputError(f"{name}: no such file, expected an image") from error
        except IsADirectoryError as error:
            raise InputError(f"{name}: is a folder, expected an image") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: cannot be read ({error})") from error
        return _decode(data, name)
    raise InputError(f"image of type {type(source).__name__}: expected a path, bytes, PIL image or NumPy array")


def _decode(data: bytes, name: str) -> np.ndarray:
    if not data:
        raise InputError(f"{name}: the file is empty, expected an image")
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _decode_plain_jpeg(data) if _is_plain_jpeg(image, data) else None
            return _from_pil(image, name) if pixels is None else pixels
    except (InputError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: has more pixels than Pillow's limit against decompression bombs") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on a broken file
        raise InputError(f"{name}: the image is truncated or broken ({error})") from error


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
        raise InputError(f"{name}: the image is truncated or broken ({error})") from error
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise InputError(f"{name}: is a floating-point image, expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise InputError(f"{name}: is a 32-bit image, expected 8 or 16 bits per channel")
        return rgb_of_array(grey.astype(np.uint16))
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """(H, W, 3) uint8 RGB as the bytes of a JPEG or, for any other suffix, a PNG."""
    buffer = io.BytesIO()
    if suffix.lower() in JPEG_SUFFIXES:
        Image.fromarray(image).save(buffer, "JPEG", quality=92)
    else:
        Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
