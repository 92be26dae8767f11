import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

from hpetr.data import load_image, open_dataset
from hpetr.data.check import check_dataset
from hpetr.data.yolo import image_size, label_file, read_yolo
from hpetr.errors import InputError
from hpetr.evaluation.evaluate import coco_metrics
from hpetr.poses.skeleton import COCO
from paths import TINY

CONFIG = {
    "path": ".",
    "train": "images/train",
    "val": "images/val",
    "names": {0: "cat", 1: "dog"},
    "kpt_shape": [2, 3],
    "kpt_names": ["left_ear", "right_ear"],
    "sigmas": [0.1, 0.1],
}


GOOD = "0 0.5 0.5 0.5 0.5 0.5 0.5 2 0.4 0.4 2"


def write(folder, labels, config=None, size=(40, 20)):
    """A data set of one split: `labels` maps image names to label texts, or None for no label file."""
    for name, text in labels.items():
        image = folder / "images" / "train" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(image)
        if text is not None:
            label = (folder / "labels" / "train" / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **(config or {})}))
    return path


def test_people_classes_and_background(tmp_path):
    labels = {
        "b.png": "1 0.5 0.5 0.5 1.0 0.25 0.5 2 0 0 0\n\n0 0.25 0.5 0.5 0.5 0.1 0.4 1 0.2 0.6 2\n",
        "a.png": None,
        "sub/c.png": "0 0.5 0.5 0.2 0.2 0 0 0 0 0 0\n",
    }
    dataset = open_dataset(write(tmp_path, labels), split="train")
    assert [path.name for path in dataset.image_paths] == ["a.png", "b.png", "c.png"]
    assert dataset.image_sizes.tolist() == [[40, 20]] * 3
    empty, full, ignored = dataset[0], dataset[1], dataset[2]
    assert empty.keypoints.shape == (0, 2, 3)
    assert full.class_labels.tolist() == [1, 0]
    np.testing.assert_allclose(full.keypoints, [[[10, 10, 2], [0, 0, 0]], [[4, 8, 1], [8, 12, 2]]], rtol=1e-6)
    assert full.boxes.tolist() == [[10, 0, 30, 20], [0, 5, 20, 15]]
    assert full.areas.tolist() == pytest.approx([0.53 * 400, 0.53 * 200])
    assert len(ignored.keypoints) == 0
    assert len(ignored.ignore_boxes) == 1
    assert dataset.skeleton.flip_pairs == ((0, 1),)
    assert (dataset.report.images_without_people, dataset.report.people_without_keypoints) == (2, 1)
    assert [c["name"] for c in dataset.ground_truth()["categories"]] == ["cat", "dog"]


def test_two_numbers_a_keypoint_take_the_corner_as_unlabelled(tmp_path):
    path = write(tmp_path, {"a.png": "0 0.5 0.5 0.5 0.5 0.5 0.5 0 0"}, {"kpt_shape": [2, 2]})
    assert open_dataset(path, split="train")[0].keypoints.tolist() == [[[20, 10, 2], [0, 0, 0]]]


def test_area_of_box_and_limit(tmp_path):
    path = write(tmp_path, {f"{name}.png": GOOD for name in "abc"})
    dataset = open_dataset(path, split="train", limit=2, area_of_box=1.0)
    assert len(dataset) == 2
    assert dataset[0].areas.tolist() == [200]
    assert dataset[-1].image_id == 2
    assert len(dataset.ground_truth()["annotations"]) == 2
    assert dataset.ground_truth()["annotations"][0]["area"] == pytest.approx(0.53 * 200), "evaluation keeps its scale"


def test_a_coco_data_set_written_as_yolo_reads_the_same(tmp_path):
    """examples/tiny-coco there and back; and the perfect answer to it gets perfect figures."""
    coco = open_dataset(TINY / "annotations.json")
    truth = coco.ground_truth()
    (tmp_path / "images").symlink_to(TINY / "images", target_is_directory=True)
    (tmp_path / "labels").mkdir()
    for image in truth["images"]:
        lines = []
        for person in (a for a in truth["annotations"] if a["image_id"] == image["id"]):
            x, y, w, h = person["bbox"]
            points = np.reshape(person["keypoints"], (-1, 3)) / (image["width"], image["height"], 1)
            box = ((x + w / 2) / image["width"], (y + h / 2) / image["height"], w / image["width"], h / image["height"])
            lines.append("0 " + " ".join(f"{value:.6f}" for value in [*box, *points.ravel()]))
        (tmp_path / "labels" / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(lines))
    config = {"train": "images", "names": ["person"], "kpt_shape": [17, 3], "flip_idx": COCO.flip_index}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))
    yolo = open_dataset(tmp_path, split="train")
    assert yolo.skeleton == coco.skeleton == COCO
    order = {path.name: index for index, path in enumerate(yolo.image_paths)}
    for index, path in enumerate(coco.image_paths):
        expected, found = coco[index], yolo[order[path.name]]
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=1e-3)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=2e-3)
        np.testing.assert_allclose(found.areas, expected.areas, rtol=1e-3)
    answer = [{**a, "score": 0.5} for a in yolo.ground_truth()["annotations"]]
    assert coco_metrics(yolo.ground_truth(), answer, COCO.sigmas)["AP"] == pytest.approx(1)


def test_lists_of_images_and_of_folders(tmp_path):
    path = write(tmp_path, {f"{name}/a.png": GOOD for name in ("one", "two")})
    (tmp_path / "list.txt").write_text("./images/train/two/a.png\n\nimages/train/one/a.png\n")
    path.write_text(yaml.safe_dump({**CONFIG, "train": ["images/train/one", "images/train/two"], "val": "list.txt"}))
    folders = [[p.parent.name for p in open_dataset(path, split=split).image_paths] for split in ("train", "val")]
    assert folders == [["one", "two"], ["two", "one"]]
    (tmp_path / "list.txt").write_text("images/train/three/a.png\n./images/train/one/a.png")
    with pytest.raises(InputError, match=r"three.a\.png: no such file"):
        open_dataset(path, split="val")


def test_lists_with_a_byte_order_mark_and_roboflows_paths(tmp_path):
    path = write(tmp_path, {"a.png": GOOD})
    (tmp_path / "list.txt").write_text("images/train/a.png\n", encoding="utf-8-sig")
    path.write_text(yaml.safe_dump({**CONFIG, "train": "../images/train", "val": "list.txt", "test": ""}))
    images = [open_dataset(path, split=split).image_paths for split in ("train", "val")]
    assert images == [[tmp_path / "images" / "train" / "a.png"]] * 2


def test_labels_without_an_image_and_images_without_a_label(tmp_path):
    names = ("a.png", "a.bmp", "lost.png", "beside.png", "c.png")
    path = write(tmp_path, dict.fromkeys(names, GOOD))
    images, labels = (tmp_path / name / "train" for name in ("images", "labels"))
    (labels / "lost.txt").rename(labels / "lots.txt")
    (labels / "beside.txt").rename(images / "beside.txt")
    (labels / "classes.txt").write_text("cat")
    expected = {"images without a label file": 2, "label files without an image": 1, "label files of several images": 1}
    dataset = open_dataset(path, split="train")
    assert dataset.report.images_without_people == 2
    assert len(dataset.warnings) == 3
    assert (
        f"{path}: 2 images without a label file, e.g. {images / 'beside.png'}: taken as background"
        in dataset.warnings[0]
    )
    assert dataset.warnings[0].endswith(f"{images / 'beside.txt'} is not read")
    report = check_dataset(path, split="train", decode=False)
    assert {f.kind: f.count for f in report.findings if f.kind in expected} == expected
    assert report.accepted
    path.write_text(yaml.safe_dump({**CONFIG, "train": ["list.txt"]}))
    (tmp_path / "list.txt").write_text("images/train/c.png")
    kinds = [problem.kind for problem in read_yolo(path).warnings]
    assert kinds == ["label files without an image"], "images that a list leaves out own their labels"


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("data/images/train/a.jpg", "data/labels/train/a.txt"),
        ("images/x/images/a.b.png", "images/x/labels/a.b.txt"),
        ("photos/a.jpg", "photos/a.txt"),
    ],
)
def test_label_file(image, label):
    assert label_file(image.replace("/", os.sep)) == label.replace("/", os.sep)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 2 0.4 0.4", "line 2: 10 numbers, expected 11"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 2 0.4 x 2", "line 2: .*expected numbers"),
        ("0 0.5 0.5 0.5 0.5 nan 0.5 2 0.4 0.4 2", "line 2: expected finite numbers"),
        ("2 0.5 0.5 0.5 0.5 0.5 0.5 2 0.4 0.4 2", r"line 2: class 2, expected a whole number in 0\.\.1"),
        ("0.5 0.5 0.5 0.5 0.5 0.5 0.5 2 0.4 0.4 2", r"line 2: class 0\.5"),
        ("0 0.5 0.5 0.5 0.5 0.5 0.5 3 0.4 0.4 2", "line 2: .*visibility other than 0, 1, 2"),
        ("0 0.5 0.5 0 0.5 0.5 0.5 2 0.4 0.4 2", "line 2: box of 0 x 0.5, expected a positive width"),
        ("0 0.5 0.5 0.5 0.5 320 0.5 2 0.4 0.4 2", "line 2: coordinate 320, expected shares"),
        ("0 20 10 20 10 0.5 0.5 2 0.4 0.4 2", "line 2: coordinate 20, expected shares"),
    ],
)
def test_wrong_labels_name_file_and_line(tmp_path, line, words):
    path = write(tmp_path, {"a.png": f"{GOOD}\n{line}\n{GOOD}\n"})
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(path, split="train")
    assert os.path.join("labels", "train", "a.txt") in str(caught.value)
    assert "\n" not in str(caught.value)
    loaded = read_yolo(path, split="train")
    assert (len(loaded.problems), loaded.lines.tolist()) == (1, [1, 3])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kpt_shape": None}, "key 'kpt_shape' is missing"),
        ({"kpt_shape": [2, 4]}, r"'kpt_shape' is \[2, 4\]"),
        ({"kpt_shape": 17}, "'kpt_shape' is 17"),
        ({"names": {1: "cat", 2: "dog"}}, "'names' has the keys"),
        ({"names": []}, r"'names' is \[\]"),
        ({"flip_idx": [1, 2]}, "'flip_idx' has 2 at place 1"),
        ({"flip_idx": [0]}, "'flip_idx' has 1 entries, expected 2"),
        ({"kpt_names": ["a"]}, "'kpt_names' has 1 names for class 0, expected 2"),
        ({"kpt_names": {0: ["a", "b"]}}, "'kpt_names' has None for class 1"),
        ({"sigmas": [0.1]}, "1 sigmas, expected 2"),
        ({"sigmas": [None, 0.1]}, "numbers in 'sigmas'"),
        ({"skeleton": [[0, 2]]}, r"'skeleton' has \[0, 2\], expected pairs of different indices in 0\.\.1"),
        ({"skeleton": [0, 1]}, "'skeleton' has 0, expected pairs"),
        ({"skeleton": [[0, 1, 1]]}, r"'skeleton' has \[0, 1, 1\], expected pairs"),
        ({"skeleton": [[[0], [1]]]}, r"'skeleton' has \[\[0\], \[1\]\], expected pairs"),
        ({"train": "elsewhere"}, "'train': no folder or .txt"),
        ({"train": 3}, "'train' is 3"),
        ({"train": False}, "'train' is False"),
        ({"kpt_names": {0: ["a", "b"], 1: ["b", "a"]}}, r"categories 2 and 1 differ .*keypoint 0 is 'b' and 'a'"),
        ({"train": None}, "split 'train' is not given, expected one of those there: val"),
    ],
)
def test_wrong_configurations_name_file_and_key(tmp_path, change, words):
    path = write(tmp_path, {"a.png": ""}, change)
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(path, split="train")
    assert "data.yaml" in str(caught.value)


def test_flip_idx_that_is_no_involution(tmp_path):
    change = {"kpt_shape": [3, 3], "kpt_names": ["a", "b", "c"], "flip_idx": [1, 2, 0], "sigmas": [0.1] * 3}
    with pytest.raises(InputError, match=r"data\.yaml.*'flip_idx' maps keypoint 0 to 1 but 1 to 2"):
        open_dataset(write(tmp_path, {"a.png": ""}, change), split="train")


def test_no_label_file_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no image has a label file, expected e\.g\. .*labels.train.a\.txt"):
        open_dataset(write(tmp_path, {"a.png": None}), split="train")


def test_split_is_for_yolo_alone(tmp_path):
    with pytest.raises(InputError, match="split is not given"):
        open_dataset(write(tmp_path, {"a.png": ""}))
    with pytest.raises(InputError, match="expected none for a COCO"):
        open_dataset(TINY, split="train")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp", "gif"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_image_size_is_that_of_the_loaded_image(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, **({} if suffix in ("bmp", "gif") else {"exif": exif}))
    height, width = load_image(path).shape[:2]
    assert image_size(path) == (width, height)
    assert suffix in ("bmp", "gif") or (width > height) == (orientation != 6)


def test_orientation_behind_the_pixels_of_a_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, late = tmp_path / "plain.png", tmp_path / "late.png"
    Image.new("RGB", (30, 20)).save(plain)
    data = plain.read_bytes()
    with open(tmp_path / "chunk", "wb") as file:
        PngImagePlugin.putchunk(file, b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00"))
    end = data.rindex(b"IEND") - 4
    late.write_bytes(data[:end] + (tmp_path / "chunk").read_bytes() + data[end:])
    assert image_size(plain) == (30, 20)
    assert image_size(late) == load_image(late).shape[1::-1] == (20, 30)


def test_unreadable_images_are_problems_of_their_own(tmp_path):
    path = write(tmp_path, {"a.png": GOOD})
    (tmp_path / "images" / "train" / "a.png").write_bytes(b"no image")
    loaded = read_yolo(path, split="train")
    assert [problem.kind for problem in loaded.problems] == ["unreadable image"]
    assert (len(loaded.images), len(loaded.ids)) == (0, 0)
    with pytest.raises(InputError, match=r"a\.png: is not an image"):
        open_dataset(path, split="train")
    check = check_dataset(path, split="train")
    assert [finding.kind for finding in check.findings] == ["unreadable image"]
