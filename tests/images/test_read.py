import importlib.util
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from hpetr.errors import InputError
from hpetr.images.pixels import keep_ratio_size, normalize_and_pad, resize_image
from hpetr.images.read import decode_with_opencv, is_image, load_image


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_path_bytes_pil_and_array_give_the_same(tmp_path, pixels):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for source in (path, str(path), path.read_bytes(), Image.open(path), pixels):
        loaded = load_image(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, pixels)


def test_binary_files_and_tensors_give_the_same(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
    with path.open("rb") as file:
        for source in (file, io.BytesIO(path.read_bytes()), planes, planes / 255, (planes / 255).double()):
            np.testing.assert_array_equal(load_image(source), pixels)
    np.testing.assert_array_equal(load_image(planes[:1]), load_image(pixels[..., 0]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [(f"photos/A.{s}", True) for s in "jpg JPEG jfif jpe png webp bmp tif tiff gif avif jp2 ppm pgm heic".split()]
    + [(f"a.{s}", False) for s in "pdf eps ps mpg mpeg mp4 txt h5 fits wmf json".split()]
    + [("jpg", False), (".jpg", False), ("a.jpg/x", False)],
)
def test_images_by_their_suffix(name: str, expected: bool) -> None:
    if name.endswith(".heic"):  # only where a plugin of Pillow is installed
        expected = importlib.util.find_spec("pillow_heif") is not None
    assert is_image(name) == is_image(Path(name)) == expected


def test_a_plugin_of_pillow_adds_its_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setitem(Image.EXTENSION, ".newformat", "PNG")
    assert is_image("a.newformat")


def test_grayscale_repeats_over_the_channels(tmp_path, pixels):
    gray = pixels[..., 0]
    Image.fromarray(gray).save(tmp_path / "g.png")
    for source in (tmp_path / "g.png", gray, gray[..., None]):
        np.testing.assert_array_equal(load_image(source), np.repeat(gray[..., None], 3, axis=2))


def test_transparency_is_laid_on_white(tmp_path, pixels):
    alpha = np.zeros((20, 30, 1), np.uint8)
    alpha[:10], alpha[10:15] = 255, 128
    rgba = np.concatenate([pixels, alpha], axis=2)
    Image.fromarray(rgba).save(tmp_path / "t.png")
    for source in (tmp_path / "t.png", rgba):
        loaded = load_image(source)
        np.testing.assert_array_equal(loaded[:10], pixels[:10])
        assert np.abs(loaded[10:15] - (pixels[10:15] * (128 / 255) + 127)).max() <= 1
        assert (loaded[15:] == 255).all()


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 2), 1)
    image.save(tmp_path / "p.gif", transparency=1)
    loaded = load_image(tmp_path / "p.gif")
    assert loaded[0, 0].tolist() == [255, 0, 0]
    assert loaded[2, 1].tolist() == [255, 255, 255]


def test_cmyk_jpeg_is_rgb(tmp_path):
    Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK").save(tmp_path / "c.jpg")
    loaded = load_image(tmp_path / "c.jpg")
    assert loaded.shape == (16, 16, 3)
    assert np.abs(loaded[8, 8].astype(int) - (250, 10, 10)).max() < 8


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "s.png")
    for source in (tmp_path / "s.png", values):
        assert load_image(source)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_color_png(tmp_path):
    rows = b"\0" + struct.pack(">6H", 65535, 0, 32896, 257, 65535, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "c16.png").write_bytes(png)
    assert load_image(tmp_path / "c16.png").tolist() == [[[255, 0, 128], [1, 255, 0]]]


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "a.gif")[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_equals_rotated_pixels(tmp_path, pixels, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "e.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    stored = np.asarray(Image.open(path))
    np.testing.assert_array_equal(load_image(path), np.rot90(stored, turns))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:4:4", "progressive": True}),
        ("RGB", {"subsampling": "4:2:0", "progressive": True, "restart_marker_blocks": 3}),
        ("RGB", {"keep_rgb": True}),
        ("L", {"optimize": True}),
    ],
)
@pytest.mark.parametrize("size", [(37, 61), (64, 48)])
def test_jpegs_are_what_pillow_makes_of_them(mode, options, size):
    smooth = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG", **options)
    whole = buffer.getvalue()
    damaged = whole[:-30] + b"\xff\xd9"  # ends as it should, but lacks data
    for data in (whole, whole + b"\0" * 7, damaged):
        np.testing.assert_array_equal(load_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def kinds_of_files(folder: Path) -> dict[str, Path]:
    """Files of every kind that is read without Pillow, by what is special about them."""
    rng = np.random.default_rng(0)
    rgba = cv2.resize(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8), (60, 44))
    rgb, gray = Image.fromarray(rgba[..., :3]), Image.fromarray(rgba[..., 0])
    alpha, palette = Image.fromarray(rgba), Image.fromarray(rgba).quantize(64)
    exact = {"lossless": True}
    images: dict[str, tuple[Image.Image, dict]] = {
        **{f"jpeg-turned-{n}.jpg": (rgb, {"exif": turned(n)}) for n in range(2, 9)},
        "gray.jpg": (gray, {}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "rgb-turned.png": (rgb, {"exif": turned(5)}),
        "rgba.png": (alpha, {}),
        "rgba-turned.png": (alpha, {"exif": turned(6)}),
        "gray-alpha-turned.png": (alpha.convert("LA"), {"exif": turned(7)}),
        "palette-alpha-turned.png": (palette, {"exif": turned(8)}),
        "palette.png": (rgb.quantize(64), {}),
        "key.png": (rgb, {"transparency": rgb.getpixel((3, 4))}),
        "bits.png": (rgb.convert("1"), {}),
        "rgb-turned.webp": (rgb, {"exif": turned(3), **exact}),
        "rgba-turned.webp": (alpha, {"exif": turned(6), **exact}),
        "moving.webp": (alpha, {"save_all": True, "append_images": [alpha.rotate(180)], **exact}),
        "palette.gif": (rgb.quantize(64), {}),
        "transparent.gif": (rgb.quantize(64), {"transparency": 3}),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(64), {}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    deep = rgba.astype(np.uint16) * 251 + 13
    for name, array in (("gray16.png", deep[..., 0]), ("rgb16.png", deep[..., :3]), ("rgba16.png", deep)):
        cv2.imwrite(str(folder / name), array)
    with Image.open(folder / "gray16.png") as image:
        image.save(folder / "gray16-turned.png", exif=turned(6))
    return {path.name: path for path in sorted(folder.iterdir())}


def test_without_pillow_the_pixels_are_the_same(tmp_path: Path) -> None:
    files = kinds_of_files(tmp_path)
    assert len(files) == 29
    for name, path in files.items():
        found, expected = decode_with_opencv(path.read_bytes(), name), load_image(path)
        assert found.shape == expected.shape, name
        # libjpeg and Pillow round the product of ink and black differently.
        assert np.abs(found.astype(int) - expected).max() <= (name == "cmyk.jpg"), name


@pytest.mark.parametrize("suffix", [".tif", ".avif", ".jp2", ".ppm"])
def test_without_pillow_other_files_are_refused(suffix: str, tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)
    load_image(path)
    with pytest.raises(InputError, match=r"JPEG, PNG, WebP, GIF, BMP; other images need pip install pillow"):
        decode_with_opencv(path.read_bytes(), str(path))


@pytest.mark.parametrize("name", ["jpeg-turned-6.jpg", "progressive.jpg", "rgba.png", "gray16.png", "moving.webp"])
@pytest.mark.parametrize("decode", [load_image, lambda data: decode_with_opencv(data, "file")])
def test_truncated_files_are_refused(decode, name: str, tmp_path: Path) -> None:
    data = kinds_of_files(tmp_path)[name].read_bytes()
    for length in (len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(InputError, match="truncated"):
            decode(data[:length])


def test_a_pil_image_is_left_as_it_is(tmp_path, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "e.png", exif=exif)
    with Image.open(tmp_path / "e.png") as image:
        loaded = load_image(image)
        assert image.size == (30, 20)
        assert image.getexif()[0x0112] == 6
    loaded[:] = 0
    opaque = Image.fromarray(pixels)
    load_image(opaque)[:] = 0
    np.testing.assert_array_equal(np.asarray(opaque), pixels)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20)])
def test_extreme_sizes_load(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").shape == (size[1], size[0], 3)


def test_broken_files_are_named_in_one_line(tmp_path, pixels):
    whole = io.BytesIO()
    Image.fromarray(np.tile(pixels, (10, 10, 1))).save(whole, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("truncated.jpg", "empty.jpg", "text.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=name) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png.*pixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("F", (4, 4)),
        torch.zeros(4, 4),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.full((3, 4, 4), 1.5),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        io.StringIO("text"),
        b"",
        7,
        None,
    ],
)
def test_unsupported_sources(source):
    with pytest.raises(InputError, match="expected"):
        load_image(source)


def test_keep_ratio_size_never_falls_below_one_pixel():
    assert keep_ratio_size(425, 640, 800, 1333) == (800, 1205)
    assert keep_ratio_size(480, 640, 800, 1333) == (800, 1067)
    assert keep_ratio_size(1000, 3000, 800, 1333) == (444, 1333)
    assert keep_ratio_size(5, 20_000, 800, 1333) == (1, 1333)


def test_normalize_and_pad_is_the_formula(pixels):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    column = np.zeros((30, 4, 3), np.uint8)[3:, 2:3]  # one pixel wide, rows not next to each other
    images = [pixels, resize_image(pixels, 100, 70), column]
    values, mask = normalize_and_pad(images, mean, std, 32)
    assert values.shape == (3, 3, 128, 96)
    assert mask.shape == (3, 128, 96)
    for image, its_values, its_mask in zip(images, values, mask, strict=True):
        height, width = image.shape[:2]
        assert its_mask.sum() == its_mask[:height, :width].sum() == height * width
        assert (its_values[:, its_mask == 0] == 0).all()
        expected = (image / 255.0 - mean) / std
        np.testing.assert_allclose(its_values[:, :height, :width], expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)
