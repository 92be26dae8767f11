"""Results as files of other tools: COCO JSON, YOLO-pose, LabelMe and CSV.

*Results* (`coco`, `csv`) keep every score. *Labels* (`coco-labels`, `yolo`, `labelme`) are for correcting and training:
a keypoint is labelled or not, and one that was not found, or lies outside the image, is not.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hpetr.errors import InputError, first_line, needs_extra
from hpetr.images.files import unique_stems, write_bytes, write_json
from hpetr.images.read import is_image
from hpetr.poses.postprocess import boxes_around
from hpetr.poses.result import PoseResult
from hpetr.poses.skeleton import AREA_OF_BOX, Skeleton

# Labels that may have been corrected are never written over.
LABELS = ("coco-labels", "yolo", "labelme")
LABELLED = 2
# The LabelMe release whose files these are like.
LABELME_VERSION = "5.5.0"
PIXEL_DIGITS, SCORE_DIGITS, SHARE_DIGITS = 3, 6, 6
# A class without a name gets one; an index above this is a mistake.
MAX_CLASSES = 10_000


def check_formats(formats: Sequence[str], images: Sequence[Path], output: Path) -> None:
    """Check, before any work, that the formats are known and that no labels would be written over.

    Raises:
        InputError: an unknown format, labels that exist already, or an image that a YOLO data set cannot hold.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
        place = output / FORMATS[name][0]
        if name in LABELS and place.exists() and (place.is_file() or any(place.iterdir())):
            raise InputError(f"{place}: exists already, and labels are never written over: expected another output")
    for image in images if "yolo" in formats else ():
        if not is_image(image):
            raise InputError(f"{image}: a YOLO data set knows images by their suffix, expected .jpg, .png, ...")


def write_format(
    name: str,
    results: Sequence[PoseResult],
    class_names: Sequence[str],
    output: Path,
    unreadable: Sequence[tuple[Path, str]] = (),
    path: Path | None = None,
) -> Path:
    """Write results of images that came from files in one of `FORMATS`; returns the file or folder.

    Args:
        name: of the format.
        results: of one model, with their paths.
        class_names: by label; a label beyond them is named `class_LABEL`.
        output: folder; the name in it is that of `FORMATS`.
        unreadable: paths and reasons of images that are not in the results, listed in `coco`.
        path: file or folder to write instead of the one in `output`.

    Raises:
        InputError: a file cannot be written, a label is too large, or `results` is empty, so that the keypoints are
            unknown.
    """
    file_name, write = FORMATS[name]
    path = output / file_name if path is None else path
    if not results:
        raise InputError(f"{path}: no image, expected at least one result")
    highest = max(int(result.labels.max(initial=-1)) for result in results)
    if highest >= max(len(class_names), MAX_CLASSES):
        raise InputError(f"{path}: a pose has label {highest}, expected one of the {len(class_names)} classes")
    names = [*class_names, *(f"class_{label}" for label in range(len(class_names), highest + 1))]
    write(path, results, names, unreadable)
    return path


# --- COCO


def coco_results(
    results: Sequence[PoseResult], class_names: Sequence[str], unreadable: Sequence[tuple[Path, str]] = ()
) -> dict[str, Any]:
    """Return a COCO keypoint file whose third number of a keypoint is its score, with a `score` for each pose.

    `file_name` is the path as it was given; `unreadable` lists the images that are not in it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids = range(1, len(class_names) + 1)
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
    """Return a COCO keypoint data set: visibility 2 or 0 in the third place, the pose's `score` beside it.

    `file_name` is relative to `common_folder` of the images. Boxes are those of the labelled keypoints, at least a
    pixel wide and high, and areas 0.53 times them, as in training.
    """
    root = common_folder(results)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, result in enumerate(results, start=1):
        images.append(_image(result, number, _relative(_path(result).resolve(), root)))
        for points, (x1, y1, x2, y2), label, score in _labelled(result):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [round(value, PIXEL_DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": round(AREA_OF_BOX * (x2 - x1) * (y2 - y1), PIXEL_DIGITS),
                    "iscrowd": 0,
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                    "keypoints": [round(value, PIXEL_DIGITS) for value in points.ravel().tolist()],
                    "score": round(score, SCORE_DIGITS),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": _categories(results[0].skeleton, class_names, complete=True),
    }


def common_folder(results: Sequence[PoseResult]) -> Path | None:
    """Return the folder that all images are in or below, or None if there is none (drives of Windows)."""
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
    if complete:  # all that training reads, see `Skeleton.from_coco_category`
        shared |= {"flip_idx": skeleton.flip_index, "sigmas": list(skeleton.sigmas)}
    return [{"id": number, "name": name, **shared} for number, name in enumerate(class_names, start=1)]


# --- YOLO-pose


def write_yolo(results: Sequence[PoseResult], class_names: Sequence[str], folder: Path) -> None:
    """Write a YOLO-pose data set into a new folder: `data.yaml`, copies of the images in `images`, and `labels`.

    It has no scores. An image without persons gets no label file, since it is background.
    """
    with needs_extra("train", "--format yolo"):
        import yaml
    skeleton = results[0].skeleton
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for result, stem in _with_stems(results):
        shutil.copyfile(_path(result), folder / "images" / (stem + _path(result).suffix))
        if len(result):
            (folder / "labels" / f"{stem}.txt").write_text(yolo_labels(result), encoding="utf-8")
    values = {
        # Other readers of this form want both names.
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
    """Return the label file of an image: a line `class cx cy w h` and K times `x y visibility` for each pose.

    Numbers are shares of the image's width and height.
    """
    size = np.array(result.image_size[::-1], dtype=np.float64)
    lines = []
    for points, box, label, _ in _labelled(result):
        low, high = np.split(np.array(box), 2)
        words = [str(label), *(f"{v:.{SHARE_DIGITS}f}" for v in (*((low + high) / 2 / size), *((high - low) / size)))]
        for (x, y), visibility in zip(points[:, :2] / size, points[:, 2], strict=True):
            words += [f"{x:.{SHARE_DIGITS}f}", f"{y:.{SHARE_DIGITS}f}", str(int(visibility))]
        lines.append(" ".join(words) + "\n")
    return "".join(lines)


# --- LabelMe


def labelme_json(result: PoseResult, class_names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return an image's LabelMe file: a rectangle for each person and its labelled keypoints, of one `group_id`.

    Args:
        result: the poses.
        class_names: by label.
        folder: of the file; `imagePath` leads from there to the image. Its pixels are not stored again.
    """

    def shape(kind: str, label: str, points: list[list[float]], person: int, score: float) -> dict[str, Any]:
        return {
            "label": label,
            "points": [[round(x, PIXEL_DIGITS), round(y, PIXEL_DIGITS)] for x, y in points],
            "group_id": person,
            "description": f"{score:.3f}",
            "shape_type": kind,
            "flags": {},
            "mask": None,
        }

    height, width = result.image_size
    shapes: list[dict[str, Any]] = []
    for person, (points, box, label, score) in enumerate(_labelled(result), start=1):
        shapes.append(shape("rectangle", class_names[label], [box[:2], box[2:]], person, score))
        scores = result.keypoint_scores[person - 1].tolist()
        for joint, (x, y, visibility), own_score in zip(result.skeleton.names, points.tolist(), scores, strict=True):
            if visibility == LABELLED:
                shapes.append(shape("point", joint, [[x, y]], person, own_score))
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": _relative(_path(result).resolve(), folder.resolve()),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


# --- CSV


def csv_table(results: Sequence[PoseResult], class_names: Sequence[str]) -> str:
    """Return a line for each pose: `file` and the columns of `PoseResult.to_columns`, the label by its name.

    An image without persons has no line.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", *results[0].to_columns()])
    for result in results:
        columns = {
            name: [round(value, SCORE_DIGITS if name.endswith("score") else PIXEL_DIGITS) for value in values.tolist()]
            for name, values in result.to_columns().items()
        }
        columns["label"] = [class_names[label] for label in columns["label"]]
        writer.writerows([result.path, *row] for row in zip(*columns.values(), strict=True))
    return stream.getvalue()


# --- shared


def _path(result: PoseResult) -> Path:
    if result.path is None:
        raise InputError("formats: a result did not come from a file, expected results with a path")
    return result.path


def _with_stems(results: Sequence[PoseResult]) -> zip[tuple[PoseResult, str]]:
    return zip(results, unique_stems([_path(result) for result in results]), strict=True)


def _relative(path: Path, folder: Path | None) -> str:
    """Return the way from a folder to a path, or the path itself if there is none (drives of Windows)."""
    with suppress(ValueError):
        path = Path(os.path.relpath(path, folder)) if folder is not None else path
    return path.as_posix()


def _labelled(result: PoseResult) -> list[tuple[np.ndarray, list[float], int, float]]:
    """Return the poses as labels.

    Returns:
        n tuples: (K, 3) x, y, visibility, all 0 if not labelled; box x1, y1, x2, y2 around the labelled keypoints,
        within the image and at least a pixel wide and high; label; score.
    """
    size = np.array(result.image_size[::-1], dtype=np.float64)
    keypoints = result.keypoints.astype(np.float64)
    kept = result.found & ((keypoints >= 0) & (keypoints <= size)).all(axis=2)  # (n, K)
    points = np.where(kept[..., None], np.dstack([keypoints, np.full(kept.shape, LABELLED)]), 0)  # (n, K, 3)
    corners = boxes_around(keypoints, np.where(kept, result.keypoint_scores, 0)).reshape(-1, 2, 2).clip(0, size)
    low, high = corners[:, 0], corners[:, 1]  # (n, 2)
    thin = high - low < 1
    low = np.where(thin, np.clip((low + high - 1) / 2, 0, np.maximum(size - 1, 0)), low)
    high = np.where(thin, low + 1, high)
    boxes = np.concatenate([low, high], axis=1).tolist()
    return list(zip(points, boxes, result.labels.tolist(), result.scores.tolist(), strict=True))


def _write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as temporary:
            unfinished = Path(temporary) / final.name
            fill(unfinished)
            if final.is_dir():
                final.rmdir()
            unfinished.rename(final)
    except OSError as error:
        raise InputError(f"{final}: cannot be written ({first_line(error)})") from error


def _write_labelme(path: Path, results: Sequence[PoseResult], class_names: Sequence[str]) -> None:
    def fill(folder: Path) -> None:
        folder.mkdir()
        for result, stem in _with_stems(results):
            write_json(folder / f"{stem}.json", labelme_json(result, class_names, path))

    _write_folder(path, fill)


def _write_csv(path: Path, results: Sequence[PoseResult], class_names: Sequence[str], _: Any) -> None:
    # File names that are not UTF-8 keep their bytes.
    write_bytes(path, csv_table(results, class_names).encode(errors="surrogateescape"))


# Writes (path, results, class names, unreadable).
Writer: TypeAlias = Callable[[Path, Sequence[PoseResult], Sequence[str], Sequence[tuple[Path, str]]], None]
# By the format's name: the file or folder, and its writer.
FORMATS: dict[str, tuple[str, Writer]] = {
    "coco": ("predictions.json", lambda path, *about: write_json(path, coco_results(*about))),
    "coco-labels": ("annotations.json", lambda path, *about: write_json(path, coco_labels(*about[:2]))),
    "yolo": ("yolo", lambda path, *about: _write_folder(path, lambda folder: write_yolo(about[0], about[1], folder))),
    "labelme": ("labelme", lambda path, *about: _write_labelme(path, *about[:2])),
    "csv": ("predictions.csv", _write_csv),
}
