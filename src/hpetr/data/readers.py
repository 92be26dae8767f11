"""The label formats: a new one is a file beside this one, and a line of `READERS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpetr.data.annotations import PoseAnnotations
from hpetr.data.coco import read_coco, read_ground_truth
from hpetr.data.yolo import read_yolo, read_yolo_ground_truth, yolo_splits
from hpetr.errors import InputError


@dataclass(frozen=True)
class LabelReader:
    """A label format.

    Attributes:
        title: the name of the format in messages.
        file_name: the file by which a folder of this format is recognized.
        read: (path, images, split, limit) -> annotations and their problems.
        ground_truth: (path, images, split, limit) -> the content of a COCO keypoint JSON for evaluation, with every
            number as the files have it; a format of one file ignores `limit`.
        splits: (path, images) -> names of the splits that a file describes; None if a file is one split.
    """

    title: str
    file_name: str
    read: Callable[..., PoseAnnotations]
    ground_truth: Callable[..., dict[str, Any]]
    splits: Callable[..., list[str]] | None = None


_COCO = LabelReader("COCO keypoint JSON", "annotations.json", read_coco, read_ground_truth)
_YOLO = LabelReader("YOLO-pose data set", "data.yaml", read_yolo, read_yolo_ground_truth, yolo_splits)
READERS = {".json": _COCO, ".yaml": _YOLO, ".yml": _YOLO}  # by the suffix of the file that describes the data set


def source_file(path: str | os.PathLike[str]) -> Path:
    """Return the file that describes a data set: the path itself, or the file found in the folder.

    Raises:
        InputError: the path has an unknown suffix, or is a folder without such a file.
    """
    path = Path(path)
    if path.is_dir():
        names = list(dict.fromkeys(reader.file_name for reader in READERS.values()))
        for name in names:
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path}: the folder has neither {' nor '.join(names)}")
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: expected a COCO keypoint .json, a YOLO-pose .yaml, or a folder with one")
    return path


def reader_of(source: Path) -> LabelReader:
    """Return the reader of a `source_file`."""
    return READERS[source.suffix.lower()]


def read_labels(
    source: Path, images: str | os.PathLike[str] | None = None, split: str | None = None, limit: int | None = None
) -> PoseAnnotations:
    """Read a `source_file` in its format, and collect the problems.

    Raises:
        InputError: the file cannot be read at all, a format with splits gets no split, one without gets one, or the
            limit is below 1.
    """
    reader = reader_of(source)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1 image")
    if reader.splits and split is None:
        raise InputError(f"{source}: split is not given, expected train, val or test of a {reader.title}")
    if not reader.splits and split is not None:
        raise InputError(f"{source}: split is {split!r}, expected none for a {reader.title}: it is one split")
    return reader.read(source, images, split, limit)
