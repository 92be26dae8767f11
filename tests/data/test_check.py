"""The check, shared images and sigmas, on small data sets with known faults."""

import copy
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpetr.cli.main import app
from hpetr.data import open_dataset
from hpetr.data.check import check_dataset, equal_files, shared_images
from hpetr.data.sigmas import estimate_sigmas
from hpetr.errors import InputError
from paths import TINY

NAMES = ["nose", "left_ear", "right_ear"]
RNG = np.random.default_rng(0)


def person(number, image_id, points, **changes):
    x, y = np.reshape(points, (-1, 3))[:, :2].min(axis=0) - 1
    return {"id": number, "image_id": image_id, "category_id": 1, "bbox": [float(x), float(y), 12.0, 12.0]} | {
        "keypoints": points,
        "area": 80.0,
        **changes,
    }


@pytest.fixture
def content():
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat", "keypoints": NAMES, "sigmas": [0.1] * 3}],
        "annotations": [person(1, 1, [5, 5, 2, 9, 9, 1, 8, 8, 2]), person(2, 2, [20, 5, 2, 19, 9, 1, 12, 8, 2])],
    }


def write(folder, content):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        pixels = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / image["file_name"])
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def kinds(report, level):
    return {finding.kind: finding.count for finding in report.findings if finding.level == level}


def test_clean_data_set(tmp_path, content):
    report = check_dataset(write(tmp_path, content))
    assert report.accepted
    assert report.findings == []
    assert report.lines()[1:] == [
        "training uses 2 people in 2 images",
        "training takes as background 1 images without people",
    ]


def test_every_fault_is_counted_at_once(tmp_path, content):
    good = content["annotations"]
    content["annotations"] += [
        {**good[0], "id": 3, "image_id": 9},
        {**good[0], "id": 4, "category_id": 9},
        {**good[0], "id": 5, "keypoints": [1, 2, 2]},
        {**good[0], "id": 6, "keypoints": [float("nan")] * 9},
        {**good[0], "id": 7, "keypoints": [5, 5, 7] * 3, "bbox": [1, 1, 0, 5]},
        {**good[0], "id": 8, "bbox": [1, 1, 0, 5]},
        {**good[0], "id": 9, "area": -1},
        {**good[0], "id": 1},
        {**good[0], "id": "ten"},
        {key: value for key, value in good[0].items() if key != "bbox"} | {"id": 11},
    ]
    content["images"] += [{**content["images"][0], "id": 4}, {**content["images"][0], "id": 4}]
    path = write(tmp_path, content)
    images = tmp_path / "images"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:900])
    Image.new("RGB", (41, 30)).save(images / "3.png")
    report = check_dataset(path)
    assert not report.accepted
    assert kinds(report, "error") == {
        "duplicate image id": 1,
        "unknown image": 1,
        "unknown category": 1,
        "wrong number of keypoints": 1,
        "not finite numbers": 1,
        "wrong visibility": 1,
        "box without extent": 2,
        "area not positive": 1,
        "duplicate annotation id": 1,
        "wrong 'id'": 1,
        "missing 'bbox'": 1,
        "missing image": 2,
        "unreadable image": 1,
        "image of another size": 1,
    }
    assert report.lines()[-1] == "training refuses this data set: 16 errors"
    assert any("annotation 5: 'keypoints' has 3 numbers, expected 9" in line for line in report.lines())
    with pytest.raises(InputError, match=r"\(and 13 more: `hpetr data check` lists them\)"):
        open_dataset(path)
    assert "unreadable image" not in kinds(check_dataset(path, decode=False), "error")


def test_what_training_accepts_but_nobody_means(tmp_path, content):
    content["categories"][0] = {"id": 1, "name": "cat", "keypoints": ["nose", "left_ear", "tail"]}
    content["annotations"] += [
        person(3, 1, [5.1, 5, 2, 9, 9.1, 1, 8, 8, 2]),  # the first person again
        person(4, 2, [-3, 5, 2, 5, 5, 2, 6, 6, 2]),
        person(5, 2, [20, 20, 2, 1, 1, 2, 6, 6, 2], bbox=[18, 18, 5, 5]),
        person(6, 3, [30, 20, 2, 31, 21, 2, 32, 22, 2], bbox=[25, 15, 20, 10]),
        person(7, 3, [0] * 9, bbox=[2, 2, 5, 5]),
        person(8, 3, [0] * 9, bbox=[2, 2, 5, 5], iscrowd=1),
    ]
    path = write(tmp_path, content)
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "3.png")
    report = check_dataset(path, examples=1)
    assert report.accepted
    assert kinds(report, "warning") == {
        "no sigmas": 1,
        "no flip pairs": 1,
        "people with keypoints outside their image, taken as not labelled": 1,
        "people with keypoints far from their own box": 1,
        "boxes that reach outside their image, clipped": 2,
        "people labelled twice": 1,
        "groups of images with equal content": 1,
    }
    assert sorted(kinds(report, "note").values()) == [1, 1]
    text = "\n".join(report.lines())
    assert "annotation 3: nearly the keypoints of annotation 1" in text
    assert "annotation 5: 'left_ear' at 1, 1" in text
    assert "training uses 6 people in 3 images" in text
    assert "training ignores 2 regions" in text
    assert "training ignores 1 keypoints outside their image" in text


def test_people_side_by_side_are_not_one_person():
    report = check_dataset(TINY)
    assert report.accepted
    assert report.findings == []


def test_missing_folder_does_not_hide_the_rest(tmp_path, content):
    content["annotations"][0]["area"] = 0
    path = write(tmp_path, content)
    shutil.rmtree(tmp_path / "images")
    assert kinds(check_dataset(path), "error") == {"area not positive": 1, "no folder of images": 1}


def test_invalid_skeleton_is_one_error(tmp_path, content):
    content["categories"][0]["flip_idx"] = [1, 2, 0]
    report = check_dataset(write(tmp_path, content))
    assert kinds(report, "error") == {"skeleton": 1}
    with pytest.raises(InputError, match=r"annotations\.json: category 'cat': 'flip_idx' maps keypoint 0 to 1"):
        open_dataset(tmp_path)


def run(*arguments):
    """`hpetr data ...` as the command line runs it."""
    return CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])


def test_command_checks_all_splits_and_fails_only_on_errors(tmp_path):
    for split, line in (("train", "0 0.5 0.5 0.5 0.5 0.5 0.5 2"), ("val", "0 0.5 0.5 0.5 0.5 0.5 0.5")):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text(line)
    text = "train: images/train\nval: images/val\nnames: [cat]\nkpt_shape: [1, 3]\n"
    (tmp_path / "data.yaml").write_text(text)
    both = run("check", tmp_path)
    assert both.exit_code == 2
    assert "split train" in both.stdout
    assert "a.txt: line 1: 7 numbers, expected 8" in both.stdout
    one = run("check", tmp_path / "data.yaml", "--split", "train", "--no-pictures")
    assert one.exit_code == 0, one.output
    assert "warning: no sigmas: 1" in one.stdout
    (tmp_path / "data.yaml").write_text("names: [cat]\nkpt_shape: [1, 3]\n")
    empty = run("check", tmp_path)
    assert empty.exit_code == 2
    assert "data.yaml: no split is given, expected train, val, test" in empty.stderr
    nowhere = run("check", tmp_path / "nowhere.json")
    assert nowhere.exit_code == 2
    assert nowhere.stderr.startswith("error: ")
    assert nowhere.stderr.count("\n") == 1


# --- images in two data sets


def test_shared_images_by_file_and_by_content(tmp_path, content):
    train = write(tmp_path / "train", content)
    val = write(tmp_path / "val", content)
    assert shared_images([open_dataset(train)], open_dataset(val)) == []
    shutil.copy(tmp_path / "train" / "images" / "1.png", tmp_path / "val" / "images" / "2.png")
    (tmp_path / "val" / "images" / "3.png").unlink()
    (tmp_path / "val" / "images" / "3.png").symlink_to(tmp_path / "train" / "images" / "3.png")
    shared = shared_images([open_dataset(train)], open_dataset(val))
    assert [path.name for path in shared] == ["2.png", "3.png"]
    assert shared[0].is_relative_to(tmp_path / "val")
    assert len(shared_images([open_dataset(TINY), open_dataset(train)], open_dataset(train))) == 3


def test_equal_size_is_not_equal_content(tmp_path):
    contents = [b"a" * 9000, b"a" * 8999 + b"b", b"a" * 4500 + b"c" + b"a" * 4499, b"a" * 9000]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    assert equal_files([*paths, tmp_path / "missing"]) == [[0, 3]]


# --- sigmas


def labelled_again(content, sigmas, rng):
    """Every label moved at random so that the mean squared distance is sigma^2 area."""
    again = copy.deepcopy(content)
    for annotation in again["annotations"]:
        points = np.reshape(annotation["keypoints"], (-1, 3)).astype(float)
        spread = np.array(sigmas) * np.sqrt(annotation["area"] / 2)
        points[:, :2] += rng.normal(size=(len(sigmas), 2)) * spread[:, None]
        annotation["keypoints"] = points.ravel().tolist()
    rng.shuffle(again["annotations"])
    return again


@pytest.mark.parametrize("times", [2, 3])
def test_sigmas_of_repeated_labels_are_recovered(tmp_path, content, times):
    rng = np.random.default_rng(1)
    sigmas = [0.03, 0.06, 0.11]
    content["images"] = [{"id": i, "file_name": f"{i}.png", "width": 800, "height": 800} for i in range(400)]
    content["annotations"] = []
    for i in range(400):
        for x in (100, 400):
            size = rng.uniform(50, 200)
            points = [value for _ in range(3) for value in (*rng.uniform(x, x + size, 2).tolist(), 2)]
            changes = {"bbox": [x, x, size, size], "area": 0.5 * size**2}
            content["annotations"].append(person(len(content["annotations"]), i, points, **changes))
    files = [tmp_path / f"{number}.json" for number in range(times)]
    for number, file in enumerate(files):
        again = labelled_again(content, sigmas, rng)
        for image in again["images"]:
            image["id"] += 1000 * number  # ids may differ, names count
        for annotation in again["annotations"]:
            annotation["image_id"] += 1000 * number
        file.write_text(json.dumps(again))
    estimate = estimate_sigmas(files)
    assert estimate.sigmas == pytest.approx(sigmas, rel=0.1)
    assert estimate.people == 800
    assert estimate.pairs == (800 * (times - 1),) * 3


def test_keypoints_with_few_pairs_are_not_estimable(tmp_path, content):
    content["annotations"] = [
        person(i, 1, [100 * i, 5, 2, 100 * i + 5, 9, 2, 100 * i + 8, 8, 2 if i < 9 else 0]) for i in range(12)
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(labelled_again(content, [0.05] * 3, np.random.default_rng(len(file.name) + 1))))
    with pytest.raises(InputError, match="every repeated label is the same"):
        estimate_sigmas(files)
    files[1].write_text(json.dumps(labelled_again(content, [0.05] * 3, np.random.default_rng(5))))
    estimate = estimate_sigmas(files)
    assert estimate.pairs == (12, 12, 9)
    assert estimate.sigmas[2] is None
    result = run("sigmas", *files)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("sigmas: [0.0")
    assert result.stdout.endswith(", null]\n")
    assert "right_ear: not estimable from 9 repeated labels, expected at least 10" in result.stderr


def test_files_that_have_nothing_in_common(tmp_path, content):
    first = write(tmp_path, content)
    for image in content["images"]:
        image["file_name"] = f"other-{image['file_name']}"
    second = write(tmp_path / "second", content)
    with pytest.raises(InputError, match="expected repeated labels"):
        estimate_sigmas([first, second])
    with pytest.raises(InputError, match="at least two"):
        estimate_sigmas([first])
    content["categories"][0]["keypoints"] = ["a", "b", "c"]
    with pytest.raises(InputError, match="keypoint names are not those"):
        estimate_sigmas([first, write(tmp_path / "second", content)])
