"""Limits on requests, and the check of an upload before it is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from hpetr.errors import InputError

FIELD = "file"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Pillow refuses to open an image with more pixels, whatever --max-pixels is.
PILLOW_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
# A progressive JPEG comes in about ten scans. Each costs a pass over all pixels and may take a few bytes of the file,
# so that 20 MB can keep a decoder busy for hours.
MAX_SCANS = 100
SCAN = b"\xff\xda"  # never within compressed data, where 00 follows every ff
FORM_OVERHEAD = 16_384  # bytes of a form around the image
OTHER_FIELDS = 8
# By HTTP status: what it means, and the kinds of refusals that have it.
PROBLEMS = {
    400: ("Empty upload, or a form that cannot be read.", "empty", "bad_form"),
    408: ("The upload took too long.", "slow_upload"),
    413: ("Too many bytes or pixels.", "too_many_bytes", "too_many_pixels"),
    415: ("Not an image.", "not_a_picture"),
    422: (
        "Wrong form field or parameter, or a truncated or broken image.",
        *("wrong_field", "bad_parameter", "broken_picture", "too_many_scans"),
    ),
    500: ("The model failed.", "internal"),
    503: ("The queue is full; `Retry-After` says when to try again.", "queue_full"),
    504: ("The poses were not ready in time.", "timeout"),
}
STATUS = {kind: status for status, (_, *kinds) in PROBLEMS.items() for kind in kinds}


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        max_bytes: size of an upload.
        max_pixels: of an image, by its header.
        queue: number of requests uploading, waiting or in the network at once. Memory is bounded by
            `queue * max_bytes` for uploads and some copies of `max_pixels` pixels for decoded images.
        timeout: seconds from a request's first byte to its answer.

    Raises:
        InputError: a limit is not positive, or more pixels than Pillow opens.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    queue: int = 32
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"serve: {name.replace('_', ' ')} is {value}, expected more than 0")
        if self.max_pixels > PILLOW_PIXELS:
            raise InputError(f"serve: max pixels is {self.max_pixels:,}, expected at most Pillow's {PILLOW_PIXELS:,}")


class Refusal(Exception):
    """A request that gets no poses.

    Attributes:
        kind: one word for programs and metrics, one of `STATUS`.
        detail: one sentence for people.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, kind: str, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.retry_after = kind, detail, retry_after


async def read_upload(request: Request, limits: Limits) -> bytes:
    """Return the image's bytes, from the form field `file` or the whole body, and never hold more than the limit.

    Raises:
        Refusal: too large, empty, not a form, or a form without the field.
        ClientDisconnect: the client closed the connection.
    """
    too_large = Refusal("too_many_bytes", f"the upload is larger than the {limits.max_bytes / 1e6:g} MB allowed here")
    allowed = limits.max_bytes + FORM_OVERHEAD

    async def chunks() -> AsyncGenerator[bytes, None]:
        left = allowed
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                raise too_large
            yield chunk

    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > allowed:
        raise too_large
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        parser = MultiPartParser(
            request.headers, chunks(), max_files=1, max_fields=OTHER_FIELDS, max_part_size=FORM_OVERHEAD
        )
        parser.spool_max_size = allowed  # in memory: no image is written to a disk
        data = await _form_file(parser)
    else:
        data = b"".join([chunk async for chunk in chunks()])
    if len(data) > limits.max_bytes:
        raise too_large
    if not data:
        raise Refusal("empty", "the upload is empty, expected an image")
    return data


async def _form_file(parser: MultiPartParser) -> bytes:
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal("bad_form", f"the form cannot be read: {error.message.rstrip('.')}") from error
    try:
        upload = form.get(FIELD)
        if isinstance(upload, UploadFile):
            return await upload.read()
        found = ", ".join(repr(name) for name in form) or "no field"
        why = "is text" if FIELD in form else f"is missing, found {found}"
        raise Refusal("wrong_field", f"the form field {FIELD!r} {why}, expected an image file")
    finally:
        await form.close()


def check_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """Return height and width by the header, before rotation by EXIF, without decoding the image.

    Raises:
        Refusal: not an image, too many pixels, or a JPEG built to take hours.
    """
    expected = f"expected at most {limits.max_pixels:,}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError as error:
        raise Refusal("not_a_picture", f"the upload is not an image, expected {FORMAT_NAMES}") from error
    except Image.DecompressionBombError as error:
        raise Refusal("too_many_pixels", f"the image has more than {PILLOW_PIXELS:,} pixels, {expected}") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on a broken header
        raise broken(str(error)) from error
    if height * width > limits.max_pixels:
        pixels = f"{width} x {height} = {width * height:,} pixels"
        raise Refusal("too_many_pixels", f"the image has {pixels}, {expected}")
    if data.startswith(b"\xff\xd8") and (scans := data.count(SCAN)) > MAX_SCANS:
        raise Refusal("too_many_scans", f"the JPEG has {scans:,} scans, expected at most {MAX_SCANS}")
    return height, width


def broken(reason: str) -> Refusal:
    """Return the refusal of an upload that begins as an image and cannot be decoded."""
    return Refusal("broken_picture", f"the image cannot be read: {(reason.splitlines() or ['?'])[0]}")
