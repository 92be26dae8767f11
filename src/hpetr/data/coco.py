"""COCO keypoint JSON, read and checked; CrowdPose's files have the same form."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpetr.data.annotations import (
    AREA_OF_BOX,
    MAX_COORDINATE,
    ImageRecord,
    PoseAnnotations,
    ProblemLog,
    RowCheck,
    raise_first,
    short,
)
from hpetr.errors import InputError
from hpetr.poses.skeleton import is_text

# An image of more pixels a side does not have most of its people within this many pixels of its corner.
SMALLEST_SIDE, CORNER = 8, 1.5


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off: it takes a third of the time of a large JSON and finds nothing there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_annotations(path: str | os.PathLike[str]) -> PoseAnnotations:
    """Read a COCO keypoint JSON without problems.

    Raises:
        InputError: the first problem of `read_coco`, in one line: the file, the annotation's id, the field, the
            expected value, and the number of further problems.
    """
    loaded = read_coco(path)
    raise_first(loaded.problems)
    return loaded


@_without_garbage_collection()
def read_ground_truth(path: str | os.PathLike[str], *_: Any) -> dict[str, Any]:
    """Read a COCO keypoint JSON for evaluation, checked, with every number as the file has it.

    Returns:
        `images` (whole: CrowdPose's crowdIndex is among their keys), and the `categories` with keypoints and their
        `annotations`.

    Raises:
        InputError: see `load_annotations`.
    """
    path = Path(path)
    content = _read_json(path)
    loaded = _annotations(path, content, None)
    raise_first(loaded.problems)
    kept = {category["id"] for category in loaded.categories}
    return {
        "images": content["images"],
        "annotations": [item for item in content["annotations"] if item["category_id"] in kept],
        "categories": loaded.categories,
    }


@_without_garbage_collection()
def read_coco(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None, *_: Any) -> PoseAnnotations:
    """Read a COCO keypoint JSON and collect its problems.

    Expected are `images` (id, file_name, width, height), `annotations` (id, image_id, category_id, bbox, keypoints;
    optional iscrowd, and area, else 0.53 times the box) and `categories` with `keypoints`, the list of names.
    `num_keypoints` is not read: visibilities above 0 are counted. A crowd (`iscrowd: 1`) needs no keypoints.

    Args:
        path: the JSON.
        images: folder of the images, which is not read; None takes `images` beside the JSON.

    Returns:
        The valid annotations, and the problems of the others in `problems`.

    Raises:
        InputError: the file is no JSON, or has no images or no usable categories.
    """
    path = Path(path)
    return _annotations(path, _read_json(path), images)


def _annotations(path: Path, content: dict[str, Any], images: str | os.PathLike[str] | None) -> PoseAnnotations:
    log = ProblemLog()
    records, image_ids = _read_images(path, content["images"], log)
    categories = _read_categories(path, content["categories"])
    labels: dict[int, int | None] = {item["id"]: None for item in content["categories"]}
    labels |= {category["id"]: label for label, category in enumerate(categories)}
    num_keypoints = len(categories[0]["keypoints"])
    rows, other_categories = _read_people(path, content["annotations"], image_ids, labels, num_keypoints, log)
    return PoseAnnotations(
        path=path,
        root=path.parent / "images" if images is None else Path(images),
        images=records,
        categories=categories,
        **_arrays(path, rows, records, num_keypoints, log),
        other_categories=other_categories,
        problems=log.problems,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a COCO JSON; only its three lists of objects are checked."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected a COCO keypoint JSON") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected a COCO keypoint JSON") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if key not in content:
            raise InputError(f"{path}: top-level key '{key}' is missing")
        if not isinstance(content[key], list) or not all(isinstance(item, dict) for item in content[key]):
            raise InputError(f"{path}: '{key}' is not a list of objects")
    return content


def _read_images(path: Path, items: list[dict[str, Any]], log: ProblemLog) -> tuple[list[ImageRecord], set[int]]:
    """Return the valid records, and the ids of all: a fault of an image is not one of each of its annotations."""
    if not items:
        raise InputError(f"{path}: 'images' is empty, expected at least one image")
    records = []
    seen: set[int] = set()
    for position, item in enumerate(items):
        before = len(log.problems)
        image_id = log.field(item, "id", int, f"{path}: images[{position}]", "a whole number")
        if image_id is None:
            continue
        where = f"{path}: image {image_id}"
        if image_id in seen:
            log.add("duplicate image id", where, "'id' occurs twice, expected distinct ids")
        seen.add(image_id)
        name = log.field(item, "file_name", str, where, "the path of the image")
        width = log.field(item, "width", int, where, "a whole number of pixels")
        height = log.field(item, "height", int, where, "a whole number of pixels")
        if len(log.problems) > before or name is None or width is None or height is None:
            continue
        if not name or width < 1 or height < 1:
            text = f"{name!r} of {width} x {height}, expected a file_name and at least 1 x 1 pixels"
            log.add("image without name or size", where, text)
            continue
        records.append(ImageRecord(image_id, name, width, height))
    return records, seen


def _read_categories(path: Path, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    categories = [item for item in items if item.get("keypoints") not in (None, [])]
    if not categories:
        raise InputError(f"{path}: no category has 'keypoints', expected the list of keypoint names")
    log = ProblemLog()
    ids = [log.field(item, "id", int, f"{path}: categories", "a whole number") for item in items]
    for item in categories:
        where = f"{path}: category {item.get('id')}"
        log.field(item, "keypoints", list, where, "the list of keypoint names")
        if not is_text(str(item.get("name"))):
            log.add("wrong 'name'", where, f"'name' is {short(item['name'])}, expected text")
    raise_first(log.problems)
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: categories: an 'id' occurs twice, expected distinct ids")
    counts = {item["id"]: len(item["keypoints"]) for item in categories}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"category {category} has {count}" for category, count in counts.items())
        raise InputError(f"{path}: categories differ in their number of keypoints ({listed}), expected the same K")
    return categories


class _Row(NamedTuple):
    """An annotation with the right types and ids; its numbers are checked later."""

    id: int
    image_id: int
    label: int
    is_crowd: bool
    has_area: bool
    keypoints: list[Any]  # 3 K
    box: list[Any]  # x, y, width, height
    area: Any


def _read_people(
    path: Path,
    items: list[dict[str, Any]],
    image_ids: set[int],
    labels: Mapping[int, int | None],
    num_keypoints: int,
    log: ProblemLog,
) -> tuple[list[_Row], int]:
    """Return the annotations that can become rows, and the number of those of categories without keypoints.

    Args:
        labels: class label of each category's id; None for categories without keypoints.
    """
    rows, seen, other_categories, count = [], set(), 0, 3 * num_keypoints
    expected = f"{count} numbers, x, y, visibility of {num_keypoints} keypoints"
    for position, item in enumerate(items):
        before = len(log.problems)
        number = log.field(item, "id", int, f"{path}: annotations[{position}]", "a whole number")
        where = f"{path}: annotation {number}"
        if number is None:
            continue
        if number in seen:
            log.add("duplicate annotation id", where, "'id' occurs twice, expected distinct ids")
        seen.add(number)
        image_id = log.field(item, "image_id", int, where, "the id of an entry of 'images'")
        if image_id is not None and image_id not in image_ids:
            log.add("unknown image", where, f"'image_id' is {image_id}, expected the id of an entry of 'images'")
        category = log.field(item, "category_id", int, where, "the id of an entry of 'categories'")
        if category is not None and category not in labels:
            text = f"'category_id' is {category}, expected the id of an entry of 'categories'"
            log.add("unknown category", where, text)
        label = labels.get(category, -1)
        if label is None:
            other_categories += 1
            continue
        crowd, keypoints = log.flag(item, "iscrowd", where), [0] * count
        if not crowd or item.get("keypoints") not in (None, []):  # a crowd needs no keypoints
            keypoints = log.field(item, "keypoints", list, where, expected)
            if keypoints is not None and len(keypoints) != count:
                text = f"'keypoints' has {len(keypoints)} numbers, expected {expected}"
                log.add("wrong number of keypoints", where, text)
        box = log.field(item, "bbox", list, where, "x, y, width, height")
        if box is not None and len(box) != 4:
            log.add("wrong 'bbox'", where, f"'bbox' has {len(box)} numbers, expected x, y, width, height")
        has_area = "area" in item
        area = log.field(item, "area", Real, where, "a number of pixels^2") if has_area else 0
        if len(log.problems) == before:
            rows.append(_Row(number, image_id, label, crowd, has_area, keypoints, box, area))
    return rows, other_categories


def _arrays(
    path: Path, rows: list[_Row], records: list[ImageRecord], num_keypoints: int, log: ProblemLog
) -> dict[str, Any]:
    """Return the arrays of `PoseAnnotations` for the rows without a problem."""
    columns = np.array([row[:5] for row in rows], dtype=np.int64).reshape(-1, 5)
    ids, image_ids, labels = columns[:, :3].T
    crowd, has_area = columns[:, 3:].T.astype(bool)
    keypoints, keypoints_wrong = _numbers([row.keypoints for row in rows], 3 * num_keypoints, MAX_COORDINATE)
    boxes, boxes_wrong = _numbers([row.box for row in rows], 4, MAX_COORDINATE)
    areas, areas_wrong = _numbers([[row.area] for row in rows], 1, MAX_COORDINATE**2)
    keypoints = keypoints.reshape(-1, num_keypoints, 3)
    areas = np.where(has_area, areas[:, 0], AREA_OF_BOX * boxes[:, 2] * boxes[:, 3])
    visibility = keypoints[..., 2]
    labelled = ~crowd & (visibility > 0).any(axis=1)

    finite = ~(keypoints_wrong | boxes_wrong | areas_wrong)
    check = RowCheck(log, lambda row: f"{path}: annotation {ids[row]}", finite)
    kind, flat = "not finite numbers", f"expected a flat list of finite numbers below {MAX_COORDINATE:g}"
    check.refuse(keypoints_wrong, kind, lambda row: f"'keypoints' is {short(rows[row].keypoints)}, {flat}")
    check.refuse(boxes_wrong, kind, lambda row: f"'bbox' is {short(rows[row].box)}, {flat}")
    check.visibility(visibility)
    check.extent(boxes[:, 2:], labelled, lambda row: f"'bbox' is {short(rows[row].box)}")
    area_wrong = areas_wrong | (finite & labelled & has_area & (areas <= 0))
    positive = "expected a positive number of pixels^2"
    check.refuse(area_wrong, "area not positive", lambda row: f"'area' is {short(rows[row].area)}, {positive}")

    keypoints[visibility == 0] = 0
    boxes[:, 2:] += boxes[:, :2]
    # Images with a problem of their own have no index: their people are left out.
    places = {record.id: index for index, record in enumerate(records)}
    index = np.array([places.get(image_id, -1) for image_id in image_ids.tolist()], dtype=np.int64)
    kept = ~check.wrong & (index >= 0)
    sides = np.array([min(record.width, record.height) for record in records] or [0])
    people = kept & labelled & (sides[index] > SMALLEST_SIDE)
    several = people & ((visibility > 0).sum(axis=1) > 1)  # a single keypoint may well be in the corner
    corners = {"keypoints": keypoints[several, :, :2].max(axis=(1, 2)), "bbox": boxes[people].max(axis=1)}
    for key, furthest in corners.items():
        if (count := int((furthest <= CORNER).sum())) * 2 > len(furthest):
            text = f"'{key}' of {count} of {len(furthest)} people lie within {CORNER} pixels of the image's corner"
            log.add("not pixels", str(path), f"{text}, expected pixels, not shares of the image's sides")
    return {
        "ids": ids[kept],
        "image_index": index[kept],
        "class_labels": labels[kept],
        "keypoints": keypoints[kept].astype(np.float32),
        "boxes": boxes[kept].astype(np.float32),
        "areas": areas[kept].astype(np.float32),
        "is_crowd": crowd[kept],
        "filled_areas": int((kept & ~has_area).sum()),
    }


def _numbers(rows: list[list[Any]], width: int, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return lists of `width` entries as (n, width) float64, and (n,) bool: not all entries are numbers below `limit`.

    Such rows become 0.
    """
    try:
        array = np.array(rows).reshape(len(rows), width)
    except ValueError:  # lists within lists
        array = np.array([])
    if array.dtype.kind not in "iuf" or not len(array):
        # One by one, to find the culprits: a single string makes an array of strings.
        array = np.full((len(rows), width), np.nan)
        for index, row in enumerate(rows):
            if all(isinstance(value, Real) for value in row):
                with suppress(OverflowError):
                    array[index] = row
    array = array.astype(np.float64)
    wrong = ~(np.abs(array) < limit).all(axis=1)  # also NaN
    array[wrong] = 0
    return array, wrong
