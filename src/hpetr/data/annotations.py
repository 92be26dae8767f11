"""COCO keypoint JSON, read and checked: whoever trains or evaluates on a file gets the same error about it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from hpetr.errors import InputError

# The mean ratio of a COCO person's segmented area to that of the box; the scale of OKS when a file gives no area.
AREA_OF_BOX = 0.53


@dataclass(frozen=True)
class ImageRecord:
    """A picture of the file: `file_name` relative to the folder of the pictures, width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass
class PoseAnnotations:
    """The checked content of a COCO keypoint JSON, as arrays; row j is annotation j of the file.

    Annotations of categories without keypoints are left out and counted in `other_categories`.
    """

    path: Path
    images: list[ImageRecord]
    categories: list[dict[str, Any]]  # those with keypoints, in the file's order: index = class label
    ids: np.ndarray  # (A,) int64
    image_index: np.ndarray  # (A,) int64, row in `images`
    class_labels: np.ndarray  # (A,) int64
    keypoints: np.ndarray  # (A, K, 3) float32 x, y in pixels, visibility 0, 1, 2; 0, 0, 0 where not labelled
    boxes: np.ndarray  # (A, 4) float32 x1, y1, x2, y2 in pixels
    areas: np.ndarray  # (A,) float32 pixels^2
    is_crowd: np.ndarray  # (A,) bool
    filled_areas: int  # annotations without `area`, which got AREA_OF_BOX times their box
    other_categories: int

    @property
    def category(self) -> dict[str, Any]:
        """The first category with keypoints; all have the same number of them."""
        return self.categories[0]

    @property
    def num_keypoints(self) -> int:
        """K."""
        return len(self.category["keypoints"])


def load_annotations(path: str | os.PathLike[str]) -> PoseAnnotations:
    """Read and check a COCO keypoint JSON.

    Expected are `images` (id, file_name, width, height), `annotations` (id, image_id, category_id, bbox, keypoints;
    optional iscrowd, and area, else 0.53 times the box) and `categories` with `keypoints`, the list of names.
    `num_keypoints` is not read: visibilities above 0 are counted. A crowd (`iscrowd: 1`) needs no keypoints.

    Raises:
        InputError: in one line, the file, the annotation's id, the field and what was expected of it.
    """
    path = Path(path)
    data = _read_json(path)
    images = _read_images(path, data["images"])
    categories = _read_categories(path, data["categories"])
    return _read_annotations(path, data["annotations"], images, categories, {c.get("id") for c in data["categories"]})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected a COCO keypoint JSON") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a COCO keypoint JSON") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if key not in data:
            raise InputError(f"{path}: top-level key '{key}' is missing")
        if not isinstance(data[key], list) or not all(isinstance(item, dict) for item in data[key]):
            raise InputError(f"{path}: '{key}' is not a list of objects")
    return data


def _field(item: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
    if key not in item:
        raise InputError(f"{where}: field '{key}' is missing, expected {expected}")
    value = item[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where}: '{key}' is {_short(value)}, expected {expected}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_images(path: Path, items: list[dict[str, Any]]) -> list[ImageRecord]:
    records = []
    seen: set[int] = set()
    for position, item in enumerate(items):
        image_id = _field(item, "id", int, f"{path}: images[{position}]", "a whole number")
        where = f"{path}: image {image_id}"
        if image_id in seen:
            raise InputError(f"{where}: 'id' occurs twice, expected distinct ids")
        seen.add(image_id)
        name = _field(item, "file_name", str, where, "the path of the picture")
        width = _field(item, "width", int, where, "a whole number of pixels")
        height = _field(item, "height", int, where, "a whole number of pixels")
        if not name or width < 1 or height < 1:
            raise InputError(f"{where}: {name!r} of {width} x {height}, expected a file_name and at least 1 x 1 pixels")
        records.append(ImageRecord(image_id, name, width, height))
    if not records:
        raise InputError(f"{path}: 'images' is empty, expected at least one picture")
    return records


def _read_categories(path: Path, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    categories = [item for item in items if item.get("keypoints")]
    if not categories:
        raise InputError(f"{path}: no category has 'keypoints', expected the list of keypoint names")
    ids = [_field(item, "id", int, f"{path}: categories", "a whole number") for item in items]
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: categories: an 'id' occurs twice, expected distinct ids")
    counts = {}
    for item in categories:
        names = _field(item, "keypoints", list, f"{path}: category {item['id']}", "the list of keypoint names")
        counts[item["id"]] = len(names)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"category {category} has {count}" for category, count in counts.items())
        raise InputError(f"{path}: categories differ in their number of keypoints ({listed}), expected the same K")
    return categories


def _read_annotations(
    path: Path,
    items: list[dict[str, Any]],
    images: list[ImageRecord],
    categories: list[dict[str, Any]],
    all_category_ids: set[int],
) -> PoseAnnotations:
    image_index = {record.id: index for index, record in enumerate(images)}
    labels = {category["id"]: label for label, category in enumerate(categories)}
    num_keypoints = len(categories[0]["keypoints"])
    seen: set[int] = set()
    rows: list[tuple[int, int, int, bool]] = []
    keypoints, boxes, areas = [], [], []
    filled_areas = other_categories = 0
    for position, item in enumerate(items):
        annotation_id = _field(item, "id", int, f"{path}: annotations[{position}]", "a whole number")
        where = f"{path}: annotation {annotation_id}"
        if annotation_id in seen:
            raise InputError(f"{where}: 'id' occurs twice, expected distinct ids")
        seen.add(annotation_id)
        image_id = _field(item, "image_id", int, where, "the id of an entry of 'images'")
        if image_id not in image_index:
            raise InputError(f"{where}: 'image_id' is {image_id}, expected the id of an entry of 'images'")
        category_id = _field(item, "category_id", int, where, "the id of an entry of 'categories'")
        if category_id not in all_category_ids:
            raise InputError(f"{where}: 'category_id' is {category_id}, expected the id of an entry of 'categories'")
        if category_id not in labels:
            other_categories += 1
            continue
        crowd = bool(item.get("iscrowd", 0))
        points = _read_keypoints(item, num_keypoints, crowd, where)
        labelled = not crowd and bool((points[:, 2] > 0).any())
        box = _read_box(item, labelled, where)
        if "area" in item:
            area = float(_field(item, "area", Real, where, "a number of pixels^2"))
        else:
            area = AREA_OF_BOX * float((box[2] - box[0]) * (box[3] - box[1]))
            filled_areas += 1
        if not np.isfinite(area) or (labelled and area <= 0):
            raise InputError(f"{where}: 'area' is {area}, expected a positive number of pixels^2")
        rows.append((annotation_id, image_index[image_id], labels[category_id], crowd))
        keypoints.append(points)
        boxes.append(box)
        areas.append(area)
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    return PoseAnnotations(
        path=path,
        images=images,
        categories=categories,
        ids=np.array(columns[0], dtype=np.int64),
        image_index=np.array(columns[1], dtype=np.int64),
        class_labels=np.array(columns[2], dtype=np.int64),
        keypoints=np.array(keypoints, dtype=np.float32).reshape(-1, num_keypoints, 3),
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        areas=np.array(areas, dtype=np.float32),
        is_crowd=np.array(columns[3], dtype=bool),
        filled_areas=filled_areas,
        other_categories=other_categories,
    )


def _numbers(values: list[Any], field: str, where: str) -> np.ndarray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: '{field}' is {_short(values)}, expected a flat list of numbers") from error
    if array.ndim != 1 or not np.isfinite(array).all():
        raise InputError(f"{where}: '{field}' is {_short(values)}, expected a flat list of finite numbers")
    return array


def _read_keypoints(item: Mapping[str, Any], num_keypoints: int, crowd: bool, where: str) -> np.ndarray:
    """(K, 3) float64; all zeros for a crowd, whose keypoints (if any) belong to nobody in particular."""
    if crowd and not item.get("keypoints"):
        return np.zeros((num_keypoints, 3))
    expected = f"{3 * num_keypoints} numbers, x, y, visibility of {num_keypoints} keypoints"
    values = _field(item, "keypoints", list, where, expected)
    if len(values) != 3 * num_keypoints:
        raise InputError(f"{where}: 'keypoints' has {len(values)} numbers, expected {expected}")
    points = _numbers(values, "keypoints", where).reshape(num_keypoints, 3)
    if not np.isin(points[:, 2], (0, 1, 2)).all():
        raise InputError(f"{where}: 'keypoints' has a visibility other than 0, 1, 2")
    points[points[:, 2] == 0] = 0
    return points


def _read_box(item: Mapping[str, Any], labelled: bool, where: str) -> np.ndarray:
    """(4,) float64 x1, y1, x2, y2. A box without extent is an error only for a person with keypoints: COCO has such."""
    values = _field(item, "bbox", list, where, "x, y, width, height")
    if len(values) != 4:
        raise InputError(f"{where}: 'bbox' has {len(values)} numbers, expected x, y, width, height")
    x, y, width, height = _numbers(values, "bbox", where)
    if min(width, height) < 0 or (labelled and min(width, height) == 0):
        raise InputError(f"{where}: 'bbox' is {_short(values)}, expected a positive width and height")
    return np.array([x, y, x + width, y + height])
