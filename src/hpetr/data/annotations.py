"""COCO keypoint JSON, read and checked: whoever trains, evaluates or asks `hpetr data check` gets the same problems."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from hpetr.errors import InputError
from hpetr.poses.skeleton import is_text

# The mean ratio of a COCO person's segmented area to that of the box; the scale of OKS when a file gives no area.
AREA_OF_BOX = 0.53


@dataclass(frozen=True)
class Problem:
    """A fault that training refuses. `kind` is the same for like faults; `message`, one line, names file, place, field
    and what was expected."""

    kind: str
    message: str


class ProblemLog:
    """Collects the problems of one data set."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, kind: str, where: str, text: str) -> None:
        """`text` says which field and what was expected."""
        self.problems.append(Problem(kind, f"{where}: {text}"))

    def field(
        self, item: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, expected: str
    ) -> Any | None:
        """item[key], or None with a problem added where it is missing or of another type; whole numbers fit 64 bits."""
        value: Any = item.get(key)
        valid = isinstance(value, kind) and not isinstance(value, bool)
        if valid and not (kind is int and abs(value) >= 2**63):
            return value
        if key in item:
            self.add(f"wrong '{key}'", where, f"'{key}' is {short(value)}, expected {expected}")
        else:
            self.add(f"missing '{key}'", where, f"field '{key}' is missing, expected {expected}")
        return None


class RowCheck:
    """The rules that annotations of any format obey, for all rows at once; `wrong` (A,) marks the rows that do not.

    Args:
        log: where the problems go.
        place: says where row i is.
        finite: (A,) rows whose numbers can be judged; the others have a problem of their own.
    """

    def __init__(self, log: ProblemLog, place: Callable[[int], str], finite: np.ndarray) -> None:
        self.log, self.place, self.finite = log, place, finite
        self.wrong = ~finite

    def refuse(self, mask: np.ndarray, kind: str, text: Callable[[int], str]) -> None:
        """A problem for each row of `mask`."""
        for row in np.flatnonzero(mask).tolist():
            self.log.add(kind, self.place(row), text(row))
        self.wrong = self.wrong | mask

    def visibility(self, values: np.ndarray) -> None:
        """`values` (A, K) are 0, 1 or 2."""
        known = ((values == 0) | (values == 1) | (values == 2)).all(axis=1)
        self.refuse(
            self.finite & ~known, "wrong visibility", lambda _: "'keypoints' has a visibility other than 0, 1, 2"
        )

    def extent(self, sizes: np.ndarray, labelled: np.ndarray, shown: Callable[[int], str]) -> None:
        """Width and height (A, 2) are not negative, and not 0 for a person with keypoints (A,): COCO has others."""
        smallest = sizes.min(axis=1, initial=np.inf)
        empty = (smallest < 0) | (labelled & (smallest == 0))
        expected = "expected a positive width and height"
        self.refuse(self.finite & empty, "box without extent", lambda row: f"{shown(row)}, {expected}")


def raise_first(problems: Sequence[Problem]) -> None:
    """Raise the first problem, if any, as InputError that says how many more there are."""
    if problems:
        more = f" (and {len(problems) - 1} more: `hpetr data check` lists them)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0].message}{more}")


@dataclass(frozen=True)
class ImageRecord:
    """An image: `file_name` relative to the folder of the images, width and height in pixels."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass
class PoseAnnotations:
    """The people of a data set as arrays, one row each, in the order of the files; rows with a problem are left out.

    Annotations of categories without keypoints are left out and counted in `other_categories`.
    """

    path: Path  # the file that describes the data set
    root: Path  # folder of the images; not necessarily there
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
    problems: list[Problem] = field(default_factory=list)

    @property
    def category(self) -> dict[str, Any]:
        """The first category with keypoints; all have the same number of them."""
        return self.categories[0]

    @property
    def num_keypoints(self) -> int:
        """K."""
        return len(self.category["keypoints"])

    def place(self, row: int) -> str:
        """Where annotation `row` is: file and position."""
        return f"{self.file_of(row)}: {self.position(row)}"

    def file_of(self, row: int) -> str:
        """The file that annotation `row` is in."""
        return str(self.path)

    def position(self, row: int) -> str:
        """Where in its file annotation `row` is."""
        return f"annotation {self.ids[row]}"


def load_annotations(path: str | os.PathLike[str]) -> PoseAnnotations:
    """Read a COCO keypoint JSON that has to be right.

    Raises:
        InputError: the first problem of `read_annotations`, in one line: the file, the annotation's id, the field and
            what was expected of it, and how many more there are.
    """
    loaded = read_annotations(path)
    raise_first(loaded.problems)
    return loaded


def read_annotations(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> PoseAnnotations:
    """Read a COCO keypoint JSON (CrowdPose's is one) and collect its problems.

    Expected are `images` (id, file_name, width, height), `annotations` (id, image_id, category_id, bbox, keypoints;
    optional iscrowd, and area, else 0.53 times the box) and `categories` with `keypoints`, the list of names.
    `num_keypoints` is not read: visibilities above 0 are counted. A crowd (`iscrowd: 1`) needs no keypoints.

    Args:
        path: the JSON.
        images: folder of the images, which is not looked into; None takes `images` beside the JSON.

    Returns:
        What is right; what is not is in `problems`.

    Raises:
        InputError: nothing can be said about the annotations: no JSON, no images, or no usable categories.
    """
    path = Path(path)
    with _without_garbage_collection():
        data = read_json(path)
        log = ProblemLog()
        records, image_ids = _read_images(path, data["images"], log)
        categories = _read_categories(path, data["categories"])
        category_ids = {item["id"] for item in data["categories"]}
        rows = _Rows(path, len(categories[0]["keypoints"]), log)
        labels = {category["id"]: label for label, category in enumerate(categories)}
        other_categories = rows.collect(data["annotations"], image_ids, category_ids, labels)
        return PoseAnnotations(
            path=path,
            root=path.parent / "images" if images is None else Path(images),
            images=records,
            categories=categories,
            **rows.arrays({record.id: index for index, record in enumerate(records)}),
            other_categories=other_categories,
            problems=log.problems,
        )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of small objects, none of them garbage: looking for it takes a third of the time of a large JSON."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a COCO JSON; that it has the three lists of objects is all that is checked.

    Raises:
        InputError: it cannot be read or is something else.
    """
    try:
        with _without_garbage_collection():
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


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_images(path: Path, items: list[dict[str, Any]], log: ProblemLog) -> tuple[list[ImageRecord], set[int]]:
    """The valid records, and the ids of all: a fault of an image is not one of each of its annotations."""
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
    categories = [item for item in items if item.get("keypoints")]
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


class _Rows:
    """Annotations on their way from dicts to arrays: types and ids one by one, then all numbers at once."""

    def __init__(self, path: Path, num_keypoints: int, log: ProblemLog) -> None:
        self.path, self.num_keypoints, self.log = path, num_keypoints, log
        self.columns: list[tuple[int, int, int, bool]] = []  # id, image id, class label, crowd
        self.keypoints: list[list[Any]] = []
        self.boxes: list[list[Any]] = []
        self.areas: list[list[Any]] = []
        self.has_area: list[bool] = []

    def collect(
        self,
        items: list[dict[str, Any]],
        image_ids: set[int],
        category_ids: set[int],
        labels: Mapping[int, int],
    ) -> int:
        """Take the annotations that can become rows; returns the number of those of other categories."""
        log, other_categories = self.log, 0
        seen: set[int] = set()
        for position, item in enumerate(items):
            before = len(log.problems)
            annotation_id = log.field(item, "id", int, f"{self.path}: annotations[{position}]", "a whole number")
            where = f"{self.path}: annotation {annotation_id}"
            if annotation_id is None:
                continue
            if annotation_id in seen:
                log.add("duplicate annotation id", where, "'id' occurs twice, expected distinct ids")
            seen.add(annotation_id)
            image_id = log.field(item, "image_id", int, where, "the id of an entry of 'images'")
            if image_id is not None and image_id not in image_ids:
                log.add("unknown image", where, f"'image_id' is {image_id}, expected the id of an entry of 'images'")
            category_id = log.field(item, "category_id", int, where, "the id of an entry of 'categories'")
            if category_id is not None and category_id not in category_ids:
                text = f"'category_id' is {category_id}, expected the id of an entry of 'categories'"
                log.add("unknown category", where, text)
            if category_id in category_ids and category_id not in labels:
                other_categories += 1
                continue
            crowd = bool(item.get("iscrowd", 0))
            keypoints, box, area = self._lists(item, crowd, where)
            if len(log.problems) > before or image_id is None or category_id is None:
                continue
            self.columns.append((annotation_id, image_id, labels[category_id], crowd))
            self.keypoints.append(keypoints)
            self.boxes.append(box)
            self.areas.append(area)
            self.has_area.append("area" in item)
        return other_categories

    def _lists(self, item: Mapping[str, Any], crowd: bool, where: str) -> tuple[list[Any], list[Any], list[Any]]:
        """The numbers of an annotation, of the right number. A crowd's keypoints (if any) belong to nobody."""
        log, count = self.log, 3 * self.num_keypoints
        keypoints: list[Any] = [0] * count
        if not crowd or item.get("keypoints"):
            expected = f"{count} numbers, x, y, visibility of {self.num_keypoints} keypoints"
            keypoints = log.field(item, "keypoints", list, where, expected) or []
            if len(keypoints) != count and isinstance(item.get("keypoints"), list):
                text = f"'keypoints' has {len(keypoints)} numbers, expected {expected}"
                log.add("wrong number of keypoints", where, text)
        box = log.field(item, "bbox", list, where, "x, y, width, height") or []
        if len(box) != 4 and isinstance(item.get("bbox"), list):
            log.add("wrong 'bbox'", where, f"'bbox' has {len(box)} numbers, expected x, y, width, height")
        area = log.field(item, "area", Real, where, "a number of pixels^2") if "area" in item else 0
        return keypoints, box, [area]

    def arrays(self, image_index: Mapping[int, int]) -> dict[str, Any]:
        """The arrays of `PoseAnnotations`, of rows without a problem."""
        columns = np.array(self.columns, dtype=np.int64).reshape(-1, 4)
        ids, crowd = columns[:, 0], columns[:, 3].astype(bool)
        has_area = np.array(self.has_area, dtype=bool)
        keypoints, keypoints_wrong = _numbers(self.keypoints, 3 * self.num_keypoints)
        boxes, boxes_wrong = _numbers(self.boxes, 4)  # x, y, width, height
        areas, areas_wrong = _numbers(self.areas, 1)
        keypoints = keypoints.reshape(-1, self.num_keypoints, 3)
        areas = np.where(has_area, areas[:, 0], AREA_OF_BOX * boxes[:, 2] * boxes[:, 3])
        visibility = keypoints[..., 2]
        labelled = ~crowd & (visibility > 0).any(axis=1)

        flat = "expected a flat list of finite numbers"
        check = RowCheck(
            self.log,
            lambda row: f"{self.path}: annotation {ids[row]}",
            ~(keypoints_wrong | boxes_wrong | areas_wrong),
        )
        kind = "not finite numbers"
        check.refuse(keypoints_wrong, kind, lambda row: f"'keypoints' is {short(self.keypoints[row])}, {flat}")
        check.refuse(boxes_wrong, kind, lambda row: f"'bbox' is {short(self.boxes[row])}, {flat}")
        check.visibility(visibility)
        check.extent(boxes[:, 2:], labelled, lambda row: f"'bbox' is {short(self.boxes[row])}")
        area_wrong = areas_wrong | (check.finite & labelled & has_area & (areas <= 0))
        positive = "expected a positive number of pixels^2"
        check.refuse(area_wrong, "area not positive", lambda row: f"'area' is {short(self.areas[row][0])}, {positive}")

        keypoints[visibility == 0] = 0
        boxes[:, 2:] += boxes[:, :2]
        # Images with a problem of their own are not in image_index: neither are their people rows.
        index = np.array([image_index.get(image_id, -1) for image_id in columns[:, 1].tolist()], dtype=np.int64)
        kept = ~check.wrong & (index >= 0)
        return {
            "ids": ids[kept],
            "image_index": index[kept],
            "class_labels": columns[kept, 2],
            "keypoints": keypoints[kept].astype(np.float32),
            "boxes": boxes[kept].astype(np.float32),
            "areas": areas[kept].astype(np.float32),
            "is_crowd": crowd[kept],
            "filled_areas": int((kept & ~has_area).sum()),
        }


def _numbers(rows: list[list[Any]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of `width` entries as (n, width) float64, and which (n,) are not all finite numbers; those become 0."""
    try:
        array = np.array(rows).reshape(len(rows), width)
    except ValueError:  # lists within lists
        array = np.array([])
    if array.dtype.kind not in "iuf" or not len(array):
        # One by one, to find the culprits: a single string makes an array of strings.
        array = np.full((len(rows), width), np.nan)
        for index, row in enumerate(rows):
            if all(isinstance(value, Real) for value in row):
                try:
                    array[index] = row
                except OverflowError:
                    continue
    array = array.astype(np.float64)
    wrong = ~np.isfinite(array).all(axis=1)
    array[wrong] = 0
    return array, wrong
