"""What a request may cost, and the check of an upload before anything of it is decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import Request
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from hpetr.errors import InputError

FIELD = "file"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Pillow refuses to open an image with more pixels, whatever --max-pixels says.
PILLOW_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
# A progressive JPEG comes in about ten scans. Each costs a pass over all pixels and may take a few bytes of the file,
# so that 20 MB can keep a decoder busy for hours.
MAX_SCANS = 100
SCAN = b"\xff\xda"  # never within compressed data, where 00 follows every ff
FORM_OVERHEAD = 16_384  # bytes of a form around the image
OTHER_FIELDS = 8


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        max_bytes: of an upload.
        max_pixels: of an image, by its header.
        queue: requests that are inside at once: uploading, waiting or in the network. Memory is bounded by
            `queue * max_bytes` for uploads and some copies of `max_pixels` pixels for what is decoded.
        timeout: seconds from a request's first byte to its answer.

    Raises:
        InputError: a limit is not positive, or more pixels than Pillow opens.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    queue: int = 32
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "queue", "timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"serve: {name.replace('_', ' ')} is {getattr(self, name)}, expected more than 0")
        if self.max_pixels > PILLOW_PIXELS:
            raise InputError(f"serve: max pixels is {self.max_pixels:,}, expected at most Pillow's {PILLOW_PIXELS:,}")


class Refusal(Exception):
    """A request that gets no poses.

    Attributes:
        status: of HTTP.
        kind: one word for programs and metrics.
        detail: one sentence for people.
        retry_after: seconds after which the same request may succeed.
    """

    def __init__(self, status: HTTPStatus, kind: str, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail, self.retry_after = status, kind, detail, retry_after


def too_large(limits: Limits) -> Refusal:
    """The upload has more bytes than allowed."""
    allowed = f"{limits.max_bytes / 1e6:g} MB"
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_many_bytes", f"the upload is larger than the {allowed} allowed here"
    )


async def read_upload(request: Request, limits: Limits) -> bytes:
    """The image's bytes, from the form field `file` or as the whole body. Never holds more than the limit.

    Raises:
        Refusal: too large, empty, not a form, or a form without the field.
        ClientDisconnect: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_bytes + FORM_OVERHEAD:
        raise too_large(limits)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        data = await _read_form(request, limits)
    else:
        data = b"".join([chunk async for chunk in _at_most(request, limits.max_bytes, limits)])
    if len(data) > limits.max_bytes:
        raise too_large(limits)
    if not data:
        raise Refusal(HTTPStatus.BAD_REQUEST, "empty", "the upload is empty, expected an image")
    return data


async def _at_most(request: Request, count: int, limits: Limits) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        count -= len(chunk)
        if count < 0:
            raise too_large(limits)
        yield chunk


class _FormInMemory(MultiPartParser):
    """Files stay in memory: they are small enough, and no thread has to write them to a disk."""

    def __init__(self, request: Request, limits: Limits) -> None:
        stream = _at_most(request, limits.max_bytes + FORM_OVERHEAD, limits)
        super().__init__(
            request.headers,
            stream,  # type: ignore[arg-type]
            max_files=1,
            max_fields=OTHER_FIELDS,
            max_part_size=FORM_OVERHEAD,
        )
        self.spool_max_size = limits.max_bytes + FORM_OVERHEAD


async def _read_form(request: Request, limits: Limits) -> bytes:
    try:
        form = await _FormInMemory(request, limits).parse()
    except MultiPartException as error:
        reason = error.message.rstrip(".")
        raise Refusal(HTTPStatus.BAD_REQUEST, "bad_form", f"the form cannot be read: {reason}") from error
    try:
        upload = form.get(FIELD)
        if not isinstance(upload, UploadFile):
            found = ", ".join(repr(name) for name in form) or "no field"
            why = "is text" if FIELD in form else f"is missing, found {found}"
            raise Refusal(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "wrong_field",
                f"the form field {FIELD!r} {why}, expected an image file",
            )
        return await upload.read()
    finally:
        await form.close()


def check_image(data: bytes, limits: Limits) -> tuple[int, int]:
    """Height and width by the header, before rotation by EXIF; nothing is decoded.

    Raises:
        Refusal: not an image, too many pixels, or a JPEG built to take hours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except UnidentifiedImageError as error:
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not_a_picture", f"the upload is not an image, expected {FORMAT_NAMES}"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(f"more than {PILLOW_PIXELS:,}", limits) from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on a broken header
        raise broken(str(error)) from error
    if height * width > limits.max_pixels:
        raise _too_many_pixels(f"{width} x {height} = {width * height:,}", limits)
    if data.startswith(b"\xff\xd8") and data.count(SCAN) > MAX_SCANS:
        raise Refusal(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "too_many_scans",
            f"the JPEG has {data.count(SCAN):,} scans, expected at most {MAX_SCANS}",
        )
    return height, width


def broken(reason: str) -> Refusal:
    """The upload begins as an image and does not go on as one."""
    line = (reason.splitlines() or ["?"])[0]
    return Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, "broken_picture", f"the image cannot be read: {line}")


def _too_many_pixels(found: str, limits: Limits) -> Refusal:
    return Refusal(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "too_many_pixels",
        f"the image has {found} pixels, expected at most {limits.max_pixels:,}",
    )
