"""Images of any content."""

from __future__ import annotations

import io
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import inputs, mutated_bytes, success_or_one_line
from PIL import Image

from hpetr import InputError
from hpetr.data.yolo import image_size
from hpetr.images.read import load_image

FORMATS = {
    "jpg": {"quality": 80, "exif": True},
    "progressive.jpg": {"quality": 80, "progressive": True},
    "png": {"exif": True},
    "palette.png": {},
    "mended.png": {"exif": True},
    "webp": {},
    "gif": {},
    "bmp": {},
    "tif": {"compression": "tiff_lzw"},
}


def encoded(name: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (17, 23, 3), dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(pixels, 2, 0), 2, 1))
    if name.startswith("palette"):
        image = image.quantize(16)
    options = dict(FORMATS[name])
    if options.pop("exif", False):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
        options["exif"][0x010E] = "description"
    buffer = io.BytesIO()
    suffix = name.rpartition(".")[2]
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def mend_checksums(png: bytes) -> bytes:
    """A PNG whose chunks have the checksums of their content: else hardly a change gets past them."""
    mended, place = bytearray(png), 8
    while place + 12 <= len(mended):
        end = place + 8 + int.from_bytes(mended[place : place + 4], "big")
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = zlib.crc32(mended[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(mended)


@pytest.mark.parametrize("name", FORMATS)
@inputs(15, 20_000)
@given(data=st.data())
def test_images(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{name}"
    content = data.draw(mutated_bytes(encoded(name), 4, first=200))
    path.write_bytes(mend_checksums(content) if name == "mended.png" else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata
        with success_or_one_line(f"images, {name}"):
            image = load_image(path)
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            # What only looks at a header must not disagree with what decodes.
            assert image_size(path) == (image.shape[1], image.shape[0])


@inputs(8, 5_000)
@given(content=st.binary(max_size=64))
def test_other_files(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "other.jpg"
    path.write_bytes(content)
    with success_or_one_line("images, bytes at random"), pytest.raises(InputError):
        load_image(path)
