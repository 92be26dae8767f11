import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hpetr.data import HPetrImageProcessor
from hpetr.errors import InputError
from hpetr.images.pixels import resize_image

GOLDEN = Path(__file__).parent / "preprocess_golden"
SMALL = {"shortest_edge": 80, "longest_edge": 133}


@pytest.mark.parametrize(("preset", "file"), [("petr-r50", "preprocess"), ("group-pose-r50", "preprocess_group_pose")])
@pytest.mark.parametrize("name", ["000000000785.jpg", "000000000885.jpg"])
def test_pixels_equal_the_official_pipeline(name, preset, file):
    golden = json.loads((GOLDEN / f"{file}.json").read_text())[name]
    values = HPetrImageProcessor.preset(preset)(GOLDEN / name)["pixel_values"][0]
    assert list(values.shape) == golden["shape"]
    np.testing.assert_allclose(values.mean((1, 2)), golden["mean"], atol=2e-3)
    np.testing.assert_allclose(values.std((1, 2)), golden["std"], atol=2e-3)
    rows, columns = golden["sample_yx"]
    sample = values[:, rows][:, :, columns]
    # Another JPEG decoder may differ by a level or two of 255 in a pixel: 0.018 each.
    np.testing.assert_allclose(sample, golden["sample"], atol=0.08)


@pytest.mark.parametrize(("size", "resized"), [((640, 427), (1199, 800)), ((90, 60), (33, 22)), ((64, 33), (64, 111))])
def test_antialiased_resize_equals_pillows(size, resized):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_image(pixels, *resized[::-1], antialias=True), expected)


def test_batch_equals_single_and_padding_is_masked():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (90, 50))]
    processor = HPetrImageProcessor(size=SMALL, pad_size_divisor=32)
    batch = processor(images)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_mask"].dtype == torch.int64
    assert batch["pixel_values"].shape == (2, 3, 160, 128)
    assert batch.original_sizes == [(40, 60), (90, 50)]
    assert set(batch.keys()) == {"pixel_values", "pixel_mask"}
    for index, (image, (height, width)) in enumerate(zip(images, [(80, 120), (133, 74)], strict=True)):
        mask = batch["pixel_mask"][index]
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
        assert (batch["pixel_values"][index][:, mask == 0] == 0).all()
        single = processor(image)["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][index, :, :height, :width], single[:, :height, :width])


@pytest.mark.parametrize(("size", "resized"), [((1, 1), (800, 800)), ((20_000, 20), (1, 1333))])
def test_extreme_images_give_a_batch_the_model_can_take(size, resized):
    batch = HPetrImageProcessor()(Image.new("RGB", size))
    assert batch["pixel_mask"].sum() == resized[0] * resized[1]
    assert min(batch["pixel_values"].shape[2:]) >= 64
    assert batch.original_sizes == [(size[1], size[0])]


def test_one_image_a_list_and_a_stack_of_arrays():
    stack = np.zeros((2, 8, 8, 3), np.uint8)
    processor = HPetrImageProcessor(size=SMALL)
    assert len(processor(stack)["pixel_values"]) == 2
    assert len(processor(list(stack))["pixel_values"]) == 2
    assert len(processor(stack[0])["pixel_values"]) == 1
    assert isinstance(processor(stack, return_tensors="np")["pixel_values"], np.ndarray)
    assert processor(stack, size={"shortest_edge": 70, "longest_edge": 90})["pixel_mask"].sum() == 2 * 70 * 70


def test_original_sizes_survive_workers_and_devices():
    batch = HPetrImageProcessor(size=SMALL)(np.zeros((8, 9, 3), np.uint8))
    assert pickle.loads(pickle.dumps(batch)).original_sizes == [(8, 9)]
    assert batch.to("cpu").original_sizes == [(8, 9)]


def test_save_and_load(tmp_path):
    processor = HPetrImageProcessor(size=SMALL, pad_size_divisor=32, threshold=0.4)
    processor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert HPetrImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert HPetrImageProcessor.from_pretrained(tmp_path, threshold=0.1).threshold == 0.1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": {"height": 800, "width": 800}}, "shortest_edge"),
        ({"size": {"shortest_edge": 0, "longest_edge": 10}}, "positive"),
        ({"size": {"shortest_edge": 20, "longest_edge": 10}}, "longest_edge >="),
        ({"image_mean": [123.675, 116.28, 103.53]}, "divide by 255"),
        ({"image_std": [0.2, 0.2]}, "three numbers"),
        ({"image_std": [0.2, 0.2, 0.0]}, "image_std"),
        ({"pad_size_divisor": 0}, "pad_size_divisor"),
        ({"threshold": 2}, "threshold"),
        ({"do_resize": True}, "unknown parameter 'do_resize'"),
    ],
)
def test_invalid_parameters_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        HPetrImageProcessor(**values)


def test_bad_images_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jpg"):
        HPetrImageProcessor()([np.zeros((4, 4, 3), np.uint8), tmp_path / "nowhere.jpg"])
    with pytest.raises(InputError, match="empty"):
        HPetrImageProcessor()([])


def make_outputs(k=3):
    poses = torch.rand(2, 4, k, 2, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    scores = torch.tensor([[0.2, 0.9, 0.5, 0.3], [0.1, 0.1, 0.05, 0.0]])
    return SimpleNamespace(scores=scores, poses=poses)


def test_post_processing_equals_the_official_way_through_the_resized_image():
    outputs = make_outputs(k=5)
    sizes = [(425, 640), (333, 77)]
    results = HPetrImageProcessor().post_process_pose_estimation(outputs, sizes, threshold=-1)
    for index, (height, width) in enumerate(sizes):
        scale = min(1333 / max(height, width), 800 / min(height, width))
        resized = torch.tensor([int(width * scale + 0.5), int(height * scale + 0.5)])
        pixels = outputs.poses[index] * resized
        pixels = torch.minimum(pixels.clamp(min=0), resized) / (resized / torch.tensor([width, height]))
        order = outputs.scores[index].argsort(descending=True, stable=True)
        torch.testing.assert_close(results[index]["keypoints"], pixels[order], rtol=1e-5, atol=1e-3)


def test_post_processing_orders_thresholds_and_boxes():
    outputs = make_outputs()
    first, second = HPetrImageProcessor().post_process_pose_estimation(outputs, torch.tensor([[10, 20], [30, 40]]))
    assert first["scores"].tolist() == pytest.approx([0.9, 0.5])  # 0.3 itself is not above the threshold
    assert first["keypoint_scores"].eq(1).all()
    assert first["keypoint_scores"].shape == (2, 3)
    assert first["labels"].dtype == torch.int64
    assert torch.equal(first["boxes"][:, :2], first["keypoints"].amin(1))
    assert torch.equal(first["boxes"][:, 2:], first["keypoints"].amax(1))
    assert first["keypoints"].amin() >= 0
    assert (first["keypoints"].amax((0, 1)) <= torch.tensor([20, 10])).all()
    shapes = {name: tuple(values.shape) for name, values in second.items()}
    assert shapes == {
        "scores": (0,),
        "keypoints": (0, 3, 2),
        "keypoint_scores": (0, 3),
        "boxes": (0, 4),
        "labels": (0,),
    }


def test_post_processing_passes_keypoint_scores_and_labels_on():
    outputs = make_outputs()
    outputs.keypoint_scores = torch.arange(24.0).reshape(2, 4, 3)
    outputs.pose_labels = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    first, _ = HPetrImageProcessor().post_process_pose_estimation(outputs, [(10, 20), (30, 40)])
    assert first["labels"].tolist() == [1, 2]
    assert first["keypoint_scores"].tolist() == [[3, 4, 5], [6, 7, 8]]


def test_post_processing_wants_a_size_per_image():
    with pytest.raises(InputError, match=r"expected \(2, 2\)"):
        HPetrImageProcessor().post_process_pose_estimation(make_outputs(), [(10, 20)])
