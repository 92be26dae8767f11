"""Results in Python: chosen, compared, drawn, saved, and made of other libraries' key points."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image, ImageShow

from hpetr import InputError, PoseResult, Skeleton
from hpetr.images.read import load_image
from hpetr.poses.formats import FORMATS, coco_labels, write_format
from hpetr.poses.postprocess import boxes_around, select_poses

ANIMAL = Skeleton(("nose", "left_ear", "right_ear"), ((0, 1), (0, 2)), ((1, 2),), (0.03, 0.05, 0.05))


def made_result(count: int = 3, **fields) -> PoseResult:
    """Poses in an image of 90 x 120 pixels; the last keypoint of every pose is uncertain."""
    rng = np.random.default_rng(0)
    keypoints = (rng.random((count, 3, 2)) * (120, 90)).astype(np.float32)
    keypoint_scores = np.tile(np.float32([0.9, 0.6, 0.2]), (count, 1))
    values = {
        "keypoints": keypoints,
        "keypoint_scores": keypoint_scores,
        "scores": np.linspace(0.9, 0.5, count, dtype=np.float32),
        "boxes": boxes_around(keypoints, keypoint_scores, 0.3),
        "labels": np.arange(count) % 2,
        "skeleton": ANIMAL,
        "image_size": (90, 120),
    }
    return PoseResult(**{**values, **fields})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (0, [0]),
        (np.int64(1), [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        ([], []),
        (np.array([2, 1]), [2, 1]),
        (np.array([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
    ],
)
def test_poses_are_chosen_by_index(chosen, expected: list[int]) -> None:
    result = made_result(path=Path("a.jpg"), keypoint_threshold=0.4)
    found = result[chosen]
    for name in ("keypoints", "keypoint_scores", "scores", "boxes", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(result, name)[expected], err_msg=name)
    assert (found.skeleton, found.image_size, found.path, found.keypoint_threshold) == (
        ANIMAL,
        (90, 120),
        result.path,
        0.4,
    )


def test_iteration_gives_one_result_for_each_pose() -> None:
    result = made_result()
    persons = list(result)
    assert [len(person) for person in persons] == [1, 1, 1]
    assert persons == [result[0], result[1], result[2]]
    with pytest.raises(IndexError):
        result[3]
    assert list(made_result(0)) == []


def test_results_compare_and_hash() -> None:
    result, same = made_result(path=Path("a.jpg")), made_result(path=Path("a.jpg"))
    assert result == same
    assert {result: 1}[same] == 1
    assert result in [same]
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    moved = result.keypoints + np.float32(1)
    for other in (
        made_result(2),
        made_result(),
        replace(result, keypoints=moved),
        replace(result, image_size=(9, 9)),
        3,
    ):
        assert result != other


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keypoints": np.zeros((3, 2, 2))}, r"keypoints of shape \(3, 2, 2\), expected \(3, 3, 2\)"),
        ({"labels": np.zeros(2)}, r"labels of shape \(2,\), expected \(3,\)"),
        ({"boxes": np.full((3, 4), np.nan)}, "boxes is not finite everywhere"),
        ({"keypoints": np.full((3, 3, 2), np.inf)}, "keypoints is not finite everywhere"),
        ({"scores": np.float32([0.9, np.nan, 0.1])}, "scores is not finite everywhere"),
        ({"labels": np.array([0, -1, 0])}, "labels has -1, expected class indices from 0"),
    ],
)
def test_fields_are_checked(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        made_result(**fields)


def test_fields_have_their_types() -> None:
    result = made_result(
        scores=[0.9, 0.8, 0.7],
        labels=np.array([0, 1, 1], np.int8),
        image_size=np.array([90, 120]),
        boxes=np.ones((3, 4)),
    )
    kinds = [getattr(result, name).dtype.name for name in ("keypoints", "scores", "boxes", "labels")]
    assert kinds == ["float32", "float32", "float32", "int64"]
    assert [type(side) for side in result.image_size] == [int, int]


def test_numpy_integers_are_ids() -> None:
    result = made_result(2)
    for ids in (np.int64(4), [4, 4], np.array([4, 4]), range(4, 6)):
        (first, _) = poses = result.to_coco(np.int64(7), ids)
        assert json.loads(json.dumps(poses)) == poses
        assert (first["image_id"], first["category_id"]) == (7, 4)
    assert made_result(0).to_coco(1, [1]) == []


def test_boxes_follow_the_found_keypoints() -> None:
    result = made_result()
    points = result.keypoints
    np.testing.assert_array_equal(result.found, np.tile([True, True, False], (3, 1)))
    two, three = points[:, :2], points
    np.testing.assert_array_equal(result.boxes, np.concatenate([two.min(1), two.max(1)], 1))
    np.testing.assert_array_equal(result.extents, np.concatenate([three.min(1), three.max(1)], 1))
    np.testing.assert_array_equal(result.with_keypoint_threshold(0.1).boxes, result.extents)
    hidden = result.with_keypoint_threshold(0.95)
    assert not hidden.found.any()
    np.testing.assert_array_equal(hidden.boxes, result.extents)
    assert (result.to_coco(1)[0]["bbox"][2:] == np.ptp(three[0].astype(float), axis=0).round(3)).all(), "as published"


def test_selection_of_poses() -> None:
    outputs = {
        "scores": np.float32([[0.2, 0.9, 0.9, 0.4]]),
        "poses": np.linspace(-0.5, 1.5, 16, dtype=np.float32).reshape(1, 4, 2, 2),
        "pose_labels": np.array([[0, 1, 2, 3]]),
        "keypoint_scores": np.float32([[[0.9, 0.1]] * 4]),
    }
    (found,) = select_poses(outputs, [(100, 200)], 0.3, 0.3)
    assert found["labels"].tolist() == [1, 2, 3], "best first, equal scores in the network's order"
    np.testing.assert_allclose(found["keypoints"], outputs["poses"][0, 1:].clip(0, 1) * (200, 100), rtol=1e-6)
    np.testing.assert_array_equal(found["boxes"], np.tile(found["keypoints"][:, 0], (1, 2)))
    assert [len(values) for values in select_poses(outputs, [(100, 200)], 1, 0.3)[0].values()] == [0] * 5
    with pytest.raises(InputError, match="no finite numbers"):
        select_poses({**outputs, "poses": outputs["poses"] * np.nan}, [(1, 1)], 0, 0)


def test_drawing_leaves_out_what_was_not_found() -> None:
    canvas = np.full((90, 120, 3), 128, np.uint8)
    result = made_result(1)
    nothing = (result.draw(canvas, keypoint_threshold=1) != canvas).any(-1)
    drawn = (result.draw(canvas) != result.draw(canvas, keypoint_threshold=1)).any(-1)
    assert (result.draw(canvas) == result.draw(canvas, keypoint_threshold=0.3)).all()
    assert drawn.any()
    assert nothing.any(), "the score is drawn"
    assert not (canvas != 128).any()
    ids = result.draw(canvas, track_ids=np.array([5]))
    assert (ids != result.draw(canvas)).any()


def test_saved_as_drawing_or_json(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((90, 120, 3), 128, np.uint8)).save(photo)
    result = made_result(path=photo)
    assert result.save(tmp_path / "drawn.png") == tmp_path / "drawn.png"
    np.testing.assert_array_equal(load_image(tmp_path / "drawn.png"), result.draw())
    content = json.loads(result.save(tmp_path / "poses.json").read_text())
    assert content == json.loads(result.to_json()) == result.to_dict()
    assert (content["file_name"], content["width"], content["height"]) == (str(photo), 120, 90)
    assert [pose["category_id"] for pose in content["poses"]] == [1, 2, 1]
    assert set(content["poses"][0]) == {"category_id", "keypoints", "bbox", "score"}
    with pytest.raises(InputError, match=r"photo.png: is one of the inputs"):
        result.save(photo)
    with pytest.raises(InputError, match=r"expected a file to write that ends in .json or .png"):
        result.save(tmp_path / "poses.txt")
    assert load_image(photo).mean() == 128


def test_shown_in_a_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Image.Image] = []

    class Viewer(ImageShow.Viewer):
        def show(self, image: Image.Image, **options) -> int:
            shown.append(image)
            return 1

    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    canvas = np.zeros((90, 120, 3), np.uint8)
    made_result().show(canvas)
    np.testing.assert_array_equal(np.asarray(shown[0]), made_result().draw(canvas))


def test_columns_of_a_table() -> None:
    result = made_result()
    columns = result.to_columns()
    assert list(columns)[:8] == ["person", "label", "score", "left", "top", "right", "bottom", "nose_x"]
    assert list(columns)[-1] == "right_ear_score"
    assert columns["person"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(columns["left_ear_y"], result.keypoints[:, 1, 1])
    pandas = pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert (list(frame), len(frame)) == (list(columns), 3)


@pytest.mark.parametrize("confidences", [None, np.ones((2, 3), np.float32), np.float32([[1, 1, np.nan], [1, 1, 1]])])
@pytest.mark.parametrize("form", FORMATS)
def test_keypoints_that_are_nan_were_not_found(tmp_path: Path, confidences, form: str) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (120, 90)).save(path)
    points = np.float32([[[10, 20], [30, 40], [np.nan, 7]], [[np.nan, np.nan]] * 3])
    foreign = sv.KeyPoints(xy=points, keypoint_confidence=confidences, class_id=np.array([0, 0]))
    result = PoseResult.from_supervision(foreign, (90, 120), ANIMAL, path)
    assert result.keypoint_scores.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert result.boxes[0].tolist() == result.extents[0].tolist() == [10, 20, 30, 40]
    assert result.with_keypoint_threshold(0).found.tolist() == [[True, True, False], [False] * 3]
    written = write_format(form, [result], ["cat"], tmp_path / "out")
    files = [written] if written.is_file() else [file for file in written.rglob("*") if file.suffix != ".png"]
    assert not any(re.search(r"\bnan\b", file.read_text(), re.IGNORECASE) for file in files if file.is_file())
    assert result.draw().shape == (90, 120, 3)


def test_hidden_and_uncertain_keypoints_of_supervision() -> None:
    result = made_result()
    key_points = result.to_supervision()
    np.testing.assert_array_equal(key_points.visible, result.found)
    assert PoseResult.from_supervision(key_points, (90, 120), ANIMAL) == result
    hidden = sv.KeyPoints(xy=result.keypoints, visible=np.tile([True, False, True], (3, 1)))
    assert PoseResult.from_supervision(hidden, (90, 120), ANIMAL).keypoint_scores.tolist() == [[1, 0, 1]] * 3
    with pytest.raises(InputError, match="labels has -1"):
        PoseResult.from_supervision(sv.KeyPoints(xy=result.keypoints, class_id=np.array([0, -1, 0])), (90, 120), ANIMAL)


def test_keypoints_outside_the_image_are_not_labelled(tmp_path: Path) -> None:
    points = np.float32([[[-5, 20], [30, 40], [50, 200]]])
    result = PoseResult.from_supervision(sv.KeyPoints(xy=points), (90, 120), ANIMAL, tmp_path / "a.png")
    (label,) = coco_labels([result], ["cat"])["annotations"]
    assert label["keypoints"] == [0, 0, 0, 30, 40, 2, 0, 0, 0]
    assert label["bbox"] == [29.5, 39.5, 1, 1]
