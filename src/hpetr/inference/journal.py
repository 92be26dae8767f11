"""Results of images on disk as they come, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hpetr.errors import InputError, first_line
from hpetr.poses.result import POSE_FIELDS, PoseResult
from hpetr.poses.skeleton import Skeleton

SUFFIX = ".partial.jsonl"


class Journal:
    """JSON lines beside the results: one of settings for each start, and one for each image.

    The system keeps a written line even if the process is killed in the next moment.

    Args:
        path: the file; None keeps nothing on disk.
        settings: those of the run, compared with those of the lines.
        skeleton: of the results.
        resume: go on with the lines of an earlier run.

    Attributes:
        results: by the image's path as it was given.
        unreadable: reasons, likewise.

    Raises:
        InputError: the file has lines and `resume` is false, they are broken or of other settings, or it cannot be
            written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], skeleton: Skeleton, *, resume: bool) -> None:
        self.results: dict[str, PoseResult] = {}
        self.unreadable: dict[str, str] = {}
        self._path, self._skeleton, self._file = path, skeleton, None
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a killed process may leave a part of one
        for number, line in enumerate(whole, start=1):
            try:
                self._read(json.loads(line), settings)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}: line {number} is not one of a prediction ({first_line(error)})") from error
        if (self.results or self.unreadable) and not resume:
            raise InputError(
                f"{path}: holds {len(self.results) + len(self.unreadable)} images of a run that was stopped, "
                "expected --resume to go on, or another --output; delete it to start again"
            )
        with self._writing():
            self._file = path.open("ab")
            self._file.truncate(sum(map(len, whole)))
        self._write({"settings": settings, "process": os.getpid()})

    def add(self, result: PoseResult) -> None:
        """Keep the result of an image."""
        self.results[str(result.path)] = result
        arrays = {name: getattr(result, name).tolist() for name in POSE_FIELDS}
        threshold = {"keypoint_threshold": result.keypoint_threshold}
        self._write({"file_name": str(result.path), "image_size": result.image_size, **threshold, **arrays})

    def add_unreadable(self, image: Path, reason: str) -> None:
        """Keep the reason why an image cannot be read."""
        self.unreadable[str(image)] = reason
        self._write({"file_name": str(image), "unreadable": reason})

    def close(self, *, remove: bool) -> None:
        """Close the file, and remove it once the results are written."""
        if self._path is not None and self._file is not None:
            self._file.close()
            if remove:
                self._path.unlink(missing_ok=True)

    def _read(self, value: dict[str, Any], settings: Mapping[str, Any]) -> None:
        if "settings" in value:
            earlier = value["settings"]
            for key in settings:
                if earlier.get(key) != settings[key]:
                    raise InputError(
                        f"was begun with {key} {earlier.get(key)!r}, expected the same, not {settings[key]!r}"
                    )
            for file in self._path.parent.glob(f".*.{int(value['process'])}.tmp") if self._path else ():
                file.unlink(missing_ok=True)  # the stopped process was writing it
        elif "unreadable" in value:
            self.unreadable[value["file_name"]] = value["unreadable"]
        else:
            count, joints = len(value["scores"]), self._skeleton.num_keypoints
            arrays: dict[str, Any] = {}
            for name, (sides, kind) in POSE_FIELDS.items():
                shape = (count, *(joints if side is None else side for side in sides))
                arrays[name] = np.array(value[name], dtype=kind).reshape(shape)
            self.results[value["file_name"]] = PoseResult(
                **arrays,
                skeleton=self._skeleton,
                image_size=tuple(value["image_size"]),
                path=Path(value["file_name"]),
                keypoint_threshold=value["keypoint_threshold"],
            )

    def _write(self, value: Mapping[str, Any]) -> None:
        if self._file is not None:
            with self._writing():
                self._file.write(json.dumps(value).encode() + b"\n")
                self._file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({first_line(error)})") from error
