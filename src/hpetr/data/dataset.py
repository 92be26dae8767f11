"""Data sets of images with poses, in any label format."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from hpetr.data.annotations import PoseAnnotations, Problem, coco_form, raise_first
from hpetr.data.readers import read_labels, reader_of, source_file
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.images.read import load_image
from hpetr.poses.skeleton import Skeleton

NO_FLIPS = "images are not flipped in training: no flip pairs, expected 'flip_idx' or left and right in keypoint names"


@dataclass(frozen=True)
class DatasetReport:
    """Counts of the content of a data set, and of the parts that training leaves out."""

    images: int
    images_without_people: int
    people: int
    people_without_keypoints: int  # ignored regions in training
    crowds: int  # ignored regions in training
    boxes_without_extent: int  # of crowds or people without keypoints: of no use
    keypoints_outside: int  # labelled outside their image, taken as not labelled
    filled_areas: int  # no `area` in the file: 0.53 times the box
    other_categories: int  # annotations of categories without keypoints, left out

    def __str__(self) -> str:
        """Return one line: images and people, and the other counts above 0."""
        counts = ((field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{count:,} {name}" for name, count in counts if count or name in ("images", "people"))


@dataclass(frozen=True)
class SelectedPeople:
    """The part of `PoseAnnotations` that training uses, in the order of the images.

    Boxes are clipped to their image, keypoints outside it are 0, 0, 0.
    """

    keypoints: np.ndarray  # (A, K, 3) float32
    boxes: np.ndarray  # (A, 4) float32 x1, y1, x2, y2
    areas: np.ndarray  # (A,) float32
    class_labels: np.ndarray  # (A,) int64
    is_person: np.ndarray  # (A,) bool
    is_ignored: np.ndarray  # (A,) bool; some rows are neither
    starts: np.ndarray  # (N + 1,) int64: rows of image i are starts[i] to starts[i + 1]
    report: DatasetReport


def select_people(
    loaded: PoseAnnotations, limit: int | None = None, area_of_box: float | None = None
) -> SelectedPeople:
    """Divide the annotations of the first `limit` images into people, ignored regions and useless ones."""
    records = loaded.images[:limit]
    order = np.argsort(loaded.image_index, kind="stable")
    order = order[loaded.image_index[order] < len(records)]
    image = loaded.image_index[order]
    sizes = np.array([(record.width, record.height) for record in records], dtype=np.float32).reshape(-1, 2)
    keypoints = loaded.keypoints[order]
    xy = keypoints[..., :2]
    outside = ((xy < 0) | (xy > sizes[image, None])).any(-1)  # (A, K)
    keypoints[outside] = 0
    whole_boxes = loaded.boxes[order]
    boxes = whole_boxes.clip(0, np.tile(sizes[image], 2))  # (A, 4)
    has_extent = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    crowd = loaded.is_crowd[order]
    labelled = (keypoints[..., 2] > 0).any(axis=1)
    is_person = ~crowd & labelled
    areas = loaded.areas[order]
    if area_of_box is not None:
        areas = np.float32(area_of_box) * np.prod(whole_boxes[:, 2:] - whole_boxes[:, :2], axis=1)
    report = DatasetReport(
        images=len(records),
        images_without_people=len(records) - len(np.unique(image[is_person])),
        people=int(is_person.sum()),
        people_without_keypoints=int((~crowd & ~labelled).sum()),
        crowds=int(crowd.sum()),
        boxes_without_extent=int((~is_person & ~has_extent).sum()),
        keypoints_outside=int(outside.sum()),
        filled_areas=loaded.filled_areas if area_of_box is None else 0,
        other_categories=loaded.other_categories,
    )
    return SelectedPeople(
        keypoints=keypoints,
        boxes=boxes,
        areas=areas,
        class_labels=loaded.class_labels[order],
        is_person=is_person,
        is_ignored=~is_person & has_extent,
        starts=np.searchsorted(image, np.arange(len(records) + 1)),
        report=report,
    )


class ImageSizeError(InputError):
    """An image has another size than its annotation."""


def read_image(path: str | os.PathLike[str], width: int, height: int) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB.

    Raises:
        InputError: the image cannot be read, or (ImageSizeError) is not of the annotated size.
    """
    image = load_image(path)
    if image.shape[:2] != (height, width):
        raise ImageSizeError(
            f"{path}: is {image.shape[1]} x {image.shape[0]} pixels, "
            f"expected {width} x {height} as annotated (EXIF orientation is applied)"
        )
    return image


class PoseDataset(Dataset[Sample]):
    """Images and the poses in them; `open_dataset` makes one from a file.

    People are annotations with at least one labelled keypoint inside the image; crowds and people without one are
    the sample's `ignore_boxes`. Images without people are kept: they show background.

    Args:
        loaded: annotations without problems.
        skeleton: replaces the one that the keypoint categories describe.
        limit: only the first `limit` images.
        area_of_box: the area of every person is this share of its box, whatever the file says.
        ground_truth: returns the value of the method `ground_truth`; None takes the annotations in COCO's form.

    Attributes:
        path: the file that describes the data set.
        skeleton: the keypoints.
        category: the first category with keypoints, in COCO's form.
        class_names: names of all categories with keypoints, by class label.
        report: counts of the content; those of other categories and filled areas are of the whole file.
        warnings: one line for each kind of probable mistake.

    Raises:
        InputError: an image is missing, or the skeleton has another K. On reading a sample: the image is broken or
            not of the annotated size.
    """

    def __init__(
        self,
        loaded: PoseAnnotations,
        skeleton: Skeleton | None = None,
        limit: int | None = None,
        area_of_box: float | None = None,
        ground_truth: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        if area_of_box is not None and not (math.isfinite(area_of_box) and area_of_box > 0):
            raise InputError(f"area_of_box is {area_of_box}, expected a positive share of the box")
        raise_first([*loaded.problems, *missing_images(loaded, limit).values()])
        self.path = loaded.path
        self.category = loaded.categories[0]
        self.class_names = [str(category.get("name", category["id"])) for category in loaded.categories]
        self.skeleton = skeleton_of(loaded) if skeleton is None else skeleton
        if self.skeleton.num_keypoints != loaded.num_keypoints:
            raise InputError(
                f"{loaded.path}: category {self.category['id']} has {loaded.num_keypoints} keypoints, "
                f"expected the skeleton's {self.skeleton.num_keypoints}"
            )
        self._ground_truth = ground_truth or partial(coco_form, loaded)
        records = loaded.images[:limit]
        # Arrays, not lists of objects: worker processes share their memory.
        self._paths = np.array([os.path.join(loaded.root, record.file_name) for record in records])
        self._image_ids = np.array([record.id for record in records], dtype=np.int64)
        self._sizes = np.array([(record.width, record.height) for record in records], dtype=np.int64)
        self._people = select_people(loaded, limit, area_of_box)
        self.report = self._people.report
        examples = {problem.kind: problem.message for problem in reversed(loaded.warnings)}
        counts = Counter(problem.kind for problem in loaded.warnings)
        self.warnings = [f"{loaded.path}: {count:,} {kind}, e.g. {examples[kind]}" for kind, count in counts.items()]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        path = Path(str(self._paths[index]))
        index %= len(self)  # a negative index counts from the end, also in `starts`
        width, height = self._sizes[index].tolist()
        people = self._people
        rows = slice(people.starts[index], people.starts[index + 1])
        kept = people.is_person[rows]
        return Sample(
            image=read_image(path, width, height),
            keypoints=people.keypoints[rows][kept],
            boxes=people.boxes[rows][kept],
            areas=people.areas[rows][kept],
            class_labels=people.class_labels[rows][kept],
            ignore_boxes=people.boxes[rows][people.is_ignored[rows]],
            image_id=int(self._image_ids[index]),
            path=path,
        )

    @property
    def image_paths(self) -> list[Path]:
        """The N images' files, in the order of the samples."""
        return [Path(path) for path in self._paths.tolist()]

    @property
    def image_sizes(self) -> np.ndarray:
        """(N, 2) int64 width, height in pixels, in the order of the samples; no image is opened."""
        return self._sizes.copy()

    @property
    def has_people(self) -> np.ndarray:
        """(N,) bool: the image has annotations, with keypoints or without, crowds included."""
        return np.diff(self._people.starts) > 0

    def ground_truth(self) -> dict[str, Any]:
        """Return the content of a COCO keypoint JSON for evaluation: `images`, `annotations`, keypoint `categories`.

        It is read from the files again, with every number as they have it: nothing is clipped and `area_of_box` is
        ignored, as is `limit` in a format of one file.
        """
        return self._ground_truth()


def open_dataset(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    skeleton: Skeleton | None = None,
    limit: int | None = None,
    area_of_box: float | None = None,
) -> PoseDataset:
    """Open a data set by its file.

    Args:
        path: `.json` is a COCO or CrowdPose JSON, `.yaml` or `.yml` the data file of YOLO-pose; a folder holds
            `annotations.json` or `data.yaml`.
        images: folder of the images. Default: `images` beside the JSON, or the YAML's `path`.
        split: `train`, `val` or `test` of a YOLO-pose data set, which needs one; a JSON has none.
        skeleton: see `PoseDataset`.
        limit: see `PoseDataset`.
        area_of_box: see `PoseDataset`.

    Raises:
        InputError: the path is neither, or the data set is not valid.
    """
    source = source_file(path)
    ground_truth = partial(reader_of(source).ground_truth, source, images, split, limit)
    loaded = read_labels(source, images, split, limit)
    return PoseDataset(loaded, skeleton, limit, area_of_box, ground_truth)


def skeleton_of(loaded: PoseAnnotations) -> Skeleton:
    """Return the skeleton that the categories describe.

    Raises:
        InputError: names the file, the category and its field, or the difference of two categories.
    """
    try:
        skeletons = [Skeleton.from_coco_category(category) for category in loaded.categories]
    except InputError as error:
        raise InputError(f"{loaded.path}: {error}") from error
    chosen = first_that_flips(skeletons)
    for category, skeleton in zip(loaded.categories, skeletons, strict=True):
        if (difference := skeleton.difference(skeletons[chosen])) is not None:
            pair = f"categories {category['id']} and {loaded.categories[chosen]['id']}"
            raise InputError(f"{loaded.path}: {pair} differ in their keypoints ({difference}), expected the same")
    return skeletons[chosen]


def first_that_flips(skeletons: Sequence[Skeleton]) -> int:
    """Return the index of the first skeleton with known flip pairs, 0 if there is none."""
    return next((index for index, skeleton in enumerate(skeletons) if skeleton.can_flip), 0)


def missing_images(loaded: PoseAnnotations, limit: int | None = None) -> dict[int, Problem]:
    """Return the problems of those of the first `limit` images that are no files, by index.

    Raises:
        InputError: the folder of images is missing.
    """
    if not loaded.root.is_dir():
        raise InputError(f"{loaded.root}: no such folder, expected the images of {loaded.path}")
    listings: dict[str, set[str]] = {}
    missing = {}
    for index, record in enumerate(loaded.images[:limit]):
        path = os.path.join(loaded.root, record.file_name)
        folder, name = os.path.split(path)
        if folder not in listings:  # one listing of a folder, not a question for each of 100,000 images
            listings[folder] = _files_in(folder)
        # A file system that ignores case has files under names that it does not list.
        if name not in listings[folder] and not os.path.isfile(path):
            text = f"image {record.id}: 'file_name' {record.file_name!r}: no image {path}"
            missing[index] = Problem("missing image", f"{loaded.path}: {text}")
    return missing


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return set()
