"""Keypoint evaluation: a model's poses on a data set, and the figures of COCO's or CrowdPose's protocol."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import hotcoco

from hpetr.checkpoints.card import CARD, Evaluation, data_name, model_card, write_card
from hpetr.data.annotations import AREA_OF_BOX, load_annotations, short
from hpetr.data.dataset import PoseDataset
from hpetr.errors import InputError
from hpetr.images.files import write_json
from hpetr.inference import processes
from hpetr.inference.flip_test import predict_batch_flipped
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.skeleton import CROWDPOSE, Skeleton

IMAGE_KEYS = {"id", "width", "height"}
# COCO's figures in the protocol's order, and hotcoco's names of the same figures.
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
# CrowdPose's figures; those by crowdIndex follow, e.g. "AP(easy)".
CROWDPOSE_METRICS = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
EASY_BELOW, HARD_ABOVE = 0.1, 0.8
# Below every score: COCO ranks all poses of an image and itself keeps the best 20.
KEEP_ALL = -1.0
# Rounds of batches between two exchanges of processes: an image that cannot be read soon ends the work of all.
ROUNDS = 8


@dataclass(frozen=True)
class EvalResult:
    """An evaluation. Where several processes did it, all of them have its figures and the first one the poses.

    Attributes:
        metrics: the figures of `coco_metrics`, or of `crowdpose_metrics` where the images have a `crowdIndex`.
        results: the poses, as COCO keypoint results.
        images: how many images were evaluated, people among them or not.
        seconds: reading, network and post-processing of all of them.
        protocol: "coco" or "crowdpose".
        flip_test: whether poses are those of images and their mirror images, merged.
        processes: how many shared the work.
    """

    metrics: dict[str, float]
    results: list[dict[str, Any]]
    images: int
    seconds: float
    protocol: Literal["coco", "crowdpose"]
    flip_test: bool
    processes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything but the poses, flat, for JSON."""
        return {
            **self.metrics,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "protocol": self.protocol,
            "flip_test": self.flip_test,
            "processes": self.processes,
        }

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
        write_json(metrics, {**self.to_dict(), "poses": len(self.results), **(about or {})})
        return metrics


def evaluate(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    dataset: PoseDataset,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
    *,
    flip_test: bool = False,
) -> EvalResult:
    """Evaluate a model on every image of a data set, on the device where the model is.

    The protocol is CrowdPose's where the images have a `crowdIndex`, else COCO's. Under torchrun, or where a process
    group exists already, every process has to call this: the batches are those of one process, dealt out whole, so
    that poses and figures are the same.

    Args:
        model: left in the mode (train or eval) it came in.
        processor: the checkpoint's own.
        dataset: its `ground_truth()`, as the file has it, is what is compared with; its skeleton gives the sigmas.
        batch_size: images that go through the network together.
        progress: called, on the first process, with the number of images after each batch (of all processes).
        flip_test: merge the poses of each image and of its mirror image.

    Raises:
        InputError: an image cannot be read (nothing is left out of an evaluation), the model has other keypoints or
            more classes than the data set, the data are not the same for all processes, or there are more processes
            than images. On one process, it is raised on all.
    """
    processes.join()
    ground_truth = processes.together(lambda: _checked_ground_truth(model, dataset))
    _check_processes(dataset, batch_size)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    category_ids = [category["id"] for category in ground_truth["categories"]]
    predict = predict_batch_flipped if flip_test else predict_batch

    def estimate(batch: range) -> list[_Pose]:
        samples = [dataset[index] for index in batch]
        found = predict(model, processor, [sample.image for sample in samples], KEEP_ALL)
        return [
            (index, sample.image_id, poses.to_coco(sample.image_id, category_ids))
            for index, sample, poses in zip(batch, samples, found, strict=True)
        ]

    try:
        done = _deal_out(estimate, len(dataset), batch_size, progress)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    results = [pose for _, _, poses in done for pose in poses]
    protocol = protocol_of(ground_truth)
    metrics: dict[str, float] = {}
    if processes.rank() == 0:
        _check_complete([index for index, _, _ in done], len(dataset))
        compute = crowdpose_metrics if protocol == "crowdpose" else coco_metrics
        metrics = compute(ground_truth, results, dataset.skeleton.sigmas, [image_id for _, image_id, _ in done])
    return EvalResult(processes.share(metrics), results, len(dataset), seconds, protocol, flip_test, processes.count())


_Pose = tuple[int, int, list[dict[str, Any]]]  # index in the data set, image id, poses as COCO results


def _deal_out(
    estimate: Callable[[range], list[_Pose]], images: int, batch_size: int, progress: Callable[[int], None] | None
) -> list[_Pose]:
    """All images' poses in their order, on the first process; the batches are dealt to the processes in turn."""
    count, rank = processes.count(), processes.rank()
    batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
    done: list[_Pose] = []
    for start in range(0, len(batches), ROUNDS * count):
        dealt = batches[start : start + ROUNDS * count]

        def work(dealt: list[range] = dealt) -> list[list[_Pose]]:
            own = []
            for position in range(0, len(dealt), count):
                own += [estimate(batch) for batch in dealt[position + rank : position + rank + 1]]
                if progress is not None and rank == 0:
                    progress(sum(len(batch) for batch in dealt[position : position + count]))
            return own

        by_rank = processes.gather_to_first(processes.together(work))
        if by_rank:
            for position in range(len(dealt)):
                done += by_rank[position % count][position // count]
    return done


def _check_complete(indices: list[int], images: int) -> None:
    """Every image once: a figure on part of the data, or with some of it twice, would look like a good one."""
    if indices != list(range(images)):
        lost, twice = images - len(set(indices)), len(indices) - len(set(indices))
        raise AssertionError(f"evaluation: of {images} images {lost} are lost and {twice} counted twice")


def _check_processes(dataset: PoseDataset, batch_size: int) -> None:
    """Every process sees the same of the others, so that either none raises or all do."""
    shares = processes.gather((len(dataset), batch_size))
    for rank, (images, size) in enumerate(shares):
        if (images, size) != shares[0]:
            raise InputError(
                f"{dataset.path}: {shares[0][0]} images in batches of {shares[0][1]}, but process {rank} has "
                f"{images} in batches of {size}; expected the same of all processes"
            )
    if len(shares) > len(dataset):
        raise InputError(
            f"{dataset.path}: images: {len(dataset)}, processes: {len(shares)}; expected at least one image per process"
        )


def _checked_ground_truth(model: HPetrForPoseEstimation, dataset: PoseDataset) -> dict[str, Any]:
    truth = dataset.ground_truth()
    classes, known = len(truth["categories"]), len(model.config.id2label or {})
    if model.config.num_keypoints != dataset.skeleton.num_keypoints:
        raise InputError(
            f"{dataset.path}: poses of {dataset.skeleton.num_keypoints} keypoints, expected the model's "
            f"{model.config.num_keypoints}"
        )
    trained = Skeleton.from_dict(model.config.skeleton)
    nameless = Skeleton.generic(trained.num_keypoints).names  # what YOLO-pose files without names get
    if trained.names != dataset.skeleton.names and nameless not in (trained.names, dataset.skeleton.names):
        raise InputError(
            f"{dataset.path}: its keypoints differ from the model's ({dataset.skeleton.difference(trained)})"
        )
    if known > classes:
        raise InputError(
            f"{dataset.path}: {classes} categories with keypoints, expected at least the model's {known} classes"
        )
    if protocol_of(truth) == "crowdpose":
        crowd_levels(truth)  # a wrong crowdIndex is found before the work, not after
    return truth


def protocol_of(ground_truth: Mapping[str, Any]) -> Literal["coco", "crowdpose"]:
    """ "crowdpose" where an image has a `crowdIndex`, else "coco"."""
    return "crowdpose" if any("crowdIndex" in image for image in ground_truth["images"]) else "coco"


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
        image_ids: images to evaluate; None means all of the ground truth.

    Returns:
        AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL in 0..1; -1, as COCO has it, where there is nobody to find.

    Raises:
        InputError: the JSON is not valid, or a result has another K or an unknown image.
    """
    truth = ground_truth if isinstance(ground_truth, Mapping) else read_ground_truth(ground_truth)
    annotations = []
    for annotation in truth["annotations"]:
        area = annotation.get("area", _area(annotation))
        annotations.append(_annotation(annotation, len(sigmas), area))
    (figures,) = _figures({**truth, "annotations": annotations}, results, sigmas, [image_ids])
    return figures


def crowdpose_metrics(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float] = CROWDPOSE.sigmas,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """The nine figures of the CrowdPose protocol.

    The OKS is of 0.53 times the box, whatever `area` the file gives. A person whose `num_keypoints` is 0 counts
    neither way; the file's own number is taken, which counts visible keypoints (2) alone, where it gives one.

    Args:
        ground_truth: CrowdPose JSON or its content: COCO keypoint JSON with a `crowdIndex` for every image.
        results: COCO keypoint results; any number of them, also none.
        sigmas: K of the OKS.
        image_ids: images to evaluate; None means all of the ground truth.

    Returns:
        AP, AP50, AP75, AR, AR50, AR75, and by `crowd_levels` AP(easy), AP(medium), AP(hard), in 0..1; -1 where there
        is nobody to find.

    Raises:
        InputError: the JSON is not valid, an image has no `crowdIndex`, or a result has another K or an unknown
            image.
    """
    truth = ground_truth if isinstance(ground_truth, Mapping) else read_ground_truth(ground_truth)
    annotations = []
    for annotation in truth["annotations"]:
        complete = _annotation(annotation, len(sigmas), _area(annotation))
        annotations.append({**complete, "num_keypoints": _own_number(annotation, complete["num_keypoints"])})
    levels = crowd_levels(truth)
    if image_ids is not None:
        chosen = set(image_ids)
        levels = {level: [image_id for image_id in ids if image_id in chosen] for level, ids in levels.items()}
    whole, *parts = _figures({**truth, "annotations": annotations}, results, sigmas, [image_ids, *levels.values()])
    by_level = {f"AP({level})": part["AP"] for level, part in zip(levels, parts, strict=True)}
    return {name: whole[name] for name in CROWDPOSE_METRICS} | by_level


def crowd_levels(ground_truth: Mapping[str, Any]) -> dict[str, list[int]]:
    """Image ids by the image's `crowdIndex` c: easy c < 0.1, medium 0.1 <= c <= 0.8, hard c > 0.8.

    Raises:
        InputError: an image has no `crowdIndex`, or one outside 0..1.
    """
    levels: dict[str, list[int]] = {"easy": [], "medium": [], "hard": []}
    for image in ground_truth["images"]:
        index = image.get("crowdIndex")
        if not isinstance(index, Real) or not 0 <= float(index) <= 1:
            raise InputError(
                f"image {image['id']}: 'crowdIndex' is {index!r}, expected a number in 0..1 as others have"
            )
        level = "easy" if float(index) < EASY_BELOW else "hard" if float(index) > HARD_ABOVE else "medium"
        levels[level].append(image["id"])
    return levels


def _figures(
    truth: dict[str, Any],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float],
    selections: Sequence[Sequence[int] | None],
) -> list[dict[str, float]]:
    """COCO's ten figures for each selection of image ids, None = all; of complete annotations."""
    known = {image["id"] for image in truth["images"]}
    for position, result in enumerate(results):
        if result["image_id"] not in known:
            raise InputError(f"results[{position}]: image_id {result['image_id']} is not in the ground truth")
        if len(result["keypoints"]) != 3 * len(sigmas):
            raise InputError(
                f"results[{position}]: {len(result['keypoints'])} numbers in 'keypoints', expected {3 * len(sigmas)}"
            )
    figures = []
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # hotcoco warns that sigmas other than COCO's are not COCO's
        coco = hotcoco.COCO(
            {
                "images": [{key: v for key, v in image.items() if key in IMAGE_KEYS} for image in truth["images"]],
                "annotations": truth["annotations"],
                "categories": [{"id": item["id"], "name": str(item["id"])} for item in truth["categories"]],
            }
        )
        poses = coco.load_res([dict(result) for result in results])
        for image_ids in selections:
            if image_ids is not None and not image_ids:  # an empty list would mean all of them
                figures.append(dict.fromkeys(METRICS, -1.0))
                continue
            evaluator = hotcoco.COCOeval(coco, poses, "keypoints")
            evaluator.params.kpt_oks_sigmas = list(sigmas)
            if image_ids is not None:
                evaluator.params.img_ids = sorted(image_ids)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            found = evaluator.get_results()
            figures.append({name: float(found[theirs]) for name, theirs in METRICS.items()})
    return figures


def _annotation(annotation: Mapping[str, Any], num_keypoints: int, area: float) -> dict[str, Any]:
    """What the evaluation reads of an annotation, whose other keys may hold anything. Crowds may lack keypoints."""
    keypoints = annotation.get("keypoints") or [0] * (3 * num_keypoints)
    return {
        **{key: annotation[key] for key in ("id", "image_id", "category_id", "bbox")},
        "iscrowd": int(bool(annotation.get("iscrowd", 0))),
        "area": area,
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }


def _own_number(annotation: Mapping[str, Any], counted: int) -> int:
    """The file's `num_keypoints`, where it gives one."""
    number = annotation.get("num_keypoints", counted)
    if not isinstance(number, int) or not 0 <= number < 2**31:
        raise InputError(
            f"annotation {annotation['id']}: 'num_keypoints' is {short(number)}, expected a whole number from 0"
        )
    return number


def _area(annotation: Mapping[str, Any]) -> float:
    return AREA_OF_BOX * annotation["bbox"][2] * annotation["bbox"][3]


def write_evaluation(folder: Path, model: HPetrForPoseEstimation, data: Path, result: EvalResult) -> Path:
    """Write the figures of a checkpoint's weights into its card; returns the card's path.

    Args:
        folder: of the checkpoint.
        model: its model.
        data: the file that describes the data set.
        result: of `hpetr.evaluation.evaluate.evaluate`.

    Raises:
        InputError: the card there was written by hand, or it cannot be written.
    """
    how = " with a flip test" if result.flip_test else ""
    evaluation = Evaluation(data_name(data) + how, result.images, result.metrics)
    write_card(folder, model_card(model.config, folder.resolve().name, model.num_parameters(), evaluation))
    return folder / CARD
