"""The ten COCO metrics against pycocotools, and evaluation of a real model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO as ReferenceCoco
from pycocotools.cocoeval import COCOeval as ReferenceEval
from typer.testing import CliRunner

from hpetr import HPetrConfig, HPetrForPoseEstimation, HPetrImageProcessor
from hpetr.checkpoints.folder import load_checkpoint
from hpetr.cli.main import app
from hpetr.data.dataset import open_dataset
from hpetr.errors import InputError
from hpetr.evaluation.evaluate import METRICS, coco_metrics, crowd_levels, crowdpose_metrics, evaluate
from hpetr.inference.flip_test import predict_batch_flipped
from hpetr.poses.skeleton import COCO, CROWDPOSE
from paths import TINY
from perfect_network import PerfectNetwork


def made_ground_truth(num_keypoints: int, seed: int = 0, images: int = 12) -> dict[str, Any]:
    """People of all sizes, a few crowds, people without keypoints, and an image without people."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id in range(1, images):
        for _ in range(int(rng.integers(1, 6))):
            x, y = rng.uniform(0, 400, 2)
            width, height = rng.uniform(20, 240, 2)
            keypoints = np.zeros((num_keypoints, 3))
            keypoints[:, :2] = rng.uniform((x, y), (x + width, y + height), (num_keypoints, 2)).round(1)
            keypoints[:, 2] = rng.choice([0, 1, 2], num_keypoints, p=[0.3, 0.2, 0.5])
            keypoints[keypoints[:, 2] == 0] = 0
            kind = rng.random()
            if kind < 0.15:
                keypoints[:] = 0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 3,
                    "bbox": [x, y, width, height],
                    "area": 0.6 * width * height,
                    "iscrowd": int(kind < 0.05),
                    "keypoints": keypoints.ravel().tolist(),
                    "num_keypoints": int((keypoints[:, 2] > 0).sum()),
                }
            )
    names = [f"joint {index}" for index in range(num_keypoints)]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "thing", "keypoints": names}],
    }


def perturbed(truth: dict[str, Any], num_keypoints: int, noise: float = 0.05, seed: int = 1) -> list[dict[str, Any]]:
    """Results near the ground truth: some people missed, some found twice, some without a person."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        points = np.reshape(annotation["keypoints"], (num_keypoints, 3)).copy()
        unlabelled = points[:, 2] == 0
        points[unlabelled, :2] = rng.uniform((x, y), (x + width, y + height), (num_keypoints, 2))[unlabelled]
        for _ in range(int(rng.choice([0, 1, 2], p=[0.2, 0.65, 0.15]))):
            moved = points.copy()
            moved[:, :2] += rng.normal(0, noise * np.sqrt(width * height), (num_keypoints, 2))
            moved[:, 2] = 1
            image_id = annotation["image_id"] if rng.random() > 0.05 else truth["images"][-1]["id"]
            keypoints = moved.ravel().tolist()
            results.append(
                {"image_id": image_id, "category_id": 3, "keypoints": keypoints, "score": float(rng.random())}
            )
    return results


def reference_metrics(
    truth: dict[str, Any], results: list[dict[str, Any]], sigmas: list[float], image_ids: list[int] | None = None
) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = ReferenceCoco()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluator = ReferenceEval(coco, coco.loadRes(copy.deepcopy(results)), "keypoints")
        evaluator.params.kpt_oks_sigmas = np.array(sigmas)
        if image_ids is not None:
            evaluator.params.imgIds = image_ids
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(METRICS, evaluator.stats.tolist(), strict=True))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("num_keypoints", "sigmas"), [(17, COCO.sigmas), (5, (0.02, 0.05, 0.08, 0.1, 0.06))])
def test_ten_figures_equal_pycocotools(num_keypoints: int, sigmas: tuple[float, ...], seed: int) -> None:
    truth = made_ground_truth(num_keypoints, seed)
    results = perturbed(truth, num_keypoints, seed=seed)
    ours = coco_metrics(truth, results, sigmas)
    assert list(ours) == ["AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL"]
    assert ours == pytest.approx(reference_metrics(truth, results, list(sigmas)), abs=1e-12)
    assert 0.05 < ours["AP"] < 0.95, "a case with hits and misses"


def test_real_annotations_equal_pycocotools() -> None:
    truth = json.loads((TINY / "annotations.json").read_text())
    results = [{**result, "category_id": 1} for result in perturbed(truth, 17, noise=0.03)]
    ours = coco_metrics(TINY / "annotations.json", results, COCO.sigmas)
    assert ours == pytest.approx(reference_metrics(truth, results, list(COCO.sigmas)), abs=1e-12)


def test_boxes_beside_the_keypoints_change_nothing() -> None:
    truth = made_ground_truth(17)
    results = perturbed(truth, 17)
    with_boxes = []
    for result in results:
        points = np.reshape(result["keypoints"], (17, 3))[:, :2]
        low, high = points.min(0), points.max(0)
        with_boxes.append({**result, "bbox": [*low.tolist(), *(high - low).tolist()]})
    assert coco_metrics(truth, with_boxes, COCO.sigmas) == coco_metrics(truth, results, COCO.sigmas)


def test_perfect_results_reach_one_and_none_reach_zero() -> None:
    truth = made_ground_truth(17)
    everyone = [
        {"image_id": a["image_id"], "category_id": 3, "keypoints": a["keypoints"], "score": 0.9}
        for a in truth["annotations"]
        if a["num_keypoints"] and not a["iscrowd"]
    ]
    assert coco_metrics(truth, everyone, COCO.sigmas)["AP"] == pytest.approx(1)
    assert set(coco_metrics(truth, [], COCO.sigmas).values()) == {0.0}


def test_nobody_to_find_is_minus_one() -> None:
    truth = made_ground_truth(17)
    results = perturbed(truth, 17)
    nobody = {**truth, "annotations": []}
    assert set(coco_metrics(nobody, [], COCO.sigmas).values()) == {-1.0}
    assert set(coco_metrics(nobody, results, COCO.sigmas).values()) == {-1.0}


def test_missing_area_is_taken_from_the_box() -> None:
    truth = made_ground_truth(17)
    results = perturbed(truth, 17)
    without, filled = copy.deepcopy(truth), copy.deepcopy(truth)
    for bare, full in zip(without["annotations"], filled["annotations"], strict=True):
        del bare["area"], bare["num_keypoints"]
        full["area"] = 0.53 * full["bbox"][2] * full["bbox"][3]
    expected = reference_metrics(filled, results, list(COCO.sigmas))
    assert coco_metrics(without, results, COCO.sigmas) == pytest.approx(expected, abs=1e-12)


def test_chosen_images_only() -> None:
    truth = made_ground_truth(17)
    results = perturbed(truth, 17)
    chosen = [1, 2, 12]
    part = {
        **truth,
        "images": [image for image in truth["images"] if image["id"] in chosen],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in chosen],
    }
    kept = [result for result in results if result["image_id"] in chosen]
    expected = coco_metrics(part, kept, COCO.sigmas)
    assert coco_metrics(truth, results, COCO.sigmas, image_ids=chosen) == expected


def test_results_that_do_not_fit_are_refused() -> None:
    truth = made_ground_truth(17)
    result = perturbed(truth, 17)[0]
    with pytest.raises(InputError, match="image_id 99 is not in the ground truth"):
        coco_metrics(truth, [{**result, "image_id": 99}], COCO.sigmas)
    with pytest.raises(InputError, match="51 numbers in 'keypoints', expected 15"):
        coco_metrics(made_ground_truth(5), [result], (0.1,) * 5)


def test_model_on_real_images_writes_every_pose(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = open_dataset(TINY / "annotations.json")
    steps: list[int] = []
    model.train()
    result = evaluate(model, processor, dataset, batch_size=3, progress=steps.append)
    assert model.training, "the mode it came in"
    assert steps == [3, 1]
    assert result.images == 4
    assert len(result.results) == 4 * 10, "the processor's threshold must not cut an evaluation's poses"
    metrics_file = result.write(tmp_path / "eval.json", {"checkpoint": "random"})
    assert json.loads((tmp_path / "eval.json").read_text()) == result.results
    written = json.loads(metrics_file.read_text())
    assert {name: written[name] for name in METRICS} == result.metrics
    assert written["images"] == 4
    assert written["checkpoint"] == "random"
    again = coco_metrics(TINY / "annotations.json", json.loads((tmp_path / "eval.json").read_text()), COCO.sigmas)
    assert again == result.metrics


def test_perfect_network_gets_perfect_figures(checkpoint: Path) -> None:
    """The whole way from normalized output to AP: a network that answers with the annotations reaches 1."""
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = open_dataset(TINY / "annotations.json")

    assert evaluate(PerfectNetwork(model.config, dataset), processor, dataset).metrics["AP"] == pytest.approx(1)


def test_limit_evaluates_the_first_images(checkpoint: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    result = evaluate(model, processor, open_dataset(TINY / "annotations.json", limit=2))
    assert {pose["image_id"] for pose in result.results} == {790, 129648}
    assert result.images == 2


def test_unreadable_image_stops_the_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "data")
    broken = tmp_path / "data" / "images" / "000000433998.jpg"
    broken.write_bytes(broken.read_bytes()[:3000])
    model, processor = load_checkpoint(checkpoint, "cpu")
    with pytest.raises(InputError, match="433998"):
        evaluate(model, processor, open_dataset(tmp_path / "data" / "annotations.json"))


def test_other_number_of_keypoints_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    truth = json.loads((TINY / "annotations.json").read_text())
    truth["categories"][0]["keypoints"] = truth["categories"][0]["keypoints"][:3]
    truth["categories"][0].pop("skeleton")
    for annotation in truth["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:9]
    (tmp_path / "three.json").write_text(json.dumps(truth))
    model, processor = load_checkpoint(checkpoint, "cpu")
    with pytest.raises(InputError, match="poses of 3 keypoints, expected the model's 17"):
        evaluate(model, processor, open_dataset(tmp_path / "three.json", TINY / "images"))


def test_keypoints_in_another_order_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    truth = json.loads((TINY / "annotations.json").read_text())
    names = truth["categories"][0]["keypoints"]
    names[1], names[2] = names[2], names[1]
    (tmp_path / "swapped.json").write_text(json.dumps(truth))
    model, processor = load_checkpoint(checkpoint, "cpu")
    swapped = open_dataset(tmp_path / "swapped.json", TINY / "images")
    with pytest.raises(InputError, match=r"swapped.json: .* the model's \(keypoint 1 is 'right_eye' and 'left_eye'\)"):
        evaluate(model, processor, swapped)


def crowded(seed: int = 0) -> dict[str, Any]:
    """CrowdPose's form: K = 14, crowdIndex, an `area` that is not to be used, num_keypoints of visible ones alone."""
    truth = made_ground_truth(14, seed, images=24)
    indices = [0, 0.05, 0.0999, 0.1, 0.11, 0.5, 0.79, 0.8, 0.8001, 0.95, 1, 0.3]
    for place, image in enumerate(truth["images"]):
        image["crowdIndex"] = indices[place % len(indices)]
    for place, annotation in enumerate(truth["annotations"]):
        annotation["area"] = 7.0
        points = np.reshape(annotation["keypoints"], (14, 3))
        if place % 9 == 0:
            points[:, 2] = points[:, 2].clip(0, 1)  # no keypoint is visible: the protocol ignores such people
        annotation["keypoints"] = points.ravel().tolist()
        annotation["num_keypoints"] = int((points[:, 2] == 2).sum())
    return truth


@pytest.mark.parametrize("seed", [0, 1])
def test_crowdpose_figures_equal_pycocotools_on_subsets(seed: int) -> None:
    truth = crowded(seed)
    results = perturbed(truth, 14, noise=0.08, seed=seed)
    by_box = copy.deepcopy(truth)
    for annotation in by_box["annotations"]:
        annotation["area"] = 0.53 * annotation["bbox"][2] * annotation["bbox"][3]
    sigmas = list(CROWDPOSE.sigmas)
    whole = reference_metrics(by_box, results, sigmas)
    expected = {name: whole[name] for name in ("AP", "AP50", "AP75", "AR", "AR50", "AR75")}
    for level, low, high in (("easy", 0, 0.0999), ("medium", 0.1, 0.8), ("hard", 0.8001, 1)):
        ids = [image["id"] for image in truth["images"] if low <= image["crowdIndex"] <= high]
        expected[f"AP({level})"] = reference_metrics(by_box, results, sigmas, ids)["AP"]
    ours = crowdpose_metrics(truth, results)
    assert list(ours) == list(expected)
    assert ours == pytest.approx(expected, abs=1e-12)
    assert len(set(ours.values())) == 9, "a case in which all metrics differ"
    recounted = copy.deepcopy(by_box)
    for annotation in recounted["annotations"]:
        annotation["num_keypoints"] = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
    assert reference_metrics(recounted, results, sigmas)["AP"] != pytest.approx(ours["AP"], abs=1e-6)


def test_crowd_levels_have_their_borders_in_medium() -> None:
    indices = {1: 0, 2: 0.0999, 3: 0.1, 4: 0.8, 5: 0.8001, 6: 1}
    images = [{"id": image_id, "crowdIndex": index} for image_id, index in indices.items()]
    assert crowd_levels({"images": images}) == {"easy": [1, 2], "medium": [3, 4], "hard": [5, 6]}
    for wrong in (None, "0.5", 1.2):
        with pytest.raises(InputError, match="image 3: 'crowdIndex' is .*, expected a number in 0..1"):
            crowd_levels({"images": [*images[:2], {"id": 3, "crowdIndex": wrong}]})


def test_crowd_level_without_images_is_minus_one() -> None:
    truth = crowded()
    easy = [image["id"] for image in truth["images"] if image["crowdIndex"] < 0.1]
    metrics_found = crowdpose_metrics(truth, perturbed(truth, 14), image_ids=easy)
    assert metrics_found["AP(easy)"] == metrics_found["AP"] > 0
    assert metrics_found["AP(medium)"] == metrics_found["AP(hard)"] == -1


def test_protocol_follows_the_crowd_index(checkpoint: Path, tmp_path: Path) -> None:
    truth = json.loads((TINY / "annotations.json").read_text())
    for place, image in enumerate(truth["images"]):
        image["crowdIndex"] = place / 10
    path = tmp_path / "crowded.json"
    path.write_text(json.dumps(truth))
    model, processor = load_checkpoint(checkpoint, "cpu")
    result = evaluate(model, processor, open_dataset(path, TINY / "images"))
    assert list(result.metrics)[-3:] == ["AP(easy)", "AP(medium)", "AP(hard)"]
    assert result.metrics["AP(hard)"] == -1
    written = json.loads(result.write(tmp_path / "eval.json").read_text())
    assert (written["protocol"], written["flip_test"], written["processes"]) == ("crowdpose", False, 1)
    del truth["images"][2]["crowdIndex"]
    path.write_text(json.dumps(truth))
    with pytest.raises(InputError, match="'crowdIndex' is None"):
        evaluate(model, processor, open_dataset(path, TINY / "images"))


def test_eval_takes_yolo_data(checkpoint: Path, tmp_path: Path) -> None:
    """The val split unless another is named; metrics as for the same image in COCO's form."""
    truth = json.loads((TINY / "annotations.json").read_text())
    image = truth["images"][0]
    people = [a for a in truth["annotations"] if a["image_id"] == image["id"] and a["num_keypoints"]]
    lines = []
    for person in people:
        x, y, width, height = person["bbox"]
        points = np.reshape(person["keypoints"], (17, 3)) / (image["width"], image["height"], 1)
        box = np.divide([x + width / 2, y + height / 2, width, height], [image["width"], image["height"]] * 2)
        lines.append(" ".join(["0", *(f"{value:.8f}" for value in (*box, *points.ravel()))]))
    for folder in ("images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(TINY / "images" / image["file_name"], tmp_path / "images" / "val")
    (tmp_path / "labels" / "val" / f"{Path(image['file_name']).stem}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text("path: .\nval: images/val\nkpt_shape: [17, 3]\nnames: {0: person}\n")
    output = tmp_path / "eval.json"
    done = CliRunner().invoke(app, ["eval", str(checkpoint), str(tmp_path / "data.yaml"), "--output", str(output)])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "eval.metrics.json").read_text())
    assert (written["images"], written["protocol"], written["poses"]) == (1, "coco", 10)
    assert written["AP"] >= 0, "the people of the label file are there to find"
    wrong = CliRunner().invoke(app, ["eval", str(checkpoint), str(tmp_path / "data.yaml"), "--split", "dev"])
    assert wrong.exit_code == 2
    assert "dev" in wrong.stderr


TOGETHER = """
import json, sys
from pathlib import Path
from hpetr.cli.main import app
from hpetr.checkpoints.folder import load_checkpoint
from hpetr.data.dataset import open_dataset
from hpetr.evaluation.evaluate import evaluate
from hpetr import InputError
from hpetr.inference import processes

checkpoint, data, folder, commands = sys.argv[1:]
codes = []
for command in json.loads(commands):
    try:
        app(command)
    except SystemExit as end:
        codes.append(end.code)
steps = []
model, processor = load_checkpoint(checkpoint, "cpu")
result = evaluate(model, processor, open_dataset(data), 3, steps.append)
try:
    evaluate(model, processor, open_dataset(data, limit=2 + processes.rank()))
except InputError as error:
    codes.append(str(error))
about = {"codes": codes, "metrics": result.metrics, "poses": len(result.results), "steps": steps}
Path(folder, f"rank{processes.rank()}.json").write_text(json.dumps(about))
"""


def test_two_processes_give_what_one_gives(checkpoint: Path, tmp_path: Path) -> None:
    """Real processes: 3 images for two, whole batches only, an unreadable image, too few, and not the same."""
    (tmp_path / "together.py").write_text(TOGETHER)
    shutil.copytree(TINY, tmp_path / "broken")
    (tmp_path / "broken" / "images" / "000000442450.jpg").write_bytes(b"no image")
    cases = {
        "uneven": [str(TINY), "--limit", "3", "--batch-size", "1"],
        "batches": [str(TINY), "--batch-size", "3", "--flip-test"],
        "unreadable": [str(tmp_path / "broken")],
        "few": [str(TINY), "--limit", "1"],
    }
    commands = [["eval", str(checkpoint), *c, "--output", str(tmp_path / f"{n}.json")] for n, c in cases.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [tmp_path / "together.py", checkpoint, TINY / "annotations.json", tmp_path, json.dumps(commands)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, script)], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    differ = "2 images in batches of 1, but process 1 has 3 in batches of 1; expected the same of all processes"
    assert [rank["codes"] for rank in ranks] == [[0, 0, 2, 2, f"{TINY / 'annotations.json'}: {differ}"]] * 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, "only one process speaks"
    assert "000000442450.jpg" in errors[0]
    assert "images: 1, processes: 2; expected at least one image per process" in errors[1]
    assert done.stdout.count("AP50 ") == 2
    assert not (tmp_path / "unreadable.json").exists()

    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert (ranks[0]["poses"], ranks[1]["poses"]) == (40, 0)
    assert (ranks[0]["steps"], ranks[1]["steps"]) == ([4], [])
    for name in ("uneven", "batches"):
        alone = tmp_path / f"{name}-alone.json"
        one = CliRunner().invoke(app, ["eval", str(checkpoint), *cases[name], "--output", str(alone)])
        assert one.exit_code == 0, one.output
        assert alone.read_bytes() == (tmp_path / f"{name}.json").read_bytes()
        metrics_found, expected = (
            json.loads(path.with_suffix(".metrics.json").read_text()) for path in (tmp_path / f"{name}.json", alone)
        )
        assert (metrics_found.pop("processes"), expected.pop("processes")) == (2, 1)
        assert metrics_found.pop("seconds") > 0
        assert expected.pop("seconds") > 0
        assert metrics_found == expected


def two_classes(checkpoint: Path, **skeleton: object) -> tuple[HPetrForPoseEstimation, HPetrImageProcessor]:
    """A model of random weights that finds persons and statues."""
    model, processor = load_checkpoint(checkpoint, "cpu")
    values = model.config.to_dict() | {"id2label": {0: "person", 1: "statue"}, "label2id": {"person": 0, "statue": 1}}
    values["skeleton"] = {**values["skeleton"], **skeleton}
    torch.manual_seed(0)
    return HPetrForPoseEstimation(HPetrConfig.from_dict(values)).eval(), processor


def categories_in(path: Path, *names: str) -> Path:
    """The tiny data with these categories, whose ids follow the names; everybody is a person or the first of them."""
    truth = json.loads((TINY / "annotations.json").read_text())
    ids = {"person": 1, "statue": 2}
    truth["categories"] = [
        {**truth["categories"][0], "id": ids.pop(name, 7 + i), "name": name} for i, name in enumerate(names)
    ]
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1 if "person" in names else 7
    path.write_text(json.dumps(truth))
    return path


def test_categories_match_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = two_classes(checkpoint)
    results = [
        evaluate(model, processor, open_dataset(categories_in(tmp_path / "c.json", *names), TINY / "images"))
        for names in (("person", "statue"), ("statue", "person"), ("statue", "goat", "person"))
    ]
    assert {pose["category_id"] for pose in results[0].results} == {1, 2}
    assert results[0].results == results[1].results == results[2].results
    assert results[0].metrics == results[1].metrics
    assert not results[0].notes
    for names, found in (("person", "goat"), "not"), (("person", "statue", "statue"), "twice"), (("person",), "not"):
        other = open_dataset(categories_in(tmp_path / "c.json", *names), TINY / "images")
        with pytest.raises(InputError, match=rf"c.json: the model's class 'statue' is {found} among its categories"):
            evaluate(model, processor, other)


def test_one_class_of_another_name_is_stated(checkpoint: Path, tmp_path: Path) -> None:
    data = categories_in(tmp_path / "c.json", "goat")
    options = ("--images", str(TINY / "images"), "--limit", "1", "--output", str(tmp_path / "e.json"))
    done = CliRunner().invoke(app, ["eval", str(checkpoint), str(data), *options])
    assert done.exit_code == 0, done.output
    assert f"warning: {data}: its category is 'goat', the model's class 'person'" in done.stderr
    assert {pose["category_id"] for pose in json.loads((tmp_path / "e.json").read_text())} == {7}


def test_flip_test_needs_mirror_pairs(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = two_classes(checkpoint, flip_pairs=[], can_flip=False)
    dataset = open_dataset(categories_in(tmp_path / "c.json", "person", "statue"), TINY / "images", limit=1)
    result = evaluate(model, processor, dataset, flip_test=True)
    assert not result.flip_test
    assert result.notes == (
        "no flip test: the model's data do not say which keypoints change places in a mirror image",
    )
    assert result.results == evaluate(model, processor, dataset).results
    with pytest.raises(InputError, match="flip test: the model's skeleton has no mirror pairs"):
        predict_batch_flipped(model, processor, [dataset[0].image])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan")}, "'keypoints' or 'score' is not finite"),
        ({"keypoints": [float("inf")] * 51}, "'keypoints' or 'score' is not finite"),
        ({"keypoints": None}, "'keypoints' is None, expected a list of numbers"),
        ({"score": "0.5"}, "'score' is '0.5', expected a number"),
        ({"category_id": 99}, "category_id 99 is not in the ground truth"),
    ],
)
def test_numbers_of_results_are_checked(change: dict[str, Any], message: str) -> None:
    truth = made_ground_truth(17)
    result = perturbed(truth, 17)[0]
    with pytest.raises(InputError, match=rf"^results\[0\]: {message}"):
        coco_metrics(truth, [{**result, **change}], COCO.sigmas)


def test_forms_of_results_are_checked() -> None:
    truth = made_ground_truth(17)
    results = perturbed(truth, 17)
    missing = {key: value for key, value in results[0].items() if key != "score"}
    with pytest.raises(InputError, match=r"results\[0\]: field 'score' is missing"):
        coco_metrics(truth, [missing], COCO.sigmas)
    with pytest.raises(InputError, match="expected a list of COCO keypoint results"):
        coco_metrics(truth, {"annotations": results}, COCO.sigmas)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sigmas are .*, expected positive numbers"):
        coco_metrics(truth, results, [0.0] * 17)
    numpy = [{**r, "score": np.float32(r["score"]), "keypoints": np.array(r["keypoints"])} for r in results]
    assert coco_metrics(truth, numpy, np.array(COCO.sigmas)) == pytest.approx(coco_metrics(truth, results, COCO.sigmas))
