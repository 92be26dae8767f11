"""Results in other tools' forms: each is read back, by hpetr's own readers where there is one."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import yaml
from PIL import Image
from pycocotools.coco import COCO as CocoFile
from typer.testing import CliRunner

from hpetr import InputError, PoseResult, Skeleton
from hpetr.cli.main import app
from hpetr.data import open_dataset
from hpetr.data.check import check_dataset
from hpetr.poses.formats import FORMATS, check_formats, coco_labels, labelme_json, write_format
from hpetr.poses.postprocess import boxes_around
from hpetr.poses.skeleton import COCO
from paths import EXAMPLES

CLASSES = ["cat", "dog"]
ANIMAL = Skeleton(("nose", "left_ear", "right_ear"), ((0, 1), (0, 2)), ((1, 2),), (0.03, 0.05, 0.05))


def made_results(folder: Path) -> list[PoseResult]:
    """Three images in two folders, two of the same name: three animals, one, and none; some keypoints uncertain."""
    rng = np.random.default_rng(1)
    results = []
    for count, name in ((3, "x/a.png"), (1, "y/a.jpg"), (0, "y/c.png")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (640, 425)).save(path)
        keypoints = (rng.random((count, 3, 2)) * (640, 425)).astype(np.float32)
        keypoint_scores = rng.uniform(0.35, 1, (count, 3)).astype(np.float32)
        if count == 3:
            keypoint_scores[0, 1] = 0.1
            keypoint_scores[2] = (0.9, 0.2, 0.1)  # one labelled keypoint: a box without extent
        results.append(
            PoseResult(
                keypoints=keypoints,
                keypoint_scores=keypoint_scores,
                scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
                boxes=boxes_around(keypoints, keypoint_scores, 0.3),
                labels=np.arange(count, dtype=np.int64) % 2,
                skeleton=ANIMAL,
                image_size=(425, 640),
                path=path,
            )
        )
    return results


def expected_labels(result: PoseResult) -> np.ndarray:
    """(n, 3, 3) x, y, visibility."""
    labelled = result.keypoint_scores[..., None] >= 0.3
    return np.where(labelled, np.concatenate([result.keypoints, np.full((len(result), 3, 1), 2)], -1), 0)


def test_coco_labels_are_a_data_set(tmp_path: Path) -> None:
    results = made_results(tmp_path / "images")
    path = write_format("coco-labels", results, CLASSES, tmp_path)
    assert check_dataset(path, tmp_path / "images").accepted
    dataset = open_dataset(path, tmp_path / "images")
    assert dataset.image_paths == [result.path for result in results]
    assert dataset.skeleton == ANIMAL
    assert dataset.class_names == CLASSES
    for result, sample in zip(results, dataset, strict=False):
        np.testing.assert_allclose(sample.keypoints, expected_labels(result), atol=6e-4)
        np.testing.assert_array_equal(sample.class_labels, result.labels)
    annotations = dataset.ground_truth()["annotations"]
    assert [a["score"] for a in annotations] == pytest.approx([0.9, 0.7, 0.5, 0.9], abs=1e-6)
    assert annotations[2]["bbox"][2:] == [1, 1]


def test_yolo_is_a_data_set(tmp_path: Path) -> None:
    results = made_results(tmp_path / "images")
    path = write_format("yolo", results, CLASSES, tmp_path / "out")
    dataset = open_dataset(path, split="train")
    assert [p.name for p in dataset.image_paths] == ["a.png", "c.png", "y_a.jpg"]
    assert dataset.skeleton == ANIMAL
    for result, index in zip(results, (0, 2, 1), strict=True):
        sample = dataset[index]
        np.testing.assert_allclose(sample.keypoints, expected_labels(result), atol=640 * 6e-7)
        np.testing.assert_array_equal(sample.class_labels, result.labels)
    assert sorted(p.name for p in (path / "labels").iterdir()) == ["a.txt", "y_a.txt"]
    line = (path / "labels" / "a.txt").read_text().splitlines()[0]
    assert re.fullmatch(r"0( \d\.\d{6}){4}( \d\.\d{6} \d\.\d{6} [02]){3}", line)
    values = yaml.safe_load((path / "data.yaml").read_text())
    assert {"train", "val", "names", "kpt_shape", "flip_idx", "kpt_names"} <= set(values)
    assert values["kpt_names"] == {0: list(ANIMAL.names), 1: list(ANIMAL.names)}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["yolo"], "something half-written stayed"


# What labelme/_label_file.py reads: LabelFile.load and its ShapeDict.
LABELME_FILE = {
    "version": str,
    "flags": dict,
    "shapes": list,
    "imagePath": str,
    "imageData": type(None),
    "imageHeight": int,
    "imageWidth": int,
}
LABELME_SHAPE = {
    "label": str,
    "points": list,
    "group_id": int,
    "description": str,
    "shape_type": str,
    "flags": dict,
    "mask": type(None),
}


def test_labelme_files_have_its_schema_and_all_keypoints(tmp_path: Path) -> None:
    results = made_results(tmp_path / "images")
    folder = write_format("labelme", results, CLASSES, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "c.json", "y_a.json"]
    for result, name in zip(results, ("a", "y_a", "c"), strict=True):
        content = json.loads((folder / f"{name}.json").read_text())
        assert {key: type(value) for key, value in content.items()} == LABELME_FILE
        assert os.path.samefile(folder / content["imagePath"], result.path)
        assert (content["imageHeight"], content["imageWidth"]) == result.image_size
        found = np.zeros((len(result), 3, 3))
        for shape in content["shapes"]:
            assert {key: type(value) for key, value in shape.items()} == LABELME_SHAPE
            person = shape["group_id"] - 1
            if shape["shape_type"] == "rectangle":
                assert shape["label"] == CLASSES[result.labels[person]]
                assert len(shape["points"]) == 2
            else:
                assert shape["shape_type"] == "point"
                found[person, ANIMAL.names.index(shape["label"])] = [*shape["points"][0], 2]
        np.testing.assert_allclose(found, expected_labels(result), atol=6e-4)


def test_csv_has_every_number(tmp_path: Path) -> None:
    results = made_results(tmp_path / 'odd, "folder"')
    path = write_format("csv", results, CLASSES, tmp_path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(result, index) for result in results for index in range(len(result))]
    assert len(rows) == len(expected) == 4
    for row, (result, index) in zip(rows, expected, strict=True):
        assert (row["file"], int(row["person"])) == (str(result.path), index + 1)
        assert row["label"] == CLASSES[result.labels[index]]
        assert float(row["score"]) == pytest.approx(float(result.scores[index]), abs=1e-6)
        box = [float(row[side]) for side in ("left", "top", "right", "bottom")]
        np.testing.assert_allclose(box, result.boxes[index], atol=6e-4)
        points = [[float(row[f"{name}_{part}"]) for part in ("x", "y")] for name in ANIMAL.names]
        np.testing.assert_allclose(points, result.keypoints[index], atol=6e-4)
        scores = [float(row[f"{name}_score"]) for name in ANIMAL.names]
        np.testing.assert_allclose(scores, result.keypoint_scores[index], atol=1e-6)


def test_coco_results_keep_the_scores(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    path = write_format("coco", results, CLASSES, tmp_path, [(Path("b.jpg"), "broken")])
    file = CocoFile(str(path))
    pose = file.loadAnns(file.getAnnIds(imgIds=[1]))[2]
    found = np.reshape(pose["keypoints"], (3, 3))
    np.testing.assert_allclose(found[:, :2], results[0].keypoints[2], atol=6e-4)
    np.testing.assert_allclose(found[:, 2], results[0].keypoint_scores[2], atol=6e-4)
    assert json.loads(path.read_text())["unreadable"] == [{"file_name": "b.jpg", "reason": "broken"}]


@pytest.mark.parametrize("form", FORMATS)
def test_classes_beyond_the_names_get_one(tmp_path: Path, form: str) -> None:
    results = [replace(result, labels=result.labels + 1) for result in made_results(tmp_path / "images")]  # up to 2
    path = write_format(form, results, CLASSES, tmp_path / "out")
    if form in ("coco-labels", "yolo"):
        dataset = open_dataset(path, **({"split": "train"} if form == "yolo" else {"images": tmp_path / "images"}))
        assert dataset.class_names == [*CLASSES, "class_2"]
        assert sorted(label for sample in dataset for label in sample.class_labels) == [1, 1, 1, 2]
    else:
        files = [path] if path.is_file() else path.iterdir()
        assert any("class_2" in file.read_text() for file in files)
    with pytest.raises(InputError, match="a pose has label 4000000000, expected one of the 2 classes"):
        write_format(
            form, [replace(results[0], labels=results[0].labels + 4_000_000_000 - 2)], CLASSES, tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


def test_labels_at_the_border_have_a_box_within_the_image(tmp_path: Path) -> None:
    result = made_results(tmp_path)[1]
    corner = replace(result, keypoints=np.broadcast_to(np.float32([640, 425]), (1, 3, 2)))
    (annotation,) = coco_labels([corner], CLASSES)["annotations"]
    assert annotation["bbox"] == [639, 424, 1, 1]


def test_command_writes_all_formats_and_never_over_labels(checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "photo.jpg"
    shutil.copy(EXAMPLES / "000000000885.jpg", image)
    output = tmp_path / "out"
    command = ["predict", str(image), "--checkpoint", str(checkpoint), "--output", str(output), "--no-draw"]
    every = [word for name in FORMATS for word in ("--format", name)]
    result = CliRunner().invoke(app, [*command, *every])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1:] == [f"results: {output / name}" for name, _ in FORMATS.values()]
    assert sorted(path.name for path in output.iterdir()) == sorted(name for name, _ in FORMATS.values())
    scores = json.loads((output / "predictions.json").read_text())["annotations"]
    for dataset in (open_dataset(output, tmp_path), open_dataset(output / "yolo", split="val")):
        assert dataset.report.people == len(scores) == 10
        assert dataset.skeleton == COCO
        points = [[pose["keypoints"][i : i + 2] for i in range(0, 51, 3)] for pose in scores]
        np.testing.assert_allclose(dataset[0].keypoints[..., :2], points, atol=1e-3)
    again = CliRunner().invoke(app, [*command, "--format", "csv", "--format", "yolo"])
    assert again.exit_code == 2
    assert "yolo: exists already, and labels are never written over" in again.stderr
    unknown = CliRunner().invoke(app, [*command, "--format", "xml"])
    assert unknown.exit_code == 2
    assert "format 'xml': expected one of coco, coco-labels, yolo, labelme, csv" in unknown.stderr
    elsewhere = CliRunner().invoke(app, [*command, "--format", "csv", "--json", "x.json"])
    assert "expected --format coco among the others" in elsewhere.stderr


def test_images_that_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"photo.dat: a YOLO data set knows images by their suffix"):
        check_formats(["yolo"], [tmp_path / "photo.dat"], tmp_path)
    nameless = replace(made_results(tmp_path)[0], path=None)
    with pytest.raises(InputError, match="did not come from a file"):
        labelme_json(nameless, CLASSES, tmp_path)
    with pytest.raises(InputError, match="no image, expected at least one result"):
        write_format("csv", [], CLASSES, tmp_path)


def test_supervision_and_back(tmp_path: Path) -> None:
    for result in made_results(tmp_path):
        again = PoseResult.from_supervision(result.to_supervision(), result.image_size, ANIMAL, result.path)
        for name in ("keypoints", "keypoint_scores", "scores", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(again, name), getattr(result, name), err_msg=name)
            assert getattr(again, name).dtype == getattr(result, name).dtype
        assert (again.skeleton, again.image_size, again.path) == (ANIMAL, result.image_size, result.path)


def test_poses_of_other_libraries() -> None:
    points = np.float32([[[5, 6], [0, 0], [9, 2]], [[1, 1], [2, 2], [3, 3]]])
    bare = PoseResult.from_supervision(sv.KeyPoints(xy=points), (10, 10))
    assert (bare.scores == 1).all()
    assert (bare.keypoint_scores == 1).all()
    assert (bare.labels.tolist(), bare.skeleton.num_keypoints) == ([0, 0], 3)
    hidden = sv.KeyPoints(
        xy=points,
        visible=np.array([[True, False, True], [False] * 3]),
        detection_confidence=np.float32([0.2, 0.7]),
    )
    best_first = PoseResult.from_supervision(hidden, (10, 10), ANIMAL)
    assert best_first.scores.tolist() == pytest.approx([0.7, 0.2])
    assert best_first.boxes.tolist() == [[1, 1, 3, 3], [5, 2, 9, 6]], "the missing keypoint at 0, 0 is in the box"
    assert best_first.keypoint_scores[1].tolist() == [1, 0, 1]
    assert len(PoseResult.from_supervision(sv.KeyPoints.empty(), (10, 10), ANIMAL)) == 0
    with pytest.raises(InputError, match="3 a pose, expected the skeleton's 17"):
        PoseResult.from_supervision(sv.KeyPoints(xy=points), (10, 10), COCO)
