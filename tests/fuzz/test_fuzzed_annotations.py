"""Labels of any content: COCO and CrowdPose JSON, YOLO-pose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import inputs, mutated, mutated_bytes, success_or_one_line
from PIL import Image

from hpetr.data import open_dataset
from hpetr.data.check import check_dataset
from hpetr.data.sigmas import estimate_sigmas
from hpetr.evaluation.evaluate import coco_metrics, crowdpose_metrics, protocol_of

SIZE = (48, 32)
NAMES = ["nose", "left_ear", "right_ear"]


def person(number: int, image: int, **more: Any) -> dict[str, Any]:
    points = [[4 * number, 5, 2], [4 * number + 3, 9.5, 1], [0, 0, 0]]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [3 * number, 4, 10, 12.5],
        "keypoints": [value for point in points for value in point],
        **more,
    }


COCO_FILE = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in (1, 2)],
    "annotations": [person(1, 1, area=60, iscrowd=0), person(2, 1, num_keypoints=2), person(3, 2, iscrowd=1)],
    "categories": [
        {
            "id": 1,
            "name": "cat",
            "keypoints": NAMES,
            "skeleton": [[1, 2], [1, 3]],
            "flip_idx": [0, 2, 1],
            "sigmas": [0.1, 0.1, 0.1],
        },
        {"id": 2, "name": "tree"},
    ],
}
MANY_PEOPLE = {**COCO_FILE, "annotations": [person(n, 1 + n % 2, area=60) for n in range(1, 31)]}
CROWDPOSE_FILE = {
    **COCO_FILE,
    "images": [{**image, "crowdIndex": 0.4 * n} for n, image in enumerate(COCO_FILE["images"])],
}
YOLO_FILE = {
    "path": ".",
    "train": "images",
    "val": ["images"],
    "names": {0: "cat", 1: "dog"},
    "kpt_shape": [3, 3],
    "flip_idx": [0, 2, 1],
    "kpt_names": {0: NAMES, 1: NAMES},
    "skeleton": [[0, 1]],
    "sigmas": [0.1, 0.1, 0.1],
}
YOLO_LABELS = b"0 0.5 0.5 0.25 0.5 0.5 0.5 2 0.4 0.4 1 0 0 0\n1 0.2 0.5 0.2 0.5 0.2 0.5 2 0.4 0.4 1 0 0 0\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("annotations")
    for name in ("images", "labels"):
        (place / name).mkdir()
    for number in (1, 2):
        Image.new("RGB", SIZE).save(place / "images" / f"{number}.png")
    return place


def use(path: Path, split: str | None = None) -> None:
    """All that the product does with labels: the check, samples, evaluation."""
    check_dataset(path, split=split).lines()
    dataset = open_dataset(path, split=split)
    str(dataset.report)
    for sample in (dataset[index] for index in range(len(dataset))):
        assert np.isfinite(sample.keypoints).all()
        assert np.isfinite(sample.boxes).all()
    truth = dataset.ground_truth()
    answer = [
        {key: a[key] for key in ("image_id", "category_id", "keypoints")} | {"score": 0.5}
        for a in truth["annotations"]
        if a.get("keypoints")
    ]
    metrics = crowdpose_metrics if protocol_of(truth) == "crowdpose" else coco_metrics
    assert all(-1 <= value <= 1 for value in metrics(truth, answer, dataset.skeleton.sigmas).values())


@inputs(30, 40_000)
@given(content=mutated(COCO_FILE))
def test_coco(folder: Path, content: Any) -> None:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    with success_or_one_line("COCO JSON, values"):
        use(path)


@inputs(15, 20_000)
@given(content=mutated(CROWDPOSE_FILE))
def test_crowdpose(folder: Path, content: Any) -> None:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    with success_or_one_line("CrowdPose JSON, values"):
        use(path)


@inputs(15, 20_000)
@given(content=mutated_bytes(json.dumps(COCO_FILE).encode(), 2, letters=True))
def test_coco_bytes(folder: Path, content: bytes) -> None:
    path = folder / "annotations.json"
    path.write_bytes(content)
    with success_or_one_line("COCO JSON, bytes"):
        use(path)


@inputs(8, 5_000)
@given(content=mutated(MANY_PEOPLE))
def test_sigmas(folder: Path, content: Any) -> None:
    good, path = folder / "good.json", folder / "annotations.json"
    moved = [{**a, "keypoints": [v + (v > 2) for v in a["keypoints"]]} for a in MANY_PEOPLE["annotations"]]
    good.write_text(json.dumps({**MANY_PEOPLE, "annotations": moved}))
    path.write_text(json.dumps(content))
    with success_or_one_line("COCO JSON, estimating sigmas"):
        estimate_sigmas([good, path])


@inputs(15, 20_000)
@given(content=mutated(YOLO_FILE), split=st.sampled_from(["train", "val", "test"]))
def test_yolo_config(folder: Path, content: Any, split: str) -> None:
    (folder / "labels" / "1.txt").write_bytes(YOLO_LABELS)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(content))
    with success_or_one_line("YOLO data.yaml, values"):
        use(path, split)


@inputs(15, 20_000)
@given(content=mutated_bytes(YOLO_LABELS, 3, letters=True))
def test_yolo_labels(folder: Path, content: bytes) -> None:
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(YOLO_FILE))
    (folder / "labels" / "1.txt").write_bytes(content)
    with success_or_one_line("YOLO labels, bytes"):
        use(path, "train")


@inputs(10, 10_000)
@given(content=mutated_bytes(yaml.safe_dump(YOLO_FILE).encode(), 2, letters=True))
def test_yolo_config_bytes(folder: Path, content: bytes) -> None:
    (folder / "labels" / "1.txt").write_bytes(YOLO_LABELS)
    path = folder / "data.yaml"
    path.write_bytes(content)
    with success_or_one_line("YOLO data.yaml, bytes"):
        use(path, "train")
