"""Results as files of other tools: COCO JSON, YOLO-pose, LabelMe and CSV.

Two kinds of them. *Results* (`coco`, `csv`) keep every score. *Labels* (`coco-labels`, `yolo`, `labelme`) are for
correcting and training: they say labelled or not, so a keypoint with a lower score than `KEYPOINT_THRESHOLD` is not.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpetr.data.annotations import AREA_OF_BOX
from hpetr.errors import InputError
from hpetr.images.files import unique_stems, write_bytes, write_json
from hpetr.images.read import is_image
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import Skeleton

FORMATS = {
    "coco": "predictions.json",
    "coco-labels": "annotations.json",
    "yolo": "yolo",
    "labelme": "labelme",
    "csv": "predictions.csv",
}
# Labels that somebody may have corrected are never written over.
LABELS = ("coco-labels", "yolo", "labelme")
# The same as a drawing's: what is drawn is labelled.
KEYPOINT_THRESHOLD = 0.3
LABELLED, NOT_LABELLED = 2, 0
# The LabelMe release whose files these are like.
LABELME_VERSION = "5.5.0"
PIXEL_DIGITS, SCORE_DIGITS, SHARE_DIGITS = 3, 6, 6


def check_formats(formats: Sequence[str], images: Sequence[Path], output: Path) -> None:
    """Prove before any work that the formats are known, and that no labels would be written over.

    Raises:
        InputError: an unknown format, labels that are there already, or an image that a YOLO data set cannot hold.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
        place = output / FORMATS[name]
        if name in LABELS and place.exists() and (place.is_file() or any(place.iterdir())):
            raise InputError(f"{place}: exists already, and labels are never written over: expected another output")
    if "yolo" in formats:
        for image in images:
            if not is_image(image):
                raise InputError(
                    f"{image}: in a YOLO data set an image has the suffix of one, expected .jpg, .png, ..."
                )


def write_format(
    name: str,
    results: Sequence[PoseResult],
    class_names: Sequence[str],
    output: Path,
    unreadable: Sequence[tuple[Path, str]] = (),
    path: Path | None = None,
) -> Path:
    """Write results of images that came from files in one of `FORMATS` into a folder; returns what was written.

    Args:
        results: of one model, with their paths.
        class_names: by label.
        output: folder; the name in it is that of `FORMATS`.
        unreadable: paths and reasons of images that are not in the results; `coco` lists them.
        path: another place than the one in `output`.

    Raises:
        InputError: a file cannot be written, or `results` is empty: nothing says what the keypoints are.
    """
    path = output / FORMATS[name] if path is None else path
    if not results:
        raise InputError(f"{path}: no image, expected at least one result")
    if name == "coco":
        write_json(path, coco_results(results, class_names, unreadable))
    elif name == "coco-labels":
        write_json(path, coco_labels(results, class_names))
    elif name == "csv":
        write_bytes(path, csv_table(results, class_names).encode())
    elif name == "yolo":
        _write_folder(path, lambda folder: write_yolo(results, class_names, folder))
    else:
        _write_folder(path, lambda folder: _write_labelme(results, class_names, folder, path))
    return path


# --- COCO


def coco_results(
    results: Sequence[PoseResult], class_names: Sequence[str], unreadable: Sequence[tuple[Path, str]] = ()
) -> dict[str, Any]:
    """A COCO keypoint file whose third number of a keypoint is its score, with a `score` for each pose.

    `file_name` is the path as it was given; `unreadable` lists the images that are not in it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = range(1, _classes(results, class_names) + 1)
    for number, result in enumerate(results, start=1):
        images.append(_image(result, number, str(result.path)))
        for pose in result.to_coco(number, ids):
            area = pose["bbox"][2] * pose["bbox"][3]
            annotations.append({"id": len(annotations) + 1, "area": area, "iscrowd": 0, **pose})
    return {
        "images": images,
        "annotations": annotations,
        "categories": _categories(results[0].skeleton, class_names),
        "unreadable": [{"file_name": str(path), "reason": reason} for path, reason in unreadable],
    }


def coco_labels(results: Sequence[PoseResult], class_names: Sequence[str]) -> dict[str, Any]:
    """A COCO keypoint data set: visibility 2 or 0 in the third place, the pose's `score` beside it.

    `file_name` is relative to `common_folder` of the images. Boxes are those of the labelled keypoints, at least a
    pixel wide and high, and areas 0.53 times them, as in training.
    """
    root = common_folder(results)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, result in enumerate(results, start=1):
        relative = os.path.relpath(_path(result).resolve(), root) if root else str(_path(result).resolve())
        images.append(_image(result, number, Path(relative).as_posix()))
        for index in range(len(result)):
            points, box = _labels(result, index)
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(result.labels[index]) + 1,
                    "bbox": [round(value, PIXEL_DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round(AREA_OF_BOX * (x2 - x1) * (y2 - y1), PIXEL_DIGITS),
                    "iscrowd": 0,
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                    "keypoints": [round(value, PIXEL_DIGITS) for value in points.ravel().tolist()],
                    "score": round(float(result.scores[index]), SCORE_DIGITS),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": _categories(results[0].skeleton, class_names, complete=True),
    }


def common_folder(results: Sequence[PoseResult]) -> Path | None:
    """The folder that all images are in or below; None where there is none (drives of Windows)."""
    try:
        return Path(os.path.commonpath([_path(result).resolve().parent for result in results]))
    except ValueError:
        return None


def _image(result: PoseResult, number: int, name: str) -> dict[str, Any]:
    height, width = result.image_size
    return {"id": number, "file_name": name, "height": height, "width": width}


def _categories(skeleton: Skeleton, class_names: Sequence[str], complete: bool = False) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {"keypoints": list(skeleton.names)}
    shared["skeleton"] = [[first + 1, second + 1] for first, second in skeleton.edges]  # COCO counts from 1
    if complete:  # what a training reads, see `Skeleton.from_coco_category`
        shared |= {"flip_idx": skeleton.flip_index, "sigmas": list(skeleton.sigmas)}
    return [{"id": number, "name": name, **shared} for number, name in enumerate(class_names, start=1)]


def _classes(results: Sequence[PoseResult], class_names: Sequence[str]) -> int:
    """How many labels there may be: a model may have a class without a name."""
    return max(len(class_names), *(int(result.labels.max(initial=-1)) + 1 for result in results))


# --- YOLO-pose


def write_yolo(results: Sequence[PoseResult], class_names: Sequence[str], folder: Path) -> None:
    """Write a YOLO-pose data set into a folder: `data.yaml`, copies of the images in `images`, and `labels`.

    Scores have no place in it. An image without people gets no label file: it is background.
    """
    skeleton = results[0].skeleton
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for result, stem in zip(results, unique_stems([_path(result) for result in results]), strict=True):
        shutil.copyfile(_path(result), folder / "images" / (stem + _path(result).suffix))
        if len(result):
            (folder / "labels" / f"{stem}.txt").write_text(yolo_labels(result), encoding="utf-8")
    values = {
        # Both names are wanted by other readers of this form.
        "train": "images",
        "val": "images",
        "names": dict(enumerate(class_names)),
        "kpt_shape": [skeleton.num_keypoints, 3],
        "flip_idx": skeleton.flip_index,
        "kpt_names": {label: list(skeleton.names) for label in range(len(class_names))},
        "skeleton": [list(edge) for edge in skeleton.edges],
        "sigmas": list(skeleton.sigmas),
    }
    text = "# Labels by hpetr. train and val are the same images: divide them before a training.\n"
    text += yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def yolo_labels(result: PoseResult) -> str:
    """The label file of an image: a line `class cx cy w h` and K times `x y visibility` for each pose, as shares of
    the image's width and height."""
    height, width = result.image_size
    size = np.array([width, height], dtype=np.float64)
    lines = []
    for index in range(len(result)):
        points, box = _labels(result, index)
        center, extent = (box[:2] + box[2:]) / 2 / size, (box[2:] - box[:2]) / size
        words = [str(int(result.labels[index])), *(f"{v:.{SHARE_DIGITS}f}" for v in (*center, *extent))]
        for x, y, visibility in points:
            words += [f"{x / width:.{SHARE_DIGITS}f}", f"{y / height:.{SHARE_DIGITS}f}", str(int(visibility))]
        lines.append(" ".join(words) + "\n")
    return "".join(lines)


# --- LabelMe


def labelme_json(result: PoseResult, class_names: Sequence[str], folder: Path) -> dict[str, Any]:
    """An image's LabelMe file: for each person a rectangle and its labelled keypoints as points of one `group_id`.

    Args:
        folder: where the file will be; `imagePath` leads from there to the image. Its pixels are not stored again.
    """
    height, width = result.image_size
    shapes: list[dict[str, Any]] = []

    def add(kind: str, label: str, points: np.ndarray, person: int, score: float) -> None:
        shapes.append(
            {
                "label": label,
                "points": [[round(x, PIXEL_DIGITS), round(y, PIXEL_DIGITS)] for x, y in points.tolist()],
                "group_id": person,
                "description": f"{score:.3f}",
                "shape_type": kind,
                "flags": {},
                "mask": None,
            }
        )

    for index in range(len(result)):
        points, box = _labels(result, index)
        label = int(result.labels[index])
        name = class_names[label] if label < len(class_names) else str(label)
        add("rectangle", name, box.reshape(2, 2), index + 1, float(result.scores[index]))
        for joint, (x, y, visibility), score in zip(
            result.skeleton.names, points, result.keypoint_scores[index], strict=True
        ):
            if visibility == LABELLED:
                add("point", joint, np.array([[x, y]]), index + 1, float(score))
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": _relative(_path(result).resolve(), folder.resolve()),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _write_labelme(results: Sequence[PoseResult], class_names: Sequence[str], folder: Path, final: Path) -> None:
    folder.mkdir()
    for result, stem in zip(results, unique_stems([_path(result) for result in results]), strict=True):
        write_json(folder / f"{stem}.json", labelme_json(result, class_names, final))


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return path.as_posix()


# --- CSV


def csv_table(results: Sequence[PoseResult], class_names: Sequence[str]) -> str:
    """A line for each pose: `file`, `person` (from 1, best first), `label`, `score`, the box, and for each keypoint
    NAME `NAME_x`, `NAME_y`, `NAME_score`. An image without people has no line."""
    names = results[0].skeleton.names
    header = ["file", "person", "label", "score", "left", "top", "right", "bottom"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*header, *(f"{name}_{part}" for name in names for part in ("x", "y", "score"))])
    for result in results:
        for index in range(len(result)):
            label = int(result.labels[index])
            row: list[Any] = [
                result.path,
                index + 1,
                class_names[label] if label < len(class_names) else label,
                round(float(result.scores[index]), SCORE_DIGITS),
                *(round(float(value), PIXEL_DIGITS) for value in result.boxes[index]),
            ]
            for (x, y), score in zip(result.keypoints[index], result.keypoint_scores[index], strict=True):
                row += [round(float(x), PIXEL_DIGITS), round(float(y), PIXEL_DIGITS), round(float(score), SCORE_DIGITS)]
            writer.writerow(row)
    return stream.getvalue()


# --- shared


def _path(result: PoseResult) -> Path:
    if result.path is None:
        raise InputError("formats: a result did not come from a file, expected results with a path")
    return result.path


def _labels(result: PoseResult, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A pose as labels: (K, 3) x, y, visibility, 0, 0, 0 where not labelled; and (4,) box of the labelled keypoints."""
    points = np.zeros((len(result.keypoints[index]), 3))
    kept = result.keypoint_scores[index] >= KEYPOINT_THRESHOLD
    points[kept, :2], points[kept, 2] = result.keypoints[index][kept], LABELLED
    around = result.keypoints[index][kept] if kept.any() else result.keypoints[index]
    low, high = around.min(axis=0).astype(np.float64), around.max(axis=0).astype(np.float64)
    # A box without extent is nobody's: a pixel, within the image.
    size = np.array(result.image_size[::-1], dtype=np.float64)
    thin = high - low < 1
    low = np.where(thin, np.clip((low + high - 1) / 2, 0, np.maximum(size - 1, 0)), low)
    high = np.where(thin, low + 1, high)
    return points, np.concatenate([low, high])


def _write_folder(final: Path, fill: Any) -> None:
    """A folder that appears whole or not at all."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as temporary:
            unfinished = Path(temporary) / final.name
            fill(unfinished)
            if final.is_dir():
                final.rmdir()
            unfinished.rename(final)
    except OSError as error:
        raise InputError(f"{final}: cannot be written ({error.strerror or error})") from error
