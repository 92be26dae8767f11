"""YOLO-pose: a `data.yaml`, folders of images, and one text file of normalized labels for each image."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from hpetr.data.annotations import AREA_OF_BOX, ImageRecord, PoseAnnotations, ProblemLog, RowCheck, short
from hpetr.errors import InputError
from hpetr.images.read import load_image
from hpetr.poses.skeleton import COCO, is_text

SPLITS = ("train", "val", "test")
# A coordinate this far outside 0..1 is in pixels or of another format; one that is nearer overhangs the image.
FAR_OUTSIDE = 1.0


@dataclass(frozen=True)
class YoloConfig:
    """What a `data.yaml` says; `splits` gives each split's entries, folders of images or `.txt` lists of them."""

    path: Path
    root: Path
    splits: dict[str, list[str]]
    categories: list[dict[str, Any]]  # in COCO's form, one for each class
    num_keypoints: int
    dimensions: int  # numbers of a keypoint in a label: 2, x and y, or 3, with visibility


@dataclass
class YoloAnnotations(PoseAnnotations):
    """The labels of one split; `ids` count from 1 in the order of the images."""

    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # (A,) line of the label file

    def file_of(self, row: int) -> str:
        return label_file(os.path.join(self.root, self.images[self.image_index[row]].file_name))

    def position(self, row: int) -> str:
        return f"line {self.lines[row]}"


def read_yolo(
    path: str | os.PathLike[str],
    split: str,
    images: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> YoloAnnotations:
    """Read one split of a YOLO-pose data set and collect its problems.

    The label of `.../images/a/b.jpg` is `.../labels/a/b.txt` (the last folder called `images` counts; without one it is
    beside the image), with a line `class cx cy w h` and K times `x y` or `x y visibility` for each person, x and y as
    shares of the image's width and height. Without visibilities a keypoint at 0, 0 is not labelled. An image
    without a label file is background. Areas are 0.53 times the box.

    Args:
        path: the `data.yaml`; see `read_yolo_config`.
        split: `train`, `val` or `test`.
        images: replaces the YAML's `path`.
        limit: only the first `limit` images, folders in the order of the paths.

    Returns:
        What is right, in pixels; what is not is in `problems`.

    Raises:
        InputError: nothing can be said about the labels: the YAML is not valid, or there are no images.
    """
    config = read_yolo_config(path, images)
    paths = list_images(config, split)[:limit]
    log = ProblemLog()
    width = 5 + config.num_keypoints * config.dimensions
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda image: _read_image_and_labels(image, width), paths))
    if not any(part.labelled for part in parts):
        expected = f"e.g. {label_file(paths[0])}"
        log.add("no labels", f"{config.path}: '{split}'", f"no image has a label file, expected {expected}")
    records: list[ImageRecord] = []
    kept: list[_Part] = []
    for number, (image, part) in enumerate(zip(paths, parts, strict=True), start=1):
        for kind, where, text in part.problems:
            log.add(kind, where, text)
        if part.size is not None:
            relative = image.removeprefix(os.path.join(config.root, ""))
            records.append(ImageRecord(number, relative, *part.size))
            kept.append(part)
    return YoloAnnotations(
        path=config.path,
        root=config.root,
        images=records,
        categories=config.categories,
        **_rows_to_arrays(config, paths, records, kept, log),
        other_categories=0,
        problems=log.problems,
    )


def coco_form(loaded: PoseAnnotations) -> dict[str, Any]:
    """The annotations as the content of a COCO keypoint JSON."""
    annotations = []
    for row, (box, keypoints) in enumerate(zip(loaded.boxes.astype(np.float64), loaded.keypoints, strict=True)):
        annotations.append(
            {
                "id": int(loaded.ids[row]),
                "image_id": loaded.images[loaded.image_index[row]].id,
                "category_id": loaded.categories[loaded.class_labels[row]]["id"],
                "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                "area": float(loaded.areas[row]),
                "iscrowd": int(loaded.is_crowd[row]),
                "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                "keypoints": keypoints.ravel().tolist(),
            }
        )
    images = [
        {"id": record.id, "file_name": record.file_name, "width": record.width, "height": record.height}
        for record in loaded.images
    ]
    return {"images": images, "annotations": annotations, "categories": loaded.categories}


def label_file(image: str) -> str:
    """Where the labels of an image are."""
    folder, name = os.path.split(image)
    parts = list(Path(folder).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.path.join(*parts, os.path.splitext(name)[0] + ".txt")


# --- data.yaml


def read_yolo_config(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> YoloConfig:
    """Read a `data.yaml`.

    Keys: `path`, the root folder (relative to the YAML; default: where the YAML is); `train`, `val`, `test`, each a
    folder of images, a `.txt` that lists images, or a list of those, relative to the root; `names`, the classes;
    `kpt_shape: [K, 2 or 3]`; optional `flip_idx`, `kpt_names` (a list, or one for each class), and, for hpetr alone,
    `skeleton` (pairs of 0-based indices) and `sigmas`. Without `kpt_names`, 17 keypoints with COCO's `flip_idx` are
    COCO's. Other keys are not looked at.

    Args:
        path: the YAML.
        images: replaces `path`.

    Raises:
        InputError: names the file, the key and what was expected.
    """
    path = Path(path)
    values = _read_yaml(path)
    root = Path(images) if images is not None else path.parent / _get(path, values, "path", str, "a folder", ".")
    classes = _class_names(path, values)
    shape = _get(path, values, "kpt_shape", list, "[K, 2] or [K, 3]")
    if len(shape) != 2 or not all(type(number) is int for number in shape) or shape[0] < 1 or shape[1] not in (2, 3):
        raise InputError(f"{path}: 'kpt_shape' is {short(shape)}, expected [K, 2] or [K, 3] with at least 1 keypoint")
    num_keypoints, dimensions = shape
    splits = {}
    for split in SPLITS:
        entries = values.get(split)
        if entries:
            entries = [entries] if isinstance(entries, str) else entries
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise InputError(f"{path}: '{split}' is {short(entries)}, expected a folder, a .txt or a list of them")
            splits[split] = entries
    shared: dict[str, Any] = {}
    edges = _get(path, values, "skeleton", list, "pairs of keypoint indices", [])
    if not all(isinstance(e, list) and len(e) == 2 and all(type(i) is int for i in e) for e in edges):
        raise InputError(f"{path}: 'skeleton' is {short(edges)}, expected pairs of 0-based keypoint indices")
    if edges:
        shared["skeleton"] = [[first + 1, second + 1] for first, second in edges]  # COCO counts from 1
    for key in ("flip_idx", "sigmas"):
        if values.get(key) is not None:
            shared[key] = _get(path, values, key, list, f"{num_keypoints} numbers")
    names = _keypoint_names(path, values, num_keypoints, len(classes))
    categories = [
        {"id": label + 1, "name": name, "keypoints": keypoints, **shared}
        for label, (name, keypoints) in enumerate(zip(classes, names, strict=True))
    ]
    return YoloConfig(path, root, splits, categories, num_keypoints, dimensions)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected the data.yaml of a YOLO-pose data set") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping with train, val, names and kpt_shape")
    return values


def _get(path: Path, values: dict[str, Any], key: str, kind: type, expected: str, default: Any = None) -> Any:
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise InputError(f"{path}: key '{key}' is missing, expected {expected}")
    if not isinstance(value, kind):
        raise InputError(f"{path}: '{key}' is {short(value)}, expected {expected}")
    return value


def _class_names(path: Path, values: dict[str, Any]) -> list[str]:
    names = values.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise InputError(f"{path}: 'names' has the keys {short(list(names))}, expected the classes 0, 1, 2, ...")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise InputError(f"{path}: 'names' is {short(names)}, expected the class names, e.g. {{0: person}}")
    if wrong := [name for name in names if not is_text(str(name))]:
        raise InputError(f"{path}: 'names' has {short(wrong[0])}, expected text")
    return [str(name) for name in names]


def _keypoint_names(path: Path, values: dict[str, Any], num_keypoints: int, classes: int) -> list[list[str]]:
    """The keypoint names of each class."""
    given = values.get("kpt_names")
    if given is None:
        is_coco = num_keypoints == COCO.num_keypoints and values.get("flip_idx") == COCO.flip_index
        names = list(COCO.names) if is_coco else [f"keypoint_{index}" for index in range(num_keypoints)]
        return [names] * classes
    named = given if isinstance(given, dict) else dict.fromkeys(range(classes), given)
    for label in range(classes):
        listed = named.get(label)
        if not isinstance(listed, list) or len(listed) != num_keypoints:
            has = f"{len(listed)} names" if isinstance(listed, list) else short(listed)
            raise InputError(
                f"{path}: 'kpt_names' has {has} for class {label}, expected {num_keypoints}, one for each keypoint"
            )
    return [[str(name) for name in named[label]] for label in range(classes)]


def list_images(config: YoloConfig, split: str) -> list[str]:
    """The paths of a split's images: those under its folders (hidden files left out) by path, lists in their order.

    Raises:
        InputError: the YAML has no such split, or an entry leads to no images.
    """
    if split not in config.splits:
        there = ", ".join(config.splits) or "no split"
        raise InputError(f"{config.path}: split '{split}' is not given, expected one of those there: {there}")
    images: list[str] = []
    for entry in config.splits[split]:
        place = os.path.join(config.root, entry)
        if os.path.isdir(place):
            found = _images_under(place)
        elif os.path.isfile(place) and place.lower().endswith(".txt"):
            found = _images_listed(place)
        else:
            raise InputError(f"{config.path}: '{split}': no folder or .txt {place}")
        if not found:
            raise InputError(f"{config.path}: '{split}': no image in {place}")
        images += found
    return images


def _images_under(folder: str) -> list[str]:
    from hpetr.images.read import IMAGE_SUFFIXES  # that module imports this package

    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(os.path.join(parent, name))
    return sorted(found)


def _images_listed(file: str) -> list[str]:
    """One path a line, relative to the list."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}), expected a path of an image in each line") from error
    return [os.path.normpath(os.path.join(os.path.dirname(file), line.strip())) for line in lines if line.strip()]


# --- labels


@dataclass
class _Part:
    """What one image and its label file hold."""

    size: tuple[int, int] | None = None  # width, height; None: not readable
    labelled: bool = False  # there is a label file
    numbers: np.ndarray | None = None  # (n, 5 + K * dimensions) float64
    lines: list[int] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # kind, where, text


def _read_image_and_labels(image: str, width: int) -> _Part:
    part = _Part()
    try:
        part.size = image_size(image)
    except InputError as error:
        missing = not os.path.exists(image)
        part.problems.append(("missing image" if missing else "unreadable image", image, _reason(error, image)))
    file = label_file(image)
    try:
        with open(file, encoding="utf-8-sig", errors="replace") as stream:
            rows = [line.split() for line in stream]
    except FileNotFoundError:
        return part
    except OSError as error:
        part.problems.append(("unreadable labels", file, f"cannot be read ({error.strerror})"))
        return part
    part.labelled = True
    part.lines = [number for number, row in enumerate(rows, start=1) if row]
    rows = [row for row in rows if row]
    try:
        part.numbers = np.array(rows, dtype=np.float64).reshape(len(rows), width)
    except ValueError:
        _read_lines(part, file, rows, width)
    return part


def _reason(error: InputError, image: str) -> str:
    return str(error).removeprefix(f"{image}: ")


def _read_lines(part: _Part, file: str, rows: list[list[str]], width: int) -> None:
    """Line by line, where the whole file is no table of numbers."""
    kept = []
    for number, row in zip(part.lines, rows, strict=True):
        if len(row) != width:
            text = f"{len(row)} numbers, expected {width}: class cx cy w h and the keypoints of kpt_shape"
            part.problems.append(("wrong number of values", f"{file}: line {number}", text))
            continue
        try:
            kept.append((number, [float(value) for value in row]))
        except ValueError:
            text = f"{short(' '.join(row))}, expected numbers"
            part.problems.append(("not finite numbers", f"{file}: line {number}", text))
    part.lines = [number for number, _ in kept]
    part.numbers = np.array([values for _, values in kept], dtype=np.float64).reshape(-1, width)


def _rows_to_arrays(
    config: YoloConfig, images: list[str], records: list[ImageRecord], parts: list[_Part], log: ProblemLog
) -> dict[str, Any]:
    """The arrays of `YoloAnnotations`, of labels without a problem."""
    count, dimensions = config.num_keypoints, config.dimensions
    tables = [np.zeros((0, 5 + count * dimensions)) if part.numbers is None else part.numbers for part in parts]
    numbers = np.concatenate([*tables, np.zeros((0, 5 + count * dimensions))])  # (A, 5 + K * dimensions)
    lines = np.array([line for part in parts for line in part.lines], dtype=np.int64)
    image_index = np.repeat(np.arange(len(parts)), np.array([len(table) for table in tables], dtype=np.int64))
    boxes = numbers[:, 1:5]
    points = numbers[:, 5:].reshape(-1, count, dimensions)
    if dimensions == 2:
        visibility = 2.0 * (points != 0).any(axis=2)
    else:
        visibility = points[..., 2]
    labelled = (visibility > 0).any(axis=1)

    def place(row: int) -> str:
        return f"{label_file(images[records[image_index[row]].id - 1])}: line {lines[row]}"

    check = RowCheck(log, place, np.isfinite(numbers).all(axis=1))
    check.refuse(~check.finite, "not finite numbers", lambda _: "expected finite numbers")
    labels, classes = numbers[:, 0], len(config.categories)
    unknown = check.finite & ((labels < 0) | (labels >= classes) | (labels != np.floor(labels)))
    expected = f"expected a whole number in 0..{classes - 1}"
    check.refuse(unknown, "unknown class", lambda row: f"class {labels[row]:g}, {expected}")
    check.visibility(visibility)
    check.extent(boxes[:, 2:], labelled, lambda row: f"box of {boxes[row, 2]:g} x {boxes[row, 3]:g}")
    xy = np.where(visibility[..., None] > 0, points[..., :2], 0)
    coordinates = np.concatenate([boxes, xy.reshape(-1, 2 * count)], axis=1)  # (A, 4 + 2 K)
    far = check.finite & (np.abs(coordinates - 0.5) > 0.5 + FAR_OUTSIDE).any(axis=1)
    shares = "expected shares of the image's width and height, 0..1"
    check.refuse(far, "not normalized", lambda row: f"coordinate {_furthest(coordinates[row]):g}, {shares}")

    kept = ~check.wrong
    scale = np.array([(record.width, record.height) for record in records], dtype=np.float64).reshape(-1, 2)
    scale = scale[image_index[kept]]  # (A, 2)
    center, half = boxes[kept, :2] * scale, boxes[kept, 2:] * scale / 2
    keypoints = np.concatenate([xy, visibility[..., None]], axis=2)[kept]
    keypoints[..., :2] *= scale[:, None]
    return {
        "ids": np.arange(1, kept.sum() + 1, dtype=np.int64),
        "image_index": image_index[kept].astype(np.int64),
        "class_labels": labels[kept].astype(np.int64),
        "keypoints": keypoints.astype(np.float32),
        "boxes": np.concatenate([center - half, center + half], axis=1).astype(np.float32),
        "areas": (AREA_OF_BOX * 4 * half.prod(axis=1)).astype(np.float32),
        "is_crowd": np.zeros(kept.sum(), dtype=bool),
        "filled_areas": int(kept.sum()),
        "lines": lines[kept],
    }


def _furthest(coordinates: np.ndarray) -> float:
    return float(coordinates[np.abs(coordinates - 0.5).argmax()])


# --- sizes

# Formats whose header tells everything; for others the image is read.
_HEADER_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF"}
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of what `load_image` gives, EXIF orientation applied, mostly without decoding the image.

    Raises:
        InputError: the file is no image; see `load_image`.
    """
    try:
        with Image.open(path) as image:
            if image.format in _HEADER_FORMATS:
                width, height = image.size
                return (height, width) if _orientation(image) in _SIDEWAYS else (width, height)
    except Exception:  # load_image says what is wrong
        pass
    height, width = load_image(path).shape[:2]
    return width, height


def _orientation(image: Image.Image) -> int:
    if isinstance(image, PngImageFile) and not _has_late_chunks(image):
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)  # PNG's own would decode the image
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _has_late_chunks(image: PngImageFile) -> bool:
    """Whether a PNG has metadata behind its pixels, where `Image.open` does not look."""
    stream = image.fp
    if stream is None:
        return True
    stream.seek(8)
    behind = False
    while len(head := stream.read(8)) == 8:
        kind = head[4:]
        if behind and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        behind = behind or kind == b"IDAT"
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False
