"""`hpetr data check`: everything that is wrong or odd in a data set at once, and what training makes of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hpetr.data.annotations import PoseAnnotations, Problem, read_annotations
from hpetr.data.dataset import (
    DatasetReport,
    ImageSizeError,
    PoseDataset,
    check_split,
    missing_images,
    read_image,
    select_people,
    skeleton_of,
    source_file,
)
from hpetr.data.yolo import read_yolo
from hpetr.errors import InputError
from hpetr.poses.skeleton import FALLBACK_SIGMA, known_skeleton, unpaired_sides

Level = Literal["error", "warning", "note"]
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]

# A keypoint is far from its box when it is further outside than this share of the box's longer side.
FAR_FROM_BOX = 0.5
# Two labels are of one person when their common keypoints are closer on average than this share of the area's root.
DUPLICATE_DISTANCE = 0.03


@dataclass(frozen=True)
class Finding:
    """Faults or facts of one kind: how many, and the first of them, one line each."""

    level: Level  # error: training refuses; warning: probably not meant; note: as it should be, but good to know
    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass
class CheckReport:
    """What `check_dataset` found."""

    source: Path
    content: DatasetReport  # of the valid annotations
    num_keypoints: int
    categories: list[str]
    findings: list[Finding] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether training takes the data set."""
        return not any(finding.level == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """The report as text: findings, errors first, then what training uses."""
        classes = ", ".join(self.categories)
        lines = [f"{self.source}: {classes}, {self.num_keypoints} keypoints"]
        for level in ("error", "warning", "note"):
            for finding in self.findings:
                if finding.level == level:
                    lines.append(f"{level}: {finding.kind}: {finding.count:,}")
                    lines += [f"    {example}" for example in finding.examples]
                    if finding.examples and finding.count > len(finding.examples):
                        lines.append(f"    and {finding.count - len(finding.examples):,} more")
        content = self.content
        if not self.accepted:
            errors = sum(finding.count for finding in self.findings if finding.level == "error")
            return [*lines, f"training refuses this data set: {errors:,} error{'s' if errors > 1 else ''}"]
        with_people = content.images - content.images_without_people
        lines.append(f"training uses {content.people:,} people in {with_people:,} images")
        left_out = [
            ("takes as background", content.images_without_people, "images without people"),
            (
                "ignores",
                content.people_without_keypoints + content.crowds - content.boxes_without_extent,
                "regions: crowds, and people without keypoints in their image",
            ),
            ("ignores", content.keypoints_outside, "keypoints outside their image"),
            ("skips", content.boxes_without_extent, "crowds or people without keypoints whose box has no extent"),
            ("skips", content.other_categories, "annotations of categories without keypoints"),
        ]
        found = [f"training {does} {count:,} {what}" for does, count, what in left_out if count]
        return [*lines, *(found or ["training leaves nothing out"])]


def check_dataset(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    split: str | None = None,
    decode: bool = True,
    examples: int = 3,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a data set by the rules of `open_dataset`, without stopping at the first problem.

    Args:
        path, images, split: see `open_dataset`.
        decode: read and decode every image, and look for equal ones; else only look whether they are there.
        examples: how many of each kind the report names.
        progress: called with the number of images, gives the context in which they are read; what that gives is
            called with 1 after each image.

    Raises:
        InputError: nothing can be said at all: see `read_annotations` and `read_yolo`.
    """
    source = source_file(path)
    check_split(source, split)
    loaded = read_annotations(source, images) if split is None else read_yolo(source, split, images)
    content = select_people(loaded).report
    names = [str(category.get("name", category["id"])) for category in loaded.categories]
    report = CheckReport(source, content, loaded.num_keypoints, names)
    problems = list(loaded.problems)
    missing: dict[int, Problem] = {}
    try:
        missing = missing_images(loaded)
    except InputError as error:
        decode = False
        problems.append(Problem("no folder of images", str(error)))
    problems += missing.values()
    findings = _Findings(loaded, examples)
    findings.skeleton(problems)
    findings.rows(content)
    if decode:
        there = [index for index in range(len(loaded.images)) if index not in missing]
        with progress(len(there)) if progress else nullcontext() as advance:
            problems += _decode(loaded, there, advance)
        findings.equal_images(there)
    report.findings = [*_grouped(problems, examples), *findings.found]
    return report


def _grouped(problems: Iterable[Problem], examples: int) -> list[Finding]:
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem.message)
    return [Finding("error", kind, len(lines), tuple(lines[:examples])) for kind, lines in kinds.items()]


def _image_paths(loaded: PoseAnnotations, indices: Iterable[int]) -> list[Path]:
    return [loaded.root / loaded.images[index].file_name for index in indices]


def _decode(loaded: PoseAnnotations, indices: list[int], advance: Callable[[int], None] | None) -> list[Problem]:
    """Read every image as training does; decoding releases Python's lock, so threads are enough."""

    def problem_of(index: int) -> Problem | None:
        record = loaded.images[index]
        try:
            read_image(loaded.root / record.file_name, record.width, record.height)
        except ImageSizeError as error:
            return Problem("image of another size", str(error))
        except InputError as error:
            return Problem("unreadable image", str(error))
        return None

    problems = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for problem in pool.map(problem_of, indices):
            if problem is not None:
                problems.append(problem)
            if advance is not None:
                advance(1)
    return problems


class _Findings:
    """Looks for what training accepts but nobody means, and counts the rest."""

    def __init__(self, loaded: PoseAnnotations, examples: int) -> None:
        self.loaded, self.examples = loaded, examples
        self.found: list[Finding] = []

    def add(self, level: Level, kind: str, count: int, examples: Iterable[str] = ()) -> None:
        if count:
            self.found.append(Finding(level, kind, count, tuple(examples)))

    def warn_rows(self, kind: str, rows: np.ndarray, text: Callable[[int], str]) -> None:
        """A warning about annotations, `rows` their indices."""
        first = rows[: self.examples].tolist()
        self.add("warning", kind, len(rows), (f"{self.loaded.place(row)}: {text(row)}" for row in first))

    def skeleton(self, problems: list[Problem]) -> None:
        """Faults of the skeleton go to `problems`."""
        path, category = self.loaded.path, self.loaded.category
        try:
            skeleton = skeleton_of(self.loaded)
        except InputError as error:
            problems.append(Problem("skeleton", str(error)))
            return
        if category.get("sigmas") is None and known_skeleton(skeleton.names) is None:
            text = f"every keypoint gets {FALLBACK_SIGMA}, so AP compares only with itself (see `hpetr data sigmas`)"
            self.add("warning", "no sigmas", 1, [f"{path}: {text}"])
        unpaired = unpaired_sides(skeleton)
        text = "a side in the name but no flip pair: a mirrored image keeps it as it is"
        self.add(
            "warning",
            "no flip pair",
            len(unpaired),
            (f"{path}: {name!r}: {text}" for name in unpaired[: self.examples]),
        )

    def rows(self, content: DatasetReport) -> None:
        loaded = self.loaded
        sizes = np.array([(r.width, r.height) for r in loaded.images], dtype=np.float32).reshape(-1, 2)
        limits = sizes[loaded.image_index]  # (A, 2)
        labelled = loaded.keypoints[..., 2] > 0  # (A, K)
        xy, near, far = loaded.keypoints[..., :2], loaded.boxes[:, None, :2], loaded.boxes[:, None, 2:]

        outside = labelled & ((xy < 0) | (xy > limits[:, None])).any(-1)
        names = loaded.category["keypoints"]

        def first_of(mask: np.ndarray) -> Callable[[int], str]:
            def text(row: int) -> str:
                index = int(mask[row].argmax())
                return f"{names[index]!r} at {xy[row, index, 0]:g}, {xy[row, index, 1]:g}"

            return text

        kind = "people with keypoints outside their image, taken as not labelled"
        self.warn_rows(kind, np.flatnonzero(outside.any(axis=1)), first_of(outside))
        gap = np.maximum(near - xy, xy - far).max(axis=-1)  # (A, K), above 0 outside the box
        longer = (loaded.boxes[:, 2:] - loaded.boxes[:, :2]).max(axis=1, initial=0)
        astray = labelled & ~outside & (gap > FAR_FROM_BOX * longer[:, None])
        kind = "people with keypoints far from their own box"
        self.warn_rows(kind, np.flatnonzero(astray.any(axis=1)), first_of(astray))
        # Half a pixel: rounded annotations.
        beyond = (loaded.boxes[:, :2] < -0.5).any(axis=1) | (loaded.boxes[:, 2:] > limits + 0.5).any(axis=1)
        self.warn_rows("boxes that reach outside their image, clipped", np.flatnonzero(beyond), self._box)
        pairs = duplicate_people(loaded)
        seconds = np.array(list(pairs), dtype=np.int64)
        text = "nearly the keypoints of {}"
        self.warn_rows("people labelled twice", seconds, lambda row: text.format(loaded.position(pairs[row])))
        without = ~loaded.is_crowd & ~labelled.any(axis=1)
        self.add("note", "people without keypoints, ignored in training", int(without.sum()))
        self.add("note", "crowd regions, ignored in training", content.crowds)
        self.add("note", "annotations without area, which get 0.53 times their box", content.filled_areas)
        self.add("note", "annotations of categories without keypoints, skipped", content.other_categories)

    def _box(self, row: int) -> str:
        record = self.loaded.images[self.loaded.image_index[row]]
        x1, y1, x2, y2 = self.loaded.boxes[row]
        return f"x {x1:g} to {x2:g}, y {y1:g} to {y2:g} in {record.width} x {record.height}"

    def equal_images(self, indices: list[int]) -> None:
        paths = _image_paths(self.loaded, indices)
        groups = equal_files(paths)
        lines = (", ".join(str(paths[index]) for index in group) for group in groups[: self.examples])
        self.add("warning", "groups of images with equal content", len(groups), lines)


def duplicate_people(loaded: PoseAnnotations) -> dict[int, int]:
    """Rows whose labels are nearly those of an earlier row of the same image, and that row.

    Of the keypoints that either has, at least half are labelled in both, and these are closer than 3% of the root of
    the area on average.
    """
    rows = np.flatnonzero(~loaded.is_crowd & (loaded.keypoints[..., 2] > 0).any(axis=1))
    rows = rows[np.argsort(loaded.image_index[rows], kind="stable")]
    pairs: dict[int, int] = {}
    ends = np.flatnonzero(np.diff(loaded.image_index[rows])) + 1
    for group in np.split(rows, ends):
        if len(group) < 2:
            continue
        labelled = loaded.keypoints[group, :, 2] > 0  # (n, K)
        xy = loaded.keypoints[group, :, :2]
        both = labelled[:, None] & labelled[None]  # (n, n, K)
        either = labelled[:, None] | labelled[None]
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)  # (n, n, K)
        mean = (distance * both).sum(-1) / np.maximum(both.sum(-1), 1)  # (n, n)
        scale = np.sqrt(loaded.areas[group])
        same = (both.sum(-1) * 2 >= either.sum(-1)) & (mean <= DUPLICATE_DISTANCE * np.minimum(scale, scale[:, None]))
        for second in range(1, len(group)):
            firsts = np.flatnonzero(same[second, :second])
            if len(firsts):
                pairs[int(group[second])] = int(group[firsts[0]])
    return pairs


def shared_images(train: Sequence[PoseDataset], val: PoseDataset) -> list[Path]:
    """The images of `val` that are also in `train`: the same file, or another one with the same content.

    Files that cannot be read are shared with nobody.
    """
    paths = [*val.image_paths, *(path for dataset in train for path in dataset.image_paths)]
    count = len(val)
    groups = equal_files(paths, lambda group: group[0] < count <= group[-1])
    return [paths[index] for index in sorted(index for group in groups for index in group if index < count)]


def equal_files(paths: Sequence[Path], wanted: Callable[[list[int]], bool] | None = None) -> list[list[int]]:
    """Groups of two or more indices of files with the same content, ascending.

    Args:
        paths: files; those that cannot be read are in no group.
        wanted: whether a group is of interest; contents are read of such groups only.
    """
    groups = [list(range(len(paths)))]
    # A file of the same size is nearly always another one, and a block from its middle tells that; few are read whole.
    for key in (_size, _middle, _content):
        split: list[list[int]] = []
        for group in groups:
            parts: dict[object, list[int]] = {}
            for index in group:
                value = key(paths[index])
                if value is not None:
                    parts.setdefault(value, []).append(index)
            split += [part for part in parts.values() if len(part) > 1 and (wanted is None or wanted(part))]
        groups = split
    return groups


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _middle(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            file.seek(os.fstat(file.fileno()).st_size // 2)
            return file.read(4096)
    except OSError:
        return None


def _content(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
