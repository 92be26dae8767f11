"""YOLO-pose: a `data.yaml`, folders of images, and one text file of normalized labels for each image."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from hpetr.data.annotations import (
    AREA_OF_BOX,
    ImageRecord,
    PoseAnnotations,
    Problem,
    ProblemLog,
    RowCheck,
    coco_form,
    raise_first,
    short,
)
from hpetr.errors import InputError
from hpetr.images.read import is_image, load_image
from hpetr.poses.skeleton import COCO, is_text

SPLITS = ("train", "val", "test")
# A coordinate this far outside 0..1 is in pixels or of another format; a nearer one overhangs the image.
FAR_OUTSIDE = 1.0


@dataclass(frozen=True)
class YoloConfig:
    """The content of a `data.yaml`."""

    path: Path
    root: Path
    splits: dict[str, list[str]]  # each split's entries: folders of images or `.txt` lists of them
    categories: list[dict[str, Any]]  # in COCO's form, one for each class
    num_keypoints: int
    dimensions: int  # numbers of a keypoint in a label: 2, x and y, or 3, with visibility


@dataclass
class YoloAnnotations(PoseAnnotations):
    """The labels of one split; `ids` count from 1 in the order of the images."""

    lines: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # (A,) line of the label file

    def place(self, row: int) -> str:
        """Return the label file and the line of annotation `row`."""
        image = os.path.join(self.root, self.images[self.image_index[row]].file_name)
        return f"{label_file(image)}: {self.position(row)}"

    def position(self, row: int) -> str:
        """Return the line of annotation `row` in its label file."""
        return f"line {self.lines[row]}"


def read_yolo(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> YoloAnnotations:
    """Read one split of a YOLO-pose data set and collect its problems.

    The label of `.../images/a/b.jpg` is `.../labels/a/b.txt` (the last folder called `images` counts; without one it is
    beside the image), with a line `class cx cy w h` and K times `x y` or `x y visibility` for each person, x and y as
    shares of the image's width and height. Without visibilities a keypoint at 0, 0 is not labelled. An image
    without a label file is background. Areas are 0.53 times the box.

    Args:
        path: the `data.yaml`; see `read_yolo_config`.
        images: replaces the YAML's `path`.
        split: `train`, `val` or `test`.
        limit: only the first `limit` images, folders in the order of the paths.

    Returns:
        The valid labels, in pixels, and the problems of the others in `problems`.

    Raises:
        InputError: the YAML is not valid, or there are no images.
    """
    config = read_yolo_config(path, images)
    every = list_images(config, split)
    paths, log = every[:limit], ProblemLog()
    width = 5 + config.num_keypoints * config.dimensions
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda image: _read_image_and_labels(image, width), paths))
    unlabelled = [image for image, part in zip(paths, parts, strict=True) if not part.is_labelled]
    if len(unlabelled) == len(parts):
        expected = f"e.g. {label_file(paths[0])}"
        log.add("no labels", f"{config.path}: '{split}'", f"no image has a label file, expected {expected}")
    records: list[ImageRecord] = []
    kept: list[_Part] = []
    for number, (image, part) in enumerate(zip(paths, parts, strict=True), start=1):
        log.problems += part.problems
        if part.size is not None:
            records.append(ImageRecord(number, image.removeprefix(os.path.join(config.root, "")), *part.size))
            kept.append(part)
    return YoloAnnotations(
        path=config.path,
        root=config.root,
        images=records,
        categories=config.categories,
        **_rows_to_arrays(config, paths, records, kept, log),
        problems=log.problems,
        warnings=list(_label_warnings(every, unlabelled)),
    )


def read_yolo_ground_truth(*source: Any) -> dict[str, Any]:
    """Read one split as the content of a COCO keypoint JSON; the arguments of `read_yolo`.

    Raises:
        InputError: a label is not valid, or see `read_yolo`.
    """
    loaded = read_yolo(*source)
    raise_first(loaded.problems)
    return coco_form(loaded)


def yolo_splits(path: Path, images: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of the splits that a `data.yaml` describes, at least one."""
    splits = list(read_yolo_config(path, images).splits)
    if not splits:
        raise InputError(f"{path}: no split is given, expected {', '.join(SPLITS)} or some of them")
    return splits


def label_file(image: str) -> str:
    """Return the path of an image's labels."""
    folder, name = os.path.split(image)
    parts = list(Path(folder).parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return os.path.join(*parts, os.path.splitext(name)[0] + ".txt")


# --- data.yaml


def read_yolo_config(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> YoloConfig:
    """Read a `data.yaml`.

    Keys: `path`, the root folder (relative to the YAML; default: the YAML's); `train`, `val`, `test`, each a
    folder of images, a `.txt` that lists images, or a list of those, relative to the root; `names`, the classes;
    `kpt_shape: [K, 2 or 3]`; optional `flip_idx`, `kpt_names` (a list, or one for each class), and, for hpetr alone,
    `skeleton` (pairs of 0-based indices) and `sigmas`. Without `kpt_names`, 17 keypoints with COCO's `flip_idx` are
    COCO's. Other keys are ignored.

    Args:
        path: the YAML.
        images: replaces `path`.

    Raises:
        InputError: names the file, the key and the expected value.
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
        if entries not in (None, ""):
            entries = [entries] if isinstance(entries, str) else entries
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise InputError(f"{path}: '{split}' is {short(entries)}, expected a folder, a .txt or a list of them")
            splits[split] = entries
    shared: dict[str, Any] = {}
    edges = _get(path, values, "skeleton", list, "pairs of keypoint indices", [])
    for edge in edges:
        valid = isinstance(edge, list) and len(edge) == 2 and edge[0] != edge[1]
        if not valid or not all(type(index) is int and 0 <= index < num_keypoints for index in edge):
            expected = f"expected pairs of different indices in 0..{num_keypoints - 1}"
            raise InputError(f"{path}: 'skeleton' has {short(edge)}, {expected}")
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
    import yaml  # the readers of other formats need no YAML

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
    """Return the keypoint names of each class."""
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
    """Return the paths of a split's images: folders' (without hidden files) sorted, lists' in their order.

    Raises:
        InputError: the YAML has no such split, or an entry leads to no images.
    """
    if split not in config.splits:
        there = ", ".join(config.splits) or "no split"
        raise InputError(f"{config.path}: split '{split}' is not given, expected one of those there: {there}")
    images: list[str] = []
    for entry in config.splits[split]:
        place = os.path.join(config.root, entry)
        if not os.path.exists(place) and entry.startswith("../"):
            # Roboflow's files say ../train/images, which is train/images beside them.
            place = os.path.join(config.root, entry.removeprefix("../"))
        if os.path.isdir(place):
            found = sorted(_images_under(place))
        elif os.path.isfile(place) and place.lower().endswith(".txt"):
            found = _images_listed(place)
        else:
            raise InputError(f"{config.path}: '{split}': no folder or .txt {place}")
        if not found:
            raise InputError(f"{config.path}: '{split}': no image in {place}")
        images += found
    return images


def _images_under(folder: str) -> Iterable[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(parent, name) for name in names if name[0] != "." and is_image(name))


def _images_listed(file: str) -> list[str]:
    """Return the paths of a list, one a line and relative to the list."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}), expected a path of an image in each line") from error
    return [os.path.normpath(os.path.join(os.path.dirname(file), line.strip())) for line in lines if line.strip()]


# --- labels


@dataclass(frozen=True)
class _Part:
    """The content of one image's header and of its label file."""

    size: tuple[int, int] | None  # width, height; None: not readable
    is_labelled: bool  # there is a label file
    numbers: np.ndarray  # (n, 5 + K * dimensions) float64
    lines: list[int]  # n
    problems: list[Problem]


def _read_image_and_labels(image: str, width: int) -> _Part:
    log, file, size = ProblemLog(), label_file(image), None
    try:
        size = image_size(image)
    except InputError as error:
        kind = "unreadable image" if os.path.exists(image) else "missing image"
        log.problems.append(Problem(kind, str(error)))
    lines, is_labelled = [], True
    try:
        with open(file, encoding="utf-8-sig", errors="replace") as stream:
            lines = stream.readlines()
    except FileNotFoundError:
        is_labelled = False
    except OSError as error:
        log.add("unreadable labels", file, f"cannot be read ({error.strerror})")
    rows: dict[int, list[float]] = {}
    for number, row in enumerate(map(str.split, lines), start=1):
        where = f"{file}: line {number}"
        if row and len(row) != width:
            text = f"{len(row)} numbers, expected {width}: class cx cy w h and the keypoints of kpt_shape"
            log.add("wrong number of values", where, text)
        elif row:
            try:
                rows[number] = [float(value) for value in row]
            except ValueError:
                log.add("not finite numbers", where, f"{short(' '.join(row))}, expected numbers")
    numbers = np.array([*rows.values()], dtype=np.float64).reshape(-1, width)
    return _Part(size, is_labelled, numbers, [*rows], log.problems)


def _rows_to_arrays(
    config: YoloConfig, images: list[str], records: list[ImageRecord], parts: list[_Part], log: ProblemLog
) -> dict[str, Any]:
    """Return the arrays of `YoloAnnotations`, of labels without a problem."""
    count, dimensions = config.num_keypoints, config.dimensions
    numbers = np.concatenate([*(part.numbers for part in parts), np.zeros((0, 5 + count * dimensions))])
    lines = np.array([line for part in parts for line in part.lines], dtype=np.int64)
    image_index = np.repeat(np.arange(len(parts)), np.array([len(part.lines) for part in parts], dtype=np.int64))
    boxes = numbers[:, 1:5]
    points = numbers[:, 5:].reshape(-1, count, dimensions)
    visibility = points[..., 2] if dimensions == 3 else np.where((points != 0).any(axis=2), 2.0, 0.0)
    labelled = np.any(visibility > 0, axis=1)

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
    distance = np.abs(coordinates - 0.5)
    far = check.finite & (distance > 0.5 + FAR_OUTSIDE).any(axis=1)
    shares = "expected shares of the image's width and height, 0..1"
    check.refuse(
        far, "not normalized", lambda row: f"coordinate {coordinates[row, distance[row].argmax()]:g}, {shares}"
    )

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


def _label_warnings(images: Sequence[str], unlabelled: Sequence[str]) -> Iterable[Problem]:
    """Find images without a label file, label files without an image, and labels of two images."""
    for image in unlabelled:
        beside = os.path.splitext(image)[0] + ".txt"
        elsewhere = f"; {beside} is not read" if os.path.isfile(beside) else ""
        text = f"{image}: taken as background, expected {label_file(image)}{elsewhere}"
        yield Problem("images without a label file", text)
    places = Counter(label_file(image) for image in images)
    for file, uses in places.items():
        if uses > 1 and os.path.isfile(file):
            yield Problem("label files of several images", f"{file}: is read for {uses} images of one name")
    # All images beside those of the split count: a list may leave some out.
    for folder in dict.fromkeys(os.path.dirname(image) for image in images):
        labels = os.path.dirname(label_file(os.path.join(folder, "image")))
        if labels == folder or not os.path.isdir(labels) or not os.path.isdir(folder):
            continue
        known = {os.path.basename(label_file(name)) for name in os.listdir(folder) if is_image(name)}
        for name in sorted(set(os.listdir(labels)) - known - {"classes.txt"}):
            if name.lower().endswith(".txt"):
                text = f"{os.path.join(labels, name)}: is not read, expected an image of its name in {folder}"
                yield Problem("label files without an image", text)


# --- sizes

# Formats whose header has size and orientation; images of others are decoded.
_HEADER_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF"}
_SIDEWAYS = {5, 6, 7, 8}  # EXIF orientations that exchange width and height


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (width, height) of the image that `load_image` returns, mostly without decoding it.

    Raises:
        InputError: the file is no image; see `load_image`.
    """
    try:
        with Image.open(path) as image:
            if image.format in _HEADER_FORMATS:
                # Pillow decodes a PNG for its own getexif: metadata may follow the pixels.
                decoded = image.format == "PNG" and _has_late_metadata(Path(path).read_bytes())
                exif = image.getexif() if decoded else Image.Image.getexif(image)
                return image.size[::-1] if exif.get(ExifTags.Base.Orientation, 1) in _SIDEWAYS else image.size
    except Exception:  # load_image raises the error that names the fault
        pass
    height, width = load_image(path).shape[:2]
    return width, height


def _has_late_metadata(png: bytes) -> bool:
    return re.search(rb"eXIf|iTXt|tEXt|zTXt", png[png.find(b"IDAT") :]) is not None
