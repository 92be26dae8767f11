"""Reading of images as arrays, from anything; with OpenCV alone if Pillow is not installed."""

from __future__ import annotations

import importlib
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, Union

import cv2
import numpy as np

from hpetr.errors import InputError, first_line
from hpetr.images.pixels import on_white, rgb_of_array

if TYPE_CHECKING:
    import torch
try:
    from PIL import ExifTags, Image, ImageOps
except ImportError:  # exported models run without it
    Image = None  # type: ignore[assignment]
with suppress(ImportError):  # reads .heic and .heif where a user has installed it
    importlib.import_module("pillow_heif").register_heif_opener()

JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
# Formats among Pillow's that are videos, documents or measurements.
NOT_IMAGES = frozenset({"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IM", "IPTC", "MPEG", "WMF"})
# First bytes of the formats that OpenCV reads as Pillow does. It drops the transparency of some TIFF files and the
# rotation of AVIF files.
OPENCV_READS = {"JPEG": b"\xff\xd8", "PNG": b"\x89PNG", "WebP": b"RIFF", "GIF": b"GIF8", "BMP": b"BM"}

ImageSource: TypeAlias = Union[str, os.PathLike[str], bytes, IO[bytes], "Image.Image", np.ndarray, "torch.Tensor"]


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's suffix is that of an image which Pillow or a plugin of it reads."""
    suffix = Path(path).suffix.lower()
    return Image.registered_extensions().get(suffix) in Image.OPEN.keys() - NOT_IMAGES


def load_image(source: ImageSource) -> np.ndarray:
    """Read an image as RGB.

    EXIF orientation is applied. Grayscale, palette, CMYK and other color modes become RGB; transparent pixels are
    laid on white, as a browser shows them; 16-bit images are scaled to 8 bits; of an animation the first frame is
    taken. Arrays are RGB already (not OpenCV's BGR) and are never modified.

    Args:
        source: path, encoded bytes, binary file such as BytesIO, PIL image, array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) of uint8 or uint16, or torch tensor (1, H, W), (3, H, W) or (4, H, W) of uint8, or of floats in
            0..1.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: missing, empty, truncated, not an image, or of an unsupported type or size; names the source.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return rgb_of_array(_array_of_tensor(source))
    if isinstance(source, np.ndarray):
        return rgb_of_array(source)
    if Image is not None and isinstance(source, Image.Image):
        return _from_pil(source, "PIL image")
    data, name = _read_bytes(source)
    if not data:
        raise InputError(f"{name}: the file is empty, expected an image")
    return decode_with_opencv(data, name) if Image is None else _decode(data, name)


def _read_bytes(source: Any) -> tuple[bytes, str]:
    """Return the encoded image and its name for errors."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), f"image of {len(source)} bytes"
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "image file"))
        data = source.read()
        if not isinstance(data, bytes):
            raise InputError(f"{name}: opened as text, expected a file opened in binary mode")
        return data, name
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"image of type {type(source).__name__}: expected a path, bytes, binary file, PIL image, NumPy array or "
            "torch tensor"
        )
    name = os.fspath(source)
    try:
        return Path(name).read_bytes(), name
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file, expected an image") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a folder, expected an image") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from error


def _array_of_tensor(tensor: torch.Tensor) -> np.ndarray:
    """Convert (C, H, W) uint8, or floats in 0..1, to (H, W, C) uint8."""
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise InputError(f"image tensor of shape {tuple(tensor.shape)}: expected (3, H, W), (1, H, W) or (4, H, W)")
    array = tensor.detach().cpu().permute(1, 2, 0)  # (H, W, C)
    if array.is_floating_point():
        if not bool(((array >= 0) & (array <= 1)).all()):
            raise InputError("image tensor of floats: expected numbers in 0..1, not normalized by mean and deviation")
        array = (array.float() * 255).round().byte()
    return array.numpy()


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _decode_plain_jpeg(data) if _is_plain_jpeg(image, data) else None
            return _from_pil(image, name) if pixels is None else pixels
    except (InputError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        more = " (HEIC needs pip install pillow-heif)" if name.lower().endswith((".heic", ".heif")) else ""
        raise InputError(f"{name}: is not an image that Pillow can read{more}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: has more pixels than Pillow's limit against decompression bombs") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on a broken file
        raise InputError(f"{name}: the image is truncated or broken ({error})") from error


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Return whether an image is whole, upright, and RGB or gray, so that decoding is all that Pillow would do."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.mode in ("RGB", "L") and upright and data.endswith(b"\xff\xd9")


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """Decode to (H, W, 3) uint8 RGB, or None if that fails.

    Pillow and OpenCV both decode with libjpeg-turbo, to the same pixels; OpenCV copies them less often.
    """
    try:
        return _imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


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
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise InputError(f"{name}: is a 32-bit image, expected 8 or 16 bits per channel")
        return rgb_of_array(gray.astype(np.uint16))
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_with_opencv(data: bytes, name: str) -> np.ndarray:
    """Decode to the pixels that Pillow gives, (H, W, 3) uint8 RGB.

    Raises:
        InputError: truncated, or not in one of the formats `OPENCV_READS`.
    """
    if not data.startswith(tuple(OPENCV_READS.values())):
        known = ", ".join(OPENCV_READS)
        raise InputError(f"{name}: is not an image in {known}; other images need pip install pillow")
    encoded = np.frombuffer(data, np.uint8)
    try:
        # As stored, without rotation: only so are alpha channels kept.
        stored, kinds, metadata = cv2.imdecodeWithMetadata(encoded, flags=cv2.IMREAD_UNCHANGED)
        if stored is None:
            raise InputError(f"{name}: the image is truncated or broken")
        if stored.ndim == 2:
            return rgb_of_array(_imdecode(encoded, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH))
        image = _imdecode(encoded, cv2.IMREAD_COLOR_RGB)
        if stored.shape[2] == 3:
            return image
        # OpenCV rotates no alpha channel, but a gray image with the same metadata.
        _, alpha_file = cv2.imencodeWithMetadata(".png", np.ascontiguousarray(stored[..., 3]), kinds, metadata)
        return on_white(np.dstack([image, _imdecode(alpha_file, cv2.IMREAD_GRAYSCALE)]))
    except cv2.error as error:
        raise InputError(f"{name}: the image is truncated or broken") from error


def _imdecode(encoded: np.ndarray, flags: int) -> np.ndarray:
    image = cv2.imdecode(encoded, flags)
    if image is None:
        raise cv2.error("no image")
    return image


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a JPEG or, for any other suffix, a PNG."""
    buffer = io.BytesIO()
    if suffix.lower() in JPEG_SUFFIXES:
        Image.fromarray(image).save(buffer, "JPEG", quality=92)
    else:
        Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
