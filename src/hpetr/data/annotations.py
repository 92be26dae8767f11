"""Labelled people in the one form that every label format is read into, and the rules that all of them obey."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpetr.errors import InputError

# The mean ratio of a COCO person's segmented area to that of the box; the scale of OKS when a file gives no area.
AREA_OF_BOX = 0.53
# Pixels. Squares of larger coordinates leave float32.
MAX_COORDINATE = 1e9


@dataclass(frozen=True)
class Problem:
    """A fault that training refuses, or a doubtful fact that it reports.

    Attributes:
        kind: the same for like faults.
        message: one line with the file, the place, the field and the expected value.
    """

    kind: str
    message: str


class ProblemLog:
    """The problems of one data set."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, kind: str, where: str, text: str) -> None:
        """Add a problem; `text` names the field and the expected value."""
        self.problems.append(Problem(kind, f"{where}: {text}"))

    def field(self, item: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
        """Return item[key], or add a problem and return None if it is missing, of another type or beyond 64 bits."""
        value: Any = item.get(key)
        valid = isinstance(value, kind) and not isinstance(value, bool)
        if valid and not (kind is int and abs(value) >= 2**63):
            return value
        if key in item:
            self.add(f"wrong '{key}'", where, f"'{key}' is {short(value)}, expected {expected}")
        else:
            self.add(f"missing '{key}'", where, f"field '{key}' is missing, expected {expected}")
        return None

    def flag(self, item: Mapping[str, Any], key: str, where: str) -> bool:
        """Return the truth of item[key], false if it is missing; add a problem if it is not a plain yes or no."""
        value = item.get(key)
        if value is None or (isinstance(value, (int, float)) and value in (0, 1)):
            return bool(value)
        self.add(f"wrong '{key}'", where, f"'{key}' is {short(value)}, expected 0, 1, true, false or null")
        return False


class RowCheck:
    """The rules that annotations of any format obey, applied to all rows at once.

    Args:
        log: receives the problems.
        place: returns the place of row i.
        finite: (A,) rows whose numbers can be judged; the others have a problem of their own.

    Attributes:
        wrong: (A,) rows with a problem.
    """

    def __init__(self, log: ProblemLog, place: Callable[[int], str], finite: np.ndarray) -> None:
        self.log, self.place, self.finite = log, place, finite
        self.wrong = ~finite

    def refuse(self, mask: np.ndarray, kind: str, text: Callable[[int], str]) -> None:
        """Add a problem for each row of `mask`."""
        for row in np.flatnonzero(mask).tolist():
            self.log.add(kind, self.place(row), text(row))
        self.wrong = self.wrong | mask

    def visibility(self, values: np.ndarray) -> None:
        """Refuse rows of `values` (A, K) other than 0, 1 or 2."""
        known = np.isin(values, (0, 1, 2)).all(axis=1)
        text = "'keypoints' has a visibility other than 0, 1, 2"
        self.refuse(self.finite & ~known, "wrong visibility", lambda _: text)

    def extent(self, sizes: np.ndarray, labelled: np.ndarray, shown: Callable[[int], str]) -> None:
        """Refuse a negative width or height (A, 2), and 0 for a person with keypoints (A,): COCO has other zeros."""
        smallest = sizes.min(axis=1, initial=np.inf)
        empty = (smallest < 0) | (labelled & (smallest == 0))
        expected = "expected a positive width and height"
        self.refuse(self.finite & empty, "box without extent", lambda row: f"{shown(row)}, {expected}")


def raise_first(problems: Sequence[Problem]) -> None:
    """Raise the first problem, if any, as InputError that counts the others."""
    if problems:
        more = f" (and {len(problems) - 1} more: `hpetr data check` lists them)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0].message}{more}")


def short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
    root: Path  # folder of the images, which may be missing
    images: list[ImageRecord]
    categories: list[dict[str, Any]]  # those with keypoints, in the file's order: index = class label
    ids: np.ndarray  # (A,) int64
    image_index: np.ndarray  # (A,) int64, row in `images`
    class_labels: np.ndarray  # (A,) int64
    keypoints: np.ndarray  # (A, K, 3) float32 x, y in pixels, visibility 0, 1, 2; 0, 0, 0 if not labelled
    boxes: np.ndarray  # (A, 4) float32 x1, y1, x2, y2 in pixels
    areas: np.ndarray  # (A,) float32 pixels^2
    is_crowd: np.ndarray  # (A,) bool
    filled_areas: int  # annotations without `area`, which got AREA_OF_BOX times their box
    other_categories: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)  # accepted, but probably mistakes

    @property
    def num_keypoints(self) -> int:
        """K, the same for all categories."""
        return len(self.categories[0]["keypoints"])

    def place(self, row: int) -> str:
        """Return the file and the position of annotation `row`."""
        return f"{self.path}: {self.position(row)}"

    def position(self, row: int) -> str:
        """Return the position of annotation `row` in its file."""
        return f"annotation {self.ids[row]}"


def coco_form(loaded: PoseAnnotations) -> dict[str, Any]:
    """Return the annotations as the content of a COCO keypoint JSON."""
    annotations = [
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
        for row, (box, keypoints) in enumerate(zip(loaded.boxes.astype(np.float64), loaded.keypoints, strict=True))
    ]
    images = [vars(record).copy() for record in loaded.images]
    return {"images": images, "annotations": annotations, "categories": loaded.categories}
