"""Datasets of pictures with poses."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from hpetr.data.annotations import PoseAnnotations, load_annotations
from hpetr.data.images import load_image
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.skeleton import Skeleton


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset holds, and what it leaves out."""

    pictures: int
    pictures_without_people: int
    people: int
    people_without_keypoints: int  # ignored regions in training
    crowds: int  # ignored regions in training
    boxes_without_extent: int  # crowds or people without keypoints that nothing can be done with
    keypoints_outside: int  # labelled outside their picture, taken as not labelled
    filled_areas: int  # no `area` in the file: 0.53 times the box
    other_categories: int  # annotations of categories without keypoints, left out

    def __str__(self) -> str:
        """One line: pictures and people, and of the rest what is not 0."""
        counts = ((field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{count:,} {name}" for name, count in counts if count or name in ("pictures", "people"))


class CocoPoseDataset(Dataset[Sample]):
    """A COCO keypoint JSON and its pictures.

    People are annotations with at least one labelled keypoint inside the picture; crowds and people without one are
    the sample's `ignore_boxes`. Pictures without people are kept: they teach what is no person.

    Args:
        annotations: the JSON; see `load_annotations` for what is expected of it.
        images: folder of the pictures; None takes `images` beside the JSON.
        skeleton: overrides the one that the JSON's first keypoint category describes.
        limit: only the first `limit` pictures of the JSON.

    Attributes:
        path: the JSON.
        skeleton: the keypoints.
        category: the JSON's first category with keypoints.
        report: counts of what is there and what is left out (of other categories and filled areas: in the whole file).

    Raises:
        InputError: the JSON is not valid, a picture is missing, or the skeleton has another K. On reading a sample:
            the picture is broken or not of the size that the JSON says.
    """

    path: Path
    skeleton: Skeleton
    category: dict[str, Any]
    report: DatasetReport

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str] | None = None,
        skeleton: Skeleton | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1 picture")
        loaded = load_annotations(annotations)
        self.path = loaded.path
        self.category = loaded.category
        self.skeleton = Skeleton.from_coco_category(loaded.category) if skeleton is None else skeleton
        if self.skeleton.num_keypoints != loaded.num_keypoints:
            raise InputError(
                f"{loaded.path}: category {self.category['id']} has {loaded.num_keypoints} keypoints, "
                f"expected the skeleton's {self.skeleton.num_keypoints}"
            )
        self._records = loaded.images[:limit]
        self._paths = _find_pictures(loaded, images, self._records)
        self._select(loaded)

    def _select(self, loaded: PoseAnnotations) -> None:
        """Keep the selected pictures' rows as plain arrays: worker processes share their memory."""
        order = np.argsort(loaded.image_index, kind="stable")
        order = order[loaded.image_index[order] < len(self._records)]
        picture = loaded.image_index[order]
        sizes = np.array([(record.width, record.height) for record in self._records], dtype=np.float32)  # (N, 2)
        keypoints = loaded.keypoints[order]
        xy = keypoints[..., :2]
        outside = ((xy < 0) | (xy > sizes[picture, None])).any(-1)  # (A, K)
        keypoints[outside] = 0
        limits = np.tile(sizes[picture], 2)  # (A, 4)
        boxes = loaded.boxes[order].clip(0, limits)
        has_extent = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        crowd = loaded.is_crowd[order]
        labelled = (keypoints[..., 2] > 0).any(axis=1)
        is_person = ~crowd & labelled
        is_ignored = ~is_person & has_extent

        self._keypoints = keypoints
        self._boxes = boxes
        self._areas = loaded.areas[order]
        self._class_labels = loaded.class_labels[order]
        self._is_person, self._is_ignored = is_person, is_ignored
        self._starts = np.searchsorted(picture, np.arange(len(self._records) + 1))  # rows of picture i: [i], [i + 1]
        self.report = DatasetReport(
            pictures=len(self._records),
            pictures_without_people=len(self._records) - len(np.unique(picture[is_person])),
            people=int(is_person.sum()),
            people_without_keypoints=int((~crowd & ~labelled).sum()),
            crowds=int(crowd.sum()),
            boxes_without_extent=int((~is_person & ~has_extent).sum()),
            keypoints_outside=int(outside.sum()),
            filled_areas=loaded.filled_areas,
            other_categories=loaded.other_categories,
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record, path = self._records[index], self._paths[index]
        index %= len(self)  # a negative index counts from the end, also in `_starts`
        image = load_image(path)
        if image.shape[:2] != (record.height, record.width):
            raise InputError(
                f"{path}: is {image.shape[1]} x {image.shape[0]} pixels, "
                f"expected {record.width} x {record.height} as annotated (EXIF orientation is applied)"
            )
        rows = slice(self._starts[index], self._starts[index + 1])
        people = self._is_person[rows]
        return Sample(
            image=image,
            keypoints=self._keypoints[rows][people],
            boxes=self._boxes[rows][people],
            areas=self._areas[rows][people],
            class_labels=self._class_labels[rows][people],
            ignore_boxes=self._boxes[rows][self._is_ignored[rows]],
            image_id=record.id,
            path=path,
        )


def _find_pictures(loaded: PoseAnnotations, folder: str | os.PathLike[str] | None, records: list[Any]) -> list[Path]:
    root = loaded.path.parent / "images" if folder is None else Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected the pictures of {loaded.path}")
    paths = [root / record.file_name for record in records]
    missing = [(record, path) for record, path in zip(records, paths, strict=True) if not path.is_file()]
    if missing:
        record, path = missing[0]
        raise InputError(
            f"{loaded.path}: image {record.id}: 'file_name' {record.file_name!r}: no picture {path}"
            f" ({len(missing)} of {len(records)} are missing)"
        )
    return paths
