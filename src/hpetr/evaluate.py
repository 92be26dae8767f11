"""COCO keypoint evaluation: a model's poses on a data set, and the ten figures of the protocol."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco

from hpetr.data.annotations import AREA_OF_BOX, load_annotations
from hpetr.data.dataset import CocoPoseDataset
from hpetr.data.processor import HPetrImageProcessor
from hpetr.errors import InputError
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.predict import predict_batch
from hpetr.results import write_json

# The protocol's order, and hotcoco's names of the same figures.
METRICS = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APM": "APm",
    "APL": "APl",
    "AR": "AR",
    "AR50": "AR50",
    "AR75": "AR75",
    "ARM": "ARm",
    "ARL": "ARl",
}
# Below every score: COCO ranks all poses of a picture and itself keeps the best 20.
KEEP_ALL = -1.0


@dataclass(frozen=True)
class EvalResult:
    """An evaluation.

    Attributes:
        metrics: the ten figures of `coco_metrics`.
        results: the poses, as COCO keypoint results.
        pictures: how many pictures were evaluated, people among them or not.
        seconds: reading, network and post-processing of all of them.
    """

    metrics: dict[str, float]
    results: list[dict[str, Any]]
    pictures: int
    seconds: float

    def write(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Write the poses to `path` (COCO results JSON) and the figures beside it.

        Args:
            path: e.g. `eval.json`; the figures go to `eval.metrics.json`.
            about: more entries for the figures' file, e.g. the checkpoint.

        Returns:
            The path of the figures.

        Raises:
            InputError: a file cannot be written.
        """
        results = Path(path)
        metrics = results.with_suffix(".metrics.json")
        write_json(results, self.results)
        counts = {"pictures": self.pictures, "poses": len(self.results), "seconds": round(self.seconds, 3)}
        write_json(metrics, {**self.metrics, **counts, **(about or {})})
        return metrics


def evaluate(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    dataset: CocoPoseDataset,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
) -> EvalResult:
    """Evaluate a model on every picture of a data set, on the device where the model is.

    Args:
        model: left in the mode (train or eval) it came in.
        processor: the checkpoint's own.
        dataset: its JSON, as it is, is the ground truth; its skeleton gives the sigmas.
        batch_size: pictures that go through the network together.
        progress: called with the number of pictures after each batch.

    Raises:
        InputError: a picture cannot be read (nothing is left out of an evaluation), or the model has another K or
            more classes than the data set.
    """
    ground_truth = read_ground_truth(dataset.path)
    category_ids = [category["id"] for category in ground_truth["categories"]]
    _check_model(model, dataset, len(category_ids))
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    image_ids: list[int] = []
    try:
        for start in range(0, len(dataset), batch_size):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            poses = predict_batch(model, processor, [sample.image for sample in samples], KEEP_ALL)
            for sample, result in zip(samples, poses, strict=True):
                results += result.to_coco(sample.image_id, category_ids)
                image_ids.append(sample.image_id)
            if progress is not None:
                progress(len(samples))
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    metrics = coco_metrics(ground_truth, results, dataset.skeleton.sigmas, image_ids)
    return EvalResult(metrics, results, len(dataset), seconds)


def _check_model(model: HPetrForPoseEstimation, dataset: CocoPoseDataset, classes: int) -> None:
    if model.config.num_keypoints != dataset.skeleton.num_keypoints:
        raise InputError(
            f"{dataset.path}: poses of {dataset.skeleton.num_keypoints} keypoints, expected the model's "
            f"{model.config.num_keypoints}"
        )
    if len(model.config.id2label or {}) > classes:
        raise InputError(
            f"{dataset.path}: {classes} categories with keypoints, expected at least the model's "
            f"{len(model.config.id2label or {})} classes"
        )


def read_ground_truth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The COCO JSON, checked, with every number as the file has it: `images`, `annotations` and the `categories`
    that have keypoints.

    Raises:
        InputError: see `load_annotations`.
    """
    checked = load_annotations(path)
    raw = json.loads(Path(path).read_bytes())
    kept = {category["id"] for category in checked.categories}
    return {
        "images": raw["images"],
        "categories": checked.categories,
        "annotations": [a for a in raw["annotations"] if a["category_id"] in kept],
    }


def coco_metrics(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float],
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """The ten figures of the COCO keypoint protocol, the same as pycocotools' for any K.

    Args:
        ground_truth: COCO keypoint JSON or its content. An annotation without `area` counts with 0.53 times its box;
            `num_keypoints` is counted anew.
        results: COCO keypoint results; any number of them, also none.
        sigmas: K of the OKS.
        image_ids: pictures to evaluate; None means all of the ground truth.

    Returns:
        AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL in 0..1; -1, as COCO has it, where there is nobody to find.

    Raises:
        InputError: the JSON is not valid, or a result has another K or an unknown picture.
    """
    truth = ground_truth if isinstance(ground_truth, Mapping) else read_ground_truth(ground_truth)
    known = {image["id"] for image in truth["images"]}
    for position, result in enumerate(results):
        if result["image_id"] not in known:
            raise InputError(f"results[{position}]: image_id {result['image_id']} is not in the ground truth")
        if len(result["keypoints"]) != 3 * len(sigmas):
            raise InputError(
                f"results[{position}]: {len(result['keypoints'])} numbers in 'keypoints', expected {3 * len(sigmas)}"
            )
    complete = {**truth, "annotations": [_complete(a, len(sigmas)) for a in truth["annotations"]]}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # hotcoco warns that sigmas other than COCO's are not COCO's
        coco = hotcoco.COCO(complete)
        evaluator = hotcoco.COCOeval(coco, coco.load_res([dict(result) for result in results]), "keypoints")
        evaluator.params.kpt_oks_sigmas = list(sigmas)
        if image_ids is not None:
            evaluator.params.img_ids = sorted(image_ids)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = evaluator.get_results()
    return {name: float(figures[theirs]) for name, theirs in METRICS.items()}


def _complete(annotation: Mapping[str, Any], num_keypoints: int) -> dict[str, Any]:
    """The fields that the protocol reads and files may lack."""
    keypoints = annotation.get("keypoints") or [0] * (3 * num_keypoints)
    width, height = annotation["bbox"][2:]
    return {
        "iscrowd": 0,
        "area": AREA_OF_BOX * width * height,
        **annotation,
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }
