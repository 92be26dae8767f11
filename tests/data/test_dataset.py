import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from hpetr.data import PoseDataset, load_annotations, open_dataset
from hpetr.errors import InputError
from hpetr.poses.skeleton import COCO, CROWDPOSE

CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 10},
    ],
    "categories": [{"id": 2, "name": "cat", "keypoints": ["nose", "left_ear", "right_ear"], "sigmas": [0.1, 0.1, 0.1]}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [5, 5, 10, 20], "area": 99.0, "iscrowd": 0}
        | {"keypoints": [6, 7, 2, 9, 9, 1, 8, 8, 0]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [30, 10, 20, 10], "keypoints": [0] * 9},
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [1, 1, 2, 2], "iscrowd": 1},
        {
            "id": 4,
            "image_id": 7,
            "category_id": 2,
            "bbox": [10, 10, 20, 10],
            "keypoints": [12, 12, 2, 50, 12, 2, 0, 0, 0],
        },
        {"id": 5, "image_id": 7, "category_id": 2, "bbox": [10, 10, 0, 10], "keypoints": [0] * 9},
    ],
}


@pytest.fixture
def content():
    return copy.deepcopy(CONTENT)


def write(folder, content):
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    for image in CONTENT["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(folder / "images" / image["file_name"])
    path = folder / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_people_crowds_and_empty_images(tmp_path, content):
    dataset = open_dataset(write(tmp_path, content))
    assert len(dataset) == 2
    assert dataset.category["name"] == "cat"
    assert dataset.skeleton.flip_index == [0, 2, 1]
    sample, empty = dataset[0], dataset[1]
    assert sample.image.shape == (30, 40, 3)
    assert (sample.image_id, sample.path.name) == (7, "a.png")
    assert sample.keypoints.dtype == np.float32
    assert sample.keypoints.tolist() == [
        [[6, 7, 2], [9, 9, 1], [0, 0, 0]],
        [[12, 12, 2], [0, 0, 0], [0, 0, 0]],  # the second is outside the image
    ]
    assert sample.boxes.tolist() == [[5, 5, 15, 25], [10, 10, 30, 20]]
    assert sample.areas.tolist() == pytest.approx([99, 0.53 * 200])
    assert sample.class_labels.tolist() == [0, 0]
    assert sample.ignore_boxes.tolist() == [[30, 10, 40, 20], [1, 1, 3, 3]]  # clipped to the image
    assert empty.keypoints.shape == (0, 3, 3)
    assert empty.boxes.shape == empty.ignore_boxes.shape == (0, 4)
    assert dataset[-1].image_id == empty.image_id == 3


def test_report_counts_what_is_left_out(tmp_path, content):
    content["categories"].append({"id": 9, "name": "car"})
    content["annotations"].append({"id": 6, "image_id": 3, "category_id": 9, "bbox": [0, 0, 1, 1]})
    report = open_dataset(write(tmp_path, content)).report
    assert (report.images, report.images_without_people, report.people) == (2, 1, 2)
    assert (report.people_without_keypoints, report.crowds, report.boxes_without_extent) == (2, 1, 1)
    assert (report.keypoints_outside, report.filled_areas, report.other_categories) == (1, 4, 1)
    assert str(report).startswith("2 images, 1 images without people, 2 people, 2 people without keypoints")


def test_annotations_in_any_order_go_to_their_images(tmp_path, content):
    content["annotations"].insert(
        0, {"id": 8, "image_id": 3, "category_id": 2, "bbox": [1, 1, 5, 5], "keypoints": [2, 2, 2] + [0] * 6}
    )
    dataset = open_dataset(write(tmp_path, content))
    assert [len(dataset[index].keypoints) for index in range(2)] == [2, 1]
    assert dataset.report.images_without_people == 0


def test_limit_reads_only_the_first_images(tmp_path, content):
    path = write(tmp_path, content)
    (tmp_path / "images" / "sub" / "b.png").unlink()
    dataset = open_dataset(path, limit=1)
    assert len(dataset) == dataset.report.images == 1


def test_images_in_another_folder_and_pickling_for_workers(tmp_path, content):
    path = write(tmp_path, content)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    dataset = pickle.loads(pickle.dumps(open_dataset(path, tmp_path / "elsewhere")))
    assert len(dataset[0].keypoints) == 2
    with pytest.raises(InputError, match="images: no such folder"):
        open_dataset(path)


def test_several_categories_with_equal_keypoints_get_labels(tmp_path, content):
    content["categories"].append({**content["categories"][0], "id": 1, "name": "dog"})
    content["annotations"][3]["category_id"] = 1
    assert open_dataset(write(tmp_path, content))[0].class_labels.tolist() == [0, 1]


def change(path, value):
    """A function that sets content[path...] = value, or deletes it where value is `...`."""

    def apply(content):
        target = content
        for key in path[:-1]:
            target = target[key]
        if value is ...:
            del target[path[-1]]
        else:
            target[path[-1]] = value

    return apply


ANNOTATION = ("annotations", 0)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change(("images",), ...), "'images' is missing"),
        (change(("annotations",), ...), "'annotations' is missing"),
        (change(("categories",), ...), "'categories' is missing"),
        (change(("annotations",), {}), "'annotations' is not a list"),
        (change(("images",), []), "'images' is empty"),
        (change(("images", 0, "width"), ...), "image 7: field 'width' is missing"),
        (change(("images", 0, "height"), 0), "image 7"),
        (change(("images", 0, "id"), "seven"), r"images\[0\]: 'id' is 'seven'"),
        (change(("images", 1, "id"), 7), "image 7: 'id' occurs twice"),
        (change(("images", 0, "file_name"), "c.png"), "image 7: 'file_name' 'c.png'"),
        (change(("categories", 0, "keypoints"), ...), "no category has 'keypoints'"),
        (change((*ANNOTATION, "id"), 2), "annotation 2: 'id' occurs twice"),
        (change((*ANNOTATION, "id"), ...), r"annotations\[0\]: field 'id' is missing"),
        (change((*ANNOTATION, "bbox"), ...), "annotation 1: field 'bbox' is missing"),
        (change((*ANNOTATION, "keypoints"), ...), "annotation 1: field 'keypoints' is missing"),
        (change((*ANNOTATION, "keypoints"), [1, 2, 2]), "annotation 1: 'keypoints' has 3 numbers, expected 9"),
        (change((*ANNOTATION, "keypoints"), [float("nan")] * 9), "annotation 1: 'keypoints'.*finite"),
        (change((*ANNOTATION, "keypoints"), ["x"] * 9), "annotation 1: 'keypoints'.*numbers"),
        (change((*ANNOTATION, "keypoints"), [1, 1, 5] * 3), "annotation 1: 'keypoints' has a visibility"),
        (change((*ANNOTATION, "bbox"), [1, 1, -3, 4]), "annotation 1: 'bbox'.*positive"),
        (change((*ANNOTATION, "bbox"), [1, 1, 0, 4]), "annotation 1: 'bbox'.*positive"),
        (change((*ANNOTATION, "bbox"), [1, 1, 4]), "annotation 1: 'bbox' has 3"),
        (change((*ANNOTATION, "bbox"), [1, 1, float("inf"), 4]), "annotation 1: 'bbox'.*finite"),
        (change((*ANNOTATION, "area"), 0), "annotation 1: 'area'"),
        (change((*ANNOTATION, "area"), "big"), "annotation 1: 'area' is 'big'"),
        (change((*ANNOTATION, "image_id"), 99), "annotation 1: 'image_id' is 99"),
        (change((*ANNOTATION, "image_id"), ...), "annotation 1: field 'image_id'"),
        (change((*ANNOTATION, "category_id"), 99), "annotation 1: 'category_id' is 99"),
        *(
            (
                change((*ANNOTATION, "iscrowd"), value),
                "annotation 1: 'iscrowd' is .*, expected 0, 1, true, false or null",
            )
            for value in ("0", "false", [0], float("nan"), 2, {})
        ),
        (change((*ANNOTATION, "keypoints"), [1e39, 1, 2] * 3), "annotation 1: 'keypoints'.*finite numbers below 1e"),
        (change((*ANNOTATION, "bbox"), [1, 1, 1e39, 4]), "annotation 1: 'bbox'.*finite"),
        (change((*ANNOTATION, "area"), 1e39), "annotation 1: 'area'"),
        (change(("annotations", 2, "keypoints"), False), "annotation 3: 'keypoints' is False"),
        (change(("categories", 0, "keypoints"), 0), "category 2: 'keypoints' is 0, expected the list"),
    ],
)
def test_invalid_files_give_one_line_with_file_and_place(tmp_path, content, edit, words):
    edit(content)
    with pytest.raises(InputError, match=words) as caught:
        open_dataset(write(tmp_path, content))
    assert "annotations.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_categories_with_different_keypoint_counts(tmp_path, content):
    content["categories"].append({"id": 5, "name": "snake", "keypoints": ["head"]})
    with pytest.raises(InputError, match="category 2 has 3, category 5 has 1"):
        load_annotations(write(tmp_path, content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keypoints": ["nose", "right_ear", "left_ear"]}, "keypoint 1 is 'right_ear' and 'left_ear'"),
        ({"flip_idx": [0, 1, 2]}, "the mirror image of 'left_ear' is 'left_ear' and 'right_ear'"),
        ({"sigmas": [0.1, 0.1, 0.2]}, "the sigma of 'right_ear' is 0.2 and 0.1"),
    ],
)
def test_categories_with_different_keypoints(tmp_path, content, changes, words):
    content["categories"].append({**content["categories"][0], "id": 5, "name": "dog", **changes})
    with pytest.raises(
        InputError, match=rf"annotations\.json: categories 5 and 2 differ in their keypoints \({words}\)"
    ):
        open_dataset(write(tmp_path, content))


@pytest.mark.parametrize(
    ("value", "is_crowd"), [(0, False), (False, False), (None, False), (0.0, False), (1, True), (True, True)]
)
def test_yes_and_no_of_a_crowd(tmp_path, content, value, is_crowd):
    content["annotations"][0]["iscrowd"] = value
    assert load_annotations(write(tmp_path, content)).is_crowd[0] == is_crowd


@pytest.mark.parametrize("key", ["keypoints", "bbox"])
def test_shares_of_the_image_are_not_pixels(tmp_path, content, key):
    for annotation in content["annotations"]:
        scale = [40, 30, 1] * 3 if key == "keypoints" else [40, 30, 40, 30]
        if key in annotation:
            annotation[key] = [value / by for value, by in zip(annotation[key], scale, strict=True)]
    with pytest.raises(InputError, match=rf"json: '{key}' of 2 of 2 people lie within 1\.5 pixels .*, expected pixels"):
        open_dataset(write(tmp_path, content))


def test_byte_order_mark(tmp_path, content):
    path = write(tmp_path, content)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_dataset(path)) == 2


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[]", "JSON object"), ("", "not JSON")])
def test_files_that_are_no_coco_json(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        load_annotations(write(tmp_path, text))
    with pytest.raises(InputError, match="no such file"):
        load_annotations(tmp_path / "nowhere.json")


def test_skeleton_with_another_number_of_keypoints(tmp_path, content):
    with pytest.raises(InputError, match="has 3 keypoints, expected the skeleton's 17"):
        open_dataset(write(tmp_path, content), skeleton=COCO)


def test_image_of_another_size_than_annotated(tmp_path, content):
    content["images"][0]["width"] = 41
    dataset = open_dataset(write(tmp_path, content))
    with pytest.raises(InputError, match=r"a\.png: is 40 x 30 pixels, expected 41 x 30"):
        dataset[0]


def test_several_problems_are_counted_after_the_first(tmp_path, content):
    content["annotations"][0]["area"] = 0
    content["annotations"][3]["bbox"] = [1, 1]
    with pytest.raises(InputError, match=r"annotation 4: 'bbox' has 2.* \(and 1 more: `hpetr data check` lists them\)"):
        open_dataset(write(tmp_path, content))
    content["annotations"][0]["keypoints"] = [6, 7, 2, "9", 9, 1, 8, None, 0]
    with pytest.raises(InputError, match="and 1 more"):
        open_dataset(write(tmp_path, content))


def test_image_paths_and_sizes(tmp_path, content):
    dataset = open_dataset(write(tmp_path, content))
    assert dataset.image_paths == [tmp_path / "images" / "a.png", tmp_path / "images" / "sub" / "b.png"]
    assert dataset.image_sizes.tolist() == [[40, 30], [20, 10]]
    assert dataset[1].path == dataset.image_paths[1]
    with pytest.raises(IndexError):
        dataset[2]


def test_area_of_box_replaces_every_area_in_training_alone(tmp_path, content):
    dataset = open_dataset(write(tmp_path, content), area_of_box=1.0)
    assert dataset[0].areas.tolist() == [200, 200]
    assert dataset.report.filled_areas == 0
    assert dataset.ground_truth()["annotations"] == content["annotations"]
    with pytest.raises(InputError, match="area_of_box is -1"):
        open_dataset(tmp_path / "annotations.json", area_of_box=-1)


def test_ground_truth_is_the_file_without_other_categories(tmp_path, content):
    content["categories"].append({"id": 9, "name": "car"})
    content["annotations"].append({"id": 6, "image_id": 3, "category_id": 9, "bbox": [0, 0, 1, 1]})
    truth = open_dataset(write(tmp_path, content), limit=1).ground_truth()
    assert truth == {
        "images": content["images"],
        "categories": content["categories"][:1],
        "annotations": content["annotations"][:-1],
    }


@pytest.mark.parametrize("head", ["head", "top_head"])
def test_crowdpose_json(tmp_path, head):
    names = [*CROWDPOSE.names[:12], head, "neck"]
    copied = [[first + 1, second + 1] for first, second in COCO.edges]  # such files are about
    person = {"id": 5, "image_id": 1, "category_id": 1, "iscrowd": 0, "num_keypoints": 3, "bbox": [4, 4, 20, 10]}
    crowdpose = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30, "crowdIndex": 0.62}],
        "categories": [{"id": 1, "name": "person", "keypoints": names, "skeleton": copied}],
        "annotations": [{**person, "keypoints": [6, 7, 2] * 14}],
    }
    dataset = open_dataset(write(tmp_path, crowdpose), area_of_box=1.0)
    assert dataset.skeleton == CROWDPOSE
    assert dataset[0].areas.tolist() == [200]
    truth = dataset.ground_truth()
    assert truth["images"][0]["crowdIndex"] == 0.62
    assert "area" not in truth["annotations"][0]


def test_open_dataset_chooses_by_name(tmp_path, content):
    path = write(tmp_path, content)
    assert len(open_dataset(path, limit=1)) == 1
    assert isinstance(open_dataset(tmp_path), PoseDataset)
    with pytest.raises(InputError, match=r"expected a COCO keypoint \.json"):
        open_dataset(tmp_path / "labels.xml")
    with pytest.raises(InputError, match=r"neither annotations\.json nor data\.yaml"):
        open_dataset(tmp_path / "images")
