"""`hpetr data check`: all errors and doubtful facts of a data set at once, and the parts that training uses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from hpetr.data.annotations import PoseAnnotations, Problem
from hpetr.data.dataset import (
    NO_FLIPS,
    DatasetReport,
    ImageSizeError,
    PoseDataset,
    missing_images,
    read_image,
    select_people,
    skeleton_of,
)
from hpetr.data.readers import read_labels, source_file
from hpetr.errors import InputError
from hpetr.poses.skeleton import FALLBACK_SIGMA, known_skeleton, unpaired_sides

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]

# A keypoint is far from its box when it is further outside than this share of the box's longer side.
FAR_FROM_BOX = 0.5
# Two labels are of one person when their common keypoints are closer on average than this share of the area's root.
DUPLICATE_DISTANCE = 0.03


@dataclass(frozen=True)
class Finding:
    """Faults or facts of one kind: their number, and a line for each of the first."""

    level: Level  # error: training refuses; warning: probably a mistake; note: intended, but good to know
    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass
class CheckReport:
    """The findings of `check_dataset`."""

    source: Path
    content: DatasetReport  # of the valid annotations
    num_keypoints: int
    categories: list[str]
    findings: list[Finding] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Whether training accepts the data set."""
        return not any(finding.level == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """Return the report as text: findings, errors first, then the parts that training uses."""
        lines = [f"{self.source}: {', '.join(self.categories)}, {self.num_keypoints} keypoints"]
        for finding in sorted(self.findings, key=lambda finding: LEVELS.index(finding.level)):
            lines.append(f"{finding.level}: {finding.kind}: {finding.count:,}")
            lines += [f"    {example}" for example in finding.examples]
            if finding.examples and finding.count > len(finding.examples):
                lines.append(f"    and {finding.count - len(finding.examples):,} more")
        content = self.content
        if not self.accepted:
            errors = sum(finding.count for finding in self.findings if finding.level == "error")
            return [*lines, f"training refuses this data set: {errors:,} error{'s' if errors > 1 else ''}"]
        with_people = content.images - content.images_without_people
        lines.append(f"training uses {content.people:,} people in {with_people:,} images")
        ignored = content.people_without_keypoints + content.crowds - content.boxes_without_extent
        left_out = [
            ("takes as background", content.images_without_people, "images without people"),
            ("ignores", ignored, "regions: crowds, and people without keypoints in their image"),
            ("ignores", content.keypoints_outside, "keypoints outside their image"),
            ("skips", content.boxes_without_extent, "crowds or people without keypoints whose box has no extent"),
            ("skips", content.other_categories, "annotations of categories without keypoints"),
        ]
        found = [f"training {verb} {count:,} {objects}" for verb, count, objects in left_out if count]
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
        path: see `open_dataset`.
        images: see `open_dataset`.
        split: see `open_dataset`.
        decode: decode every image, and find equal ones; else only check that they exist.
        examples: maximum number of examples of each kind.
        progress: called with the number of images, returns the context in which they are read; its value is called
            with 1 after each image.

    Raises:
        InputError: the annotations cannot be read at all: see `read_coco` and `read_yolo`.
    """
    source = source_file(path)
    loaded = read_labels(source, images, split)
    content = select_people(loaded).report
    names = [str(category.get("name", category["id"])) for category in loaded.categories]
    findings = _Findings(loaded, examples)
    problems = list(loaded.problems)
    missing: dict[int, Problem] = {}
    try:
        missing = missing_images(loaded)
    except InputError as error:
        decode = False
        problems.append(Problem("no folder of images", str(error)))
    problems += missing.values()
    problems += findings.add_skeleton()
    findings.add_rows(content)
    if decode:
        there = [index for index in range(len(loaded.images)) if index not in missing]
        with progress(len(there)) if progress else nullcontext() as advance:
            problems += _decode(loaded, there, advance)
        findings.add_equal_images(there)
    findings.add_problems("error", problems)
    return CheckReport(source, content, loaded.num_keypoints, names, findings.found)


def _decode(loaded: PoseAnnotations, indices: list[int], advance: Callable[[int], None] | None) -> list[Problem]:
    """Read every image as training does; decoding releases Python's lock, so threads are enough."""

    def problem_of(index: int) -> Problem | None:
        record = loaded.images[index]
        try:
            read_image(loaded.root / record.file_name, record.width, record.height)
        except InputError as error:
            of_size = isinstance(error, ImageSizeError)
            return Problem("image of another size" if of_size else "unreadable image", str(error))
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
    """Valid annotations that are probably mistakes, and counts of the others."""

    def __init__(self, loaded: PoseAnnotations, examples: int) -> None:
        self.loaded, self.examples = loaded, examples
        self.found: list[Finding] = []

    def add(self, level: Level, kind: str, count: int, examples: Iterable[str] = ()) -> None:
        if count:
            self.found.append(Finding(level, kind, count, tuple(islice(examples, self.examples))))

    def add_problems(self, level: Level, problems: Iterable[Problem]) -> None:
        """Add a finding for each kind."""
        kinds: dict[str, list[str]] = {}
        for problem in problems:
            kinds.setdefault(problem.kind, []).append(problem.message)
        for kind, messages in kinds.items():
            self.add(level, kind, len(messages), messages)

    def warn_rows(self, kind: str, mask: np.ndarray, text: Callable[[int], str]) -> None:
        """Add a warning for annotations, `mask` (A,) bool."""
        rows = np.flatnonzero(mask)
        self.add("warning", kind, len(rows), (f"{self.loaded.place(row)}: {text(row)}" for row in rows.tolist()))

    def add_skeleton(self) -> list[Problem]:
        """Add warnings about the skeleton, and return its faults."""
        path, category = self.loaded.path, self.loaded.categories[0]
        try:
            skeleton = skeleton_of(self.loaded)
        except InputError as error:
            return [Problem("skeleton", str(error))]
        if category.get("sigmas") is None and known_skeleton(skeleton.names) is None:
            text = f"every keypoint gets {FALLBACK_SIGMA}, so AP compares only with itself (see `hpetr data sigmas`)"
            self.add("warning", "no sigmas", 1, [f"{path}: {text}"])
        if not skeleton.can_flip:
            self.add("warning", "no flip pairs", 1, [f"{path}: {NO_FLIPS}"])
            return []
        unpaired = unpaired_sides(skeleton)
        text = "a side in the name but no flip pair: it does not move in a mirrored image"
        self.add("warning", "no flip pair", len(unpaired), (f"{path}: {name!r}: {text}" for name in unpaired))
        return []

    def add_rows(self, content: DatasetReport) -> None:
        """Add warnings and notes about images and annotations."""
        loaded = self.loaded
        self.add_problems("warning", loaded.warnings)
        sizes = np.array([(r.width, r.height) for r in loaded.images], dtype=np.float32).reshape(-1, 2)
        limits = sizes[loaded.image_index]  # (A, 2)
        labelled = loaded.keypoints[..., 2] > 0  # (A, K)
        xy, near, far = loaded.keypoints[..., :2], loaded.boxes[:, None, :2], loaded.boxes[:, None, 2:]
        outside = labelled & ((xy < 0) | (xy > limits[:, None])).any(-1)
        gap = np.maximum(near - xy, xy - far).max(axis=-1)  # (A, K), above 0 outside the box
        longer = (loaded.boxes[:, 2:] - loaded.boxes[:, :2]).max(axis=1, initial=0)
        astray = labelled & ~outside & (gap > FAR_FROM_BOX * longer[:, None])
        for kind, mask in (
            ("people with keypoints outside their image, taken as not labelled", outside),
            ("people with keypoints far from their own box", astray),
        ):
            self.warn_rows(kind, mask.any(axis=1), partial(self._first_keypoint, mask))
        # Half a pixel: rounded annotations.
        beyond = (loaded.boxes[:, :2] < -0.5).any(axis=1) | (loaded.boxes[:, 2:] > limits + 0.5).any(axis=1)
        self.warn_rows("boxes that reach outside their image, clipped", beyond, self._box)
        pairs = duplicate_people(loaded)
        second = np.isin(np.arange(len(loaded.ids)), list(pairs))
        text = "nearly the keypoints of {}"
        self.warn_rows("people labelled twice", second, lambda row: text.format(loaded.position(pairs[row])))
        without = int((~loaded.is_crowd & ~labelled.any(axis=1)).sum())
        if not content.people and not loaded.problems:
            text = f"{loaded.path}: no person with labelled keypoints, training on this data set alone is refused"
            self.add("warning", "no people", 1, [text])
        self.add("note", "people without keypoints, ignored in training", without)
        self.add("note", "crowd regions, ignored in training", content.crowds)
        self.add("note", "annotations without area, which get 0.53 times their box", content.filled_areas)
        self.add("note", "annotations of categories without keypoints, skipped", content.other_categories)

    def _first_keypoint(self, mask: np.ndarray, row: int) -> str:
        index = int(mask[row].argmax())
        x, y = self.loaded.keypoints[row, index, :2]
        return f"{self.loaded.categories[0]['keypoints'][index]!r} at {x:g}, {y:g}"

    def _box(self, row: int) -> str:
        record = self.loaded.images[self.loaded.image_index[row]]
        x1, y1, x2, y2 = self.loaded.boxes[row]
        return f"x {x1:g} to {x2:g}, y {y1:g} to {y2:g} in {record.width} x {record.height}"

    def add_equal_images(self, indices: list[int]) -> None:
        """Add a warning about images with the same content."""
        paths = [self.loaded.root / self.loaded.images[index].file_name for index in indices]
        groups = equal_files(paths)
        lines = (", ".join(str(paths[index]) for index in group) for group in groups)
        self.add("warning", "groups of images with equal content", len(groups), lines)


def duplicate_people(loaded: PoseAnnotations) -> dict[int, int]:
    """Return rows whose labels are nearly those of an earlier row of the same image, and that row.

    Of the keypoints that either has, at least half are labelled in both, and these are closer than 3% of the root of
    the area on average.
    """
    rows = np.flatnonzero(~loaded.is_crowd & (loaded.keypoints[..., 2] > 0).any(axis=1))
    rows = rows[np.argsort(loaded.image_index[rows], kind="stable")]
    pairs: dict[int, int] = {}
    ends = np.flatnonzero(np.diff(loaded.image_index[rows])) + 1
    for group in np.split(rows, ends):
        labelled = loaded.keypoints[group, :, 2] > 0  # (n, K)
        xy = loaded.keypoints[group, :, :2]
        both = (labelled[:, None] & labelled).sum(-1)  # (n, n)
        either = (labelled[:, None] | labelled).sum(-1)
        distance = np.linalg.norm(xy[:, None] - xy, axis=-1) * (labelled[:, None] & labelled)  # (n, n, K)
        scale = np.sqrt(loaded.areas[group])
        near = distance.sum(-1) / np.maximum(both, 1) <= DUPLICATE_DISTANCE * np.minimum(scale, scale[:, None])
        earlier = np.tril((both * 2 >= either) & near, -1)  # (n, n)
        for second in np.flatnonzero(earlier.any(axis=1)):
            pairs[int(group[second])] = int(group[earlier[second].argmax()])
    return pairs


def shared_images(train: Sequence[PoseDataset], val: PoseDataset) -> list[Path]:
    """Return the images of `val` that are also in `train`: the same file, or another one with the same content.

    Files that cannot be read are left out.
    """
    paths = [*val.image_paths, *(path for dataset in train for path in dataset.image_paths)]
    count = len(val)
    groups = equal_files(paths, lambda group: group[0] < count <= group[-1])
    return [paths[index] for index in sorted(index for group in groups for index in group if index < count)]


def equal_files(paths: Sequence[Path], wanted: Callable[[list[int]], bool] = lambda group: True) -> list[list[int]]:
    """Return groups of two or more indices of files with the same content, ascending.

    Args:
        paths: files; those that cannot be read are in no group.
        wanted: whether a group is of interest; contents are read of such groups only.
    """
    groups = [list(range(len(paths)))]
    # Files of one size mostly differ in a block from their middle; few are read whole.
    for key in (_size, _middle, _content):
        split: list[list[int]] = []
        for group in groups:
            parts: dict[object, list[int]] = {}
            for index in group:
                with suppress(OSError), open(paths[index], "rb") as file:
                    parts.setdefault(key(file), []).append(index)
            split += [part for part in parts.values() if len(part) > 1 and wanted(part)]
        groups = split
    return groups


def _size(file: BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


def _middle(file: BufferedReader) -> bytes:
    file.seek(_size(file) // 2)
    return file.read(4096)


def _content(file: BufferedReader) -> bytes:
    return hashlib.file_digest(file, "sha256").digest()
