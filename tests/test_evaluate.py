"""The ten COCO figures against pycocotools, and evaluation of a real model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO as ReferenceCoco
from pycocotools.cocoeval import COCOeval as ReferenceEval

from hpetr.checkpoint import load_checkpoint
from hpetr.data.dataset import CocoPoseDataset
from hpetr.errors import InputError
from hpetr.evaluate import METRICS, coco_metrics, evaluate
from hpetr.skeleton import COCO

TINY = Path(__file__).parent.parent / "examples" / "tiny-coco"


def made_ground_truth(num_keypoints: int, seed: int = 0, pictures: int = 12) -> dict[str, Any]:
    """People of all sizes, a few crowds, people without keypoints, and a picture without people."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id in range(1, pictures):
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
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 640} for i in range(1, pictures + 1)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "thing", "keypoints": names}],
    }


def perturbed(truth: dict[str, Any], num_keypoints: int, noise: float = 0.05, seed: int = 1) -> list[dict[str, Any]]:
    """Results near the ground truth: some people missed, some found twice, some where nobody is."""
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


def reference_metrics(truth: dict[str, Any], results: list[dict[str, Any]], sigmas: list[float]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = ReferenceCoco()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluator = ReferenceEval(coco, coco.loadRes(copy.deepcopy(results)), "keypoints")
        evaluator.params.kpt_oks_sigmas = np.array(sigmas)
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
    assert 0.05 < ours["AP"] < 0.95, "a case that tells right from wrong"


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


def test_chosen_pictures_only() -> None:
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


def test_model_on_real_pictures_writes_every_pose(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = CocoPoseDataset(TINY / "annotations.json")
    steps: list[int] = []
    model.train()
    result = evaluate(model, processor, dataset, batch_size=3, progress=steps.append)
    assert model.training, "the mode it came in"
    assert steps == [3, 1]
    assert result.pictures == 4
    assert len(result.results) == 4 * 10, "the processor's threshold must not cut an evaluation's poses"
    metrics_file = result.write(tmp_path / "eval.json", {"checkpoint": "random"})
    assert json.loads((tmp_path / "eval.json").read_text()) == result.results
    written = json.loads(metrics_file.read_text())
    assert {name: written[name] for name in METRICS} == result.metrics
    assert written["pictures"] == 4
    assert written["checkpoint"] == "random"
    again = coco_metrics(TINY / "annotations.json", json.loads((tmp_path / "eval.json").read_text()), COCO.sigmas)
    assert again == result.metrics


def test_perfect_network_gets_perfect_figures(checkpoint: Path) -> None:
    """The whole way from normalised output to AP: a network that answers with the annotations reaches 1."""
    model, processor = load_checkpoint(checkpoint, "cpu")
    dataset = CocoPoseDataset(TINY / "annotations.json")

    class Oracle(torch.nn.Module):
        config = model.config
        device = torch.device("cpu")
        seen = 0

        def forward(self, **_: torch.Tensor) -> Any:
            sample = dataset[self.seen]
            self.seen += 1
            height, width = sample.image.shape[:2]
            poses = torch.from_numpy(sample.keypoints[..., :2]) / torch.tensor([width, height])
            scores = torch.linspace(0.9, 0.5, len(poses))
            return type("Output", (), {"scores": scores[None], "poses": poses[None]})()

    assert evaluate(Oracle(), processor, dataset).metrics["AP"] == pytest.approx(1)


def test_limit_evaluates_the_first_pictures(checkpoint: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    result = evaluate(model, processor, CocoPoseDataset(TINY / "annotations.json", limit=2))
    assert {pose["image_id"] for pose in result.results} == {790, 129648}
    assert result.pictures == 2


def test_unreadable_picture_stops_the_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "data")
    broken = tmp_path / "data" / "images" / "000000433998.jpg"
    broken.write_bytes(broken.read_bytes()[:3000])
    model, processor = load_checkpoint(checkpoint, "cpu")
    with pytest.raises(InputError, match="433998"):
        evaluate(model, processor, CocoPoseDataset(tmp_path / "data" / "annotations.json"))


def test_other_number_of_keypoints_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    truth = json.loads((TINY / "annotations.json").read_text())
    truth["categories"][0]["keypoints"] = truth["categories"][0]["keypoints"][:3]
    truth["categories"][0].pop("skeleton")
    for annotation in truth["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][:9]
    (tmp_path / "three.json").write_text(json.dumps(truth))
    model, processor = load_checkpoint(checkpoint, "cpu")
    with pytest.raises(InputError, match="poses of 3 keypoints, expected the model's 17"):
        evaluate(model, processor, CocoPoseDataset(tmp_path / "three.json", TINY / "images"))
