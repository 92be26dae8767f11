"""Prediction from Python: kinds of input, results and their other forms, and checkpoints that are not what they should
be."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpetr import HPetrImageProcessor, InputError, PosePredictor, PoseResult, Skeleton
from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
from hpetr.images.files import output_names, write_json
from hpetr.images.read import load_image
from hpetr.inference.files import find_images
from hpetr.poses.draw import line_width, person_color
from hpetr.poses.skeleton import COCO
from paths import EXAMPLES

IMAGE = EXAMPLES / "000000000885.jpg"
OTHER = EXAMPLES / "000000329323.jpg"


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> PosePredictor:
    return PosePredictor(checkpoint, device="cpu")


def made_result(count: int, size: tuple[int, int] = (200, 300), path: Path | None = None) -> PoseResult:
    """`count` people with upright, separate skeletons; scores fall with the rank."""
    rng = np.random.default_rng(0)
    height, width = size
    corner = np.stack([np.linspace(10, width * 0.7, count), np.full(count, height * 0.2)], -1)
    keypoints = (corner[:, None] + rng.random((count, 17, 2)) * (width * 0.2, height * 0.6)).astype(np.float32)
    return PoseResult(
        keypoints=keypoints,
        keypoint_scores=np.ones((count, 17), np.float32),
        scores=np.linspace(0.9, 0.4, count, dtype=np.float32),
        boxes=np.concatenate([keypoints.min(1), keypoints.max(1)], 1).reshape(count, 4),
        labels=np.zeros(count, np.int64),
        skeleton=COCO,
        image_size=size,
        path=path,
    )


def test_one_image_gives_one_result_in_its_pixels(predictor: PosePredictor) -> None:
    result = predictor(IMAGE)
    height, width = load_image(IMAGE).shape[:2]
    assert isinstance(result, PoseResult)
    assert result.path == IMAGE
    assert result.image_size == (height, width)
    assert result.keypoints.shape == (10, 17, 2)
    assert result.keypoint_scores.shape == (10, 17)
    assert result.boxes.shape == (10, 4)
    assert result.labels.tolist() == [0] * 10
    assert (np.diff(result.scores) <= 0).all()
    assert (result.keypoints >= 0).all()
    assert (result.keypoints <= (width, height)).all()
    assert result.keypoints[..., 0].max() > 2, "normalized coordinates, expected pixels"


def test_path_string_array_and_pil_image_agree(predictor: PosePredictor) -> None:
    array = load_image(IMAGE)
    results = predictor([IMAGE, str(IMAGE), array, Image.fromarray(array)])
    for result in results[1:]:
        np.testing.assert_array_equal(result.keypoints, results[0].keypoints)
    assert [result.path for result in results] == [IMAGE, IMAGE, None, None]


def test_batch_gives_what_single_images_give(predictor: PosePredictor) -> None:
    image = load_image(IMAGE)
    images = [image, image[:, ::-1], image[::-1]]  # of one size: padding changes normalization slightly
    singles = predictor(images, batch_size=1)
    batched = predictor(images, batch_size=2)
    assert len(batched) == 3
    for one, many in zip(singles, batched, strict=True):
        np.testing.assert_allclose(many.scores, one.scores, atol=1e-5)
        np.testing.assert_allclose(many.keypoints, one.keypoints, atol=0.05)
    assert np.abs(singles[0].keypoints - singles[1].keypoints).max() > 10, "images that tell the order"


def test_images_of_different_sizes_in_one_batch(predictor: PosePredictor) -> None:
    wide, tall = predictor([IMAGE, OTHER], batch_size=2)
    for result, path in ((wide, IMAGE), (tall, OTHER)):
        height, width = load_image(path).shape[:2]
        assert result.image_size == (height, width)
        assert (result.keypoints <= (width, height)).all()
    assert tall.keypoints[..., 1].max() > wide.image_size[0], "scaled to another image's size"


def test_empty_list_gives_empty_list(predictor: PosePredictor) -> None:
    assert predictor([]) == []


def test_batch_size_below_one_is_refused(predictor: PosePredictor) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        predictor([IMAGE], batch_size=0)


def test_threshold_keeps_only_higher_scores(predictor: PosePredictor, checkpoint: Path) -> None:
    scores = predictor(IMAGE).scores
    middle = float(scores[4])
    stricter = PosePredictor(checkpoint, device="cpu", threshold=middle)
    np.testing.assert_array_equal(stricter(IMAGE).scores, scores[scores > middle])
    assert len(PosePredictor(checkpoint, device="cpu", threshold=1.0)(IMAGE)) == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_threshold_outside_its_range_is_refused(checkpoint: Path, threshold: float) -> None:
    with pytest.raises(InputError, match="threshold"):
        PosePredictor(checkpoint, threshold=threshold)


def test_unknown_device_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="device gpu7"):
        PosePredictor(checkpoint, device="gpu7")


def test_supervision_gets_confidences_of_keypoints_and_poses() -> None:
    result = made_result(3)
    key_points = result.to_supervision()
    np.testing.assert_array_equal(key_points.xy, result.keypoints)
    np.testing.assert_array_equal(key_points.keypoint_confidence, result.keypoint_scores)
    np.testing.assert_array_equal(key_points.detection_confidence, result.scores)
    assert len(made_result(0).to_supervision()) == 0


def test_coco_results_have_the_official_fields() -> None:
    result = made_result(2)
    poses = result.to_coco(image_id=42, category_id=[7])
    assert [pose["image_id"] for pose in poses] == [42, 42]
    assert [pose["category_id"] for pose in poses] == [7, 7]
    assert json.loads(json.dumps(poses)) == poses
    np.testing.assert_allclose(np.reshape(poses[1]["keypoints"], (17, 3))[:, :2], result.keypoints[1], atol=1e-3)
    x1, y1, x2, y2 = result.boxes[1]
    np.testing.assert_allclose(poses[1]["bbox"], [x1, y1, x2 - x1, y2 - y1], atol=1e-3)
    assert made_result(0).to_coco(1) == []


def test_drawing_changes_the_image_only_near_people() -> None:
    result = made_result(1)
    image = np.full((200, 300, 3), 128, np.uint8)
    drawn = result.draw(image)
    assert (image == 128).all(), "the image given was painted on"
    changed = np.argwhere((drawn != image).any(-1))
    x1, _, x2, y2 = result.boxes[0]
    assert len(changed) > 200
    assert changed[:, 1].max() < max(x2, x1 + 60) + 10
    assert changed[:, 0].max() < y2 + 10


def test_joints_below_the_threshold_and_their_limbs_are_not_drawn() -> None:
    result = made_result(1)
    image = np.full((200, 300, 3), 128, np.uint8)
    result.keypoint_scores[0, 1:] = 0.1
    one_joint = (result.draw(image) != result.draw(image, keypoint_threshold=1.1)).any(-1)
    x, y = result.keypoints[0, 0]
    rows, columns = np.nonzero(one_joint)
    assert len(rows) > 0
    assert np.hypot(columns - x, rows - y).max() < 12


def test_every_person_has_its_own_color_in_rgb() -> None:
    colors = {person_color(index) for index in range(60)}
    assert len(colors) == 60
    result = made_result(1)
    drawn = result.draw(np.zeros((200, 300, 3), np.uint8))
    color = person_color(0)
    assert (drawn == color).all(-1).sum() > 100


def test_lines_grow_with_person_and_image() -> None:
    small, large = np.array([0, 0, 10, 20]), np.array([0, 0, 400, 600])
    assert line_width(small, (640, 480)) < line_width(large, (640, 480))
    assert line_width(large, (640, 480)) < line_width(large * 6, (3840, 2880))
    assert line_width(np.zeros(4), (8, 8)) == 1


def test_drawing_needs_the_predicted_image() -> None:
    with pytest.raises(InputError, match="did not come from a file"):
        made_result(1).draw()
    with pytest.raises(InputError, match="expected the predicted one's"):
        made_result(1).draw(np.zeros((50, 50, 3), np.uint8))
    size = load_image(IMAGE).shape[:2]
    assert made_result(1, size=size, path=IMAGE).draw().shape == (*size, 3)


def test_drawing_without_people_or_edges() -> None:
    image = np.full((200, 300, 3), 9, np.uint8)
    np.testing.assert_array_equal(made_result(0).draw(image), image)
    bare = made_result(1).__dict__ | {"skeleton": Skeleton.generic(17)}
    assert (PoseResult(**bare).draw(image) != image).any()


def test_results_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, [float("nan")])
    assert json.loads(path.read_text()) == [1]
    assert list(tmp_path.iterdir()) == [path]


def test_images_of_folders_globs_and_files_come_once(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "notes.txt", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([str(tmp_path), str(tmp_path / "*.png"), str(tmp_path / "notes.txt")])
    assert [path.name for path in found.images] == ["a.png", "b.JPG", "notes.txt"]
    assert [path.name for path in found.passed_over] == ["notes.txt"]
    deep = find_images([str(tmp_path)], recursive=True)
    assert [path.name for path in deep.images] == ["a.png", "b.JPG", "c.jpg"]
    with pytest.raises(InputError, match="matches no file"):
        find_images([str(tmp_path / "*.webp")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="sub-folders are searched with --recursive"):
        find_images([str(tmp_path / "empty")])


def test_equal_names_get_different_outputs() -> None:
    names = output_names([Path(p) for p in ("x/a.jpg", "y/a.jpg", "z/y/a.jpg", "z/A.JPG", "x/a.png", "x/a.webp")])
    assert len({name.lower() for name in names}) == 6
    assert names[:3] == ["a.jpg", "y_a.jpg", "y_a_2.jpg"]
    assert names[4:] == ["a.png", "x_a.png"]


def test_saved_checkpoint_loads_exactly(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    assert not model.training
    save_checkpoint(model, processor, tmp_path / "copy")
    again, processor_again = load_checkpoint(tmp_path / "copy", "cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert processor_again.size == processor.size
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(model, processor, tmp_path / "copy")


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _pickled_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(folder / "executed")))


def _edit_json(name: str, **values: object) -> object:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (_edit_json("config.json", model_type="vitpose"), "model_type is 'vitpose', expected 'hpetr'"),
        (_edit_json("config.json", encoder_layers=2), "is missing .*expected the weights of config.json"),
        (_edit_json("config.json", encoder_ffn_dim=64), "has another shape"),
        (_edit_json("config.json", num_poses=5, num_keypoints=3), "skeleton has 17 joints"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (_edit_json("preprocessor_config.json", threshold=7), "preprocessor_config.json: .*threshold is 7"),
        (_truncate, "model.safetensors: cannot be read, truncated"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (_pickled_only, "pytorch_model.bin is pickled and never loaded"),
    ],
)
def test_broken_checkpoint_gives_one_line(checkpoint: Path, tmp_path: Path, damage, message: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        PosePredictor(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert not (folder / "executed").exists()


def test_official_file_instead_of_a_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "petr.pth").touch()
    with pytest.raises(InputError, match="hpetr convert"):
        PosePredictor(tmp_path / "petr.pth")


def test_loaded_model_predicts_at_its_own_size(tmp_path: Path, checkpoint: Path) -> None:
    model, _ = load_checkpoint(checkpoint, "cpu")
    processor = HPetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, threshold=0.0)
    save_checkpoint(model, processor, tmp_path / "small")
    assert len(PosePredictor(tmp_path / "small", device="cpu")(IMAGE)) == 10
