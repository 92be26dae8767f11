"""Keypoint evaluation: a model's poses on a data set, and the metrics of the COCO or CrowdPose protocol."""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpetr.checkpoints.card import CARD, Evaluation, data_name, model_card, write_card
from hpetr.data.annotations import AREA_OF_BOX, short
from hpetr.data.coco import read_ground_truth
from hpetr.data.dataset import PoseDataset
from hpetr.errors import InputError, needs_extra
from hpetr.images.files import is_stream, write_json
from hpetr.inference import processes
from hpetr.inference.flip_test import predict_batch_flipped
from hpetr.inference.torch_predictor import class_names, predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.skeleton import CROWDPOSE, Skeleton

IMAGE_KEYS = {"id", "width", "height"}
# In the order of the COCO protocol. hotcoco calls APM "APm", and so on.
METRICS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
# Those by crowdIndex follow, such as "AP(easy)".
CROWDPOSE_METRICS = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
EASY_BELOW, HARD_ABOVE = 0.1, 0.8
# Below every score: COCO ranks all poses of an image and keeps the best 20 itself.
KEEP_ALL = -1.0
# Rounds of batches between two exchanges of processes: an unreadable image soon ends the work of all.
ROUNDS = 8


@dataclass(frozen=True)
class EvalResult:
    """An evaluation. If several processes did it, all have its metrics and the first one the poses.

    Attributes:
        metrics: see `coco_metrics`, or `crowdpose_metrics` if the images have a `crowdIndex`.
        results: the poses, as COCO keypoint results.
        images: number of images, with people or without.
        seconds: time of reading, network and post-processing.
        protocol: "coco" or "crowdpose".
        flip_test: whether the poses are merged from those of images and their mirror images.
        processes: number of processes that shared the work.
        notes: one line for every doubt about the metrics.
    """

    metrics: dict[str, float]
    results: list[dict[str, Any]]
    images: int
    seconds: float
    protocol: Literal["coco", "crowdpose"]
    flip_test: bool
    processes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but poses and notes, flat, for JSON."""
        return {
            **self.metrics,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "protocol": self.protocol,
            "flip_test": self.flip_test,
            "processes": self.processes,
        }

    def write(self, path: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Write the poses to `path` (COCO results JSON) and the metrics beside it.

        Args:
            path: such as `eval.json`; the metrics go to `eval.metrics.json`.
            about: more entries for the file of the metrics, such as the checkpoint.

        Returns:
            The path of the metrics.

        Raises:
            InputError: a file cannot be written.
        """
        metrics = metrics_file(Path(path))
        write_json(Path(path), self.results)
        write_json(metrics, {**self.to_dict(), "poses": len(self.results), **(about or {})})
        return metrics


def metrics_file(path: Path) -> Path:
    """Return the file of the metrics for a file of poses; eval.metrics.json in this folder for a stream."""
    return Path("eval.metrics.json") if is_stream(path) else path.with_suffix(".metrics.json")


def evaluate(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    dataset: PoseDataset,
    batch_size: int = 1,
    progress: Callable[[int], None] | None = None,
    *,
    flip_test: bool = False,
    precision: str = "float32",
) -> EvalResult:
    """Evaluate a model on every image of a data set, on the model's device.

    The protocol is CrowdPose's if the images have a `crowdIndex`, else COCO's. Under torchrun, or if a process group
    exists, every process has to call this. Each gets whole batches of those that a single process makes, so that poses
    and metrics are the same.

    Args:
        model: keeps its mode (train or eval).
        processor: the checkpoint's own.
        dataset: its `ground_truth()` is compared with; its skeleton gives the sigmas.
        batch_size: images that go through the network together.
        progress: called on the first process with the number of images of all processes after each batch.
        flip_test: merge the poses of each image and of its mirror image.
        precision: see `hpetr.inference.precision.autocast`.

    Raises:
        InputError: an image cannot be read (an evaluation leaves nothing out), the model has other keypoints or
            classes than the data set, the processes have different data, there are more processes than images, or
            hotcoco is not installed. All processes raise the same.
    """
    with needs_extra("eval", "eval"):
        import hotcoco  # noqa: F401 (before the work)
    processes.join()
    ground_truth, category_ids, notes = processes.together(lambda: _checked_ground_truth(model, dataset))
    _check_processes(dataset, batch_size)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    if flip_test and not Skeleton.from_dict(model.config.skeleton).can_flip:
        notes.append("no flip test: the model's data do not say which keypoints change places in a mirror image")
        flip_test = False
    predict = predict_batch_flipped if flip_test else predict_batch

    def estimate(batch: range) -> list[_Pose]:
        samples = [dataset[index] for index in batch]
        found = predict(model, processor, [sample.image for sample in samples], KEEP_ALL, precision)
        return [
            (index, sample.image_id, poses.to_coco(sample.image_id, category_ids))
            for index, sample, poses in zip(batch, samples, found, strict=True)
        ]

    try:
        done = _share_out(estimate, len(dataset), batch_size, progress)
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - started
    results = [pose for _, _, poses in done for pose in poses]
    protocol = protocol_of(ground_truth)
    metrics: dict[str, float] = {}
    if processes.rank() == 0:
        # Metrics of a part of the data, or with an image twice, would look like good ones.
        assert [index for index, _, _ in done] == list(range(len(dataset)))
        compute = crowdpose_metrics if protocol == "crowdpose" else coco_metrics
        metrics = compute(ground_truth, results, dataset.skeleton.sigmas, [image_id for _, image_id, _ in done])
    return EvalResult(
        processes.share(metrics), results, len(dataset), seconds, protocol, flip_test, processes.count(), tuple(notes)
    )


_Pose = tuple[int, int, list[dict[str, Any]]]  # index in the data set, image id, poses as COCO results


def _share_out(
    estimate: Callable[[range], list[_Pose]], images: int, batch_size: int, progress: Callable[[int], None] | None
) -> list[_Pose]:
    """Return the poses of all images in order, on the first process; the processes take the batches in turn."""
    count, rank = processes.count(), processes.rank()
    batches = [range(start, min(start + batch_size, images)) for start in range(0, images, batch_size)]
    done: list[_Pose] = []
    for start in range(0, len(batches), ROUNDS * count):
        shared = batches[start : start + ROUNDS * count]

        def work(shared: list[range] = shared) -> list[list[_Pose]]:
            own = []
            for position in range(0, len(shared), count):
                own += [estimate(batch) for batch in shared[position + rank : position + rank + 1]]
                if progress is not None and rank == 0:
                    progress(sum(len(batch) for batch in shared[position : position + count]))
            return own

        by_rank = processes.gather_to_first(processes.together(work))
        if by_rank:
            for position in range(len(shared)):
                done += by_rank[position % count][position // count]
    return done


def _check_processes(dataset: PoseDataset, batch_size: int) -> None:
    """Raise an `InputError` on all processes if their data differ or they are more than the images."""
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


def _checked_ground_truth(
    model: HPetrForPoseEstimation, dataset: PoseDataset
) -> tuple[dict[str, Any], list[int], list[str]]:
    """Return the ground truth, the category ids by the model's class labels, and notes; InputError if they differ."""
    truth = dataset.ground_truth()
    trained = Skeleton.from_dict(model.config.skeleton)
    if trained.num_keypoints != dataset.skeleton.num_keypoints:
        raise InputError(
            f"{dataset.path}: poses of {dataset.skeleton.num_keypoints} keypoints, expected the model's "
            f"{trained.num_keypoints}"
        )
    nameless = Skeleton.generic(trained.num_keypoints).names  # of YOLO-pose files without names
    if trained.names != dataset.skeleton.names and nameless not in (trained.names, dataset.skeleton.names):
        raise InputError(
            f"{dataset.path}: its keypoints differ from the model's ({dataset.skeleton.difference(trained)})"
        )
    if protocol_of(truth) == "crowdpose":
        crowd_levels(truth)  # a wrong crowdIndex is found before the work
    category_ids, notes = match_categories(class_names(model), truth["categories"], dataset.path)
    return truth, category_ids, notes


def match_categories(
    classes: Sequence[str], categories: Sequence[Mapping[str, Any]], path: Path
) -> tuple[list[int], list[str]]:
    """Match a model's classes with the categories of a data set by their names.

    One class and one category match whatever their names.

    Args:
        classes: names by label.
        categories: of the ground truth, with `id` and `name`.
        path: of the ground truth, for the error.

    Returns:
        The category ids by class label, and a note if names differ.

    Raises:
        InputError: a class is not among the categories, or two categories have its name.
    """
    names = [str(category.get("name", category["id"])) for category in categories]
    if len(classes) == len(names) == 1:
        note = f"{path}: its category is {names[0]!r}, the model's class {classes[0]!r}: taken for the same"
        return [categories[0]["id"]], [note] if classes[0] != names[0] else []
    for name in classes:
        if names.count(name) != 1:
            found = "twice" if name in names else "not"
            raise InputError(
                f"{path}: the model's class {name!r} is {found} among its categories with keypoints "
                f"({', '.join(names)}), expected each of {', '.join(classes)} once"
            )
    return [categories[names.index(name)]["id"] for name in classes], []


def protocol_of(ground_truth: Mapping[str, Any]) -> Literal["coco", "crowdpose"]:
    """Return "crowdpose" if an image has a `crowdIndex`, else "coco"."""
    return "crowdpose" if any("crowdIndex" in image for image in ground_truth["images"]) else "coco"


def coco_metrics(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float],
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return the ten metrics of the COCO keypoint protocol, the same as pycocotools' for any K.

    Args:
        ground_truth: COCO keypoint JSON or its content. The area of an annotation without `area` is 0.53 times its box;
            `num_keypoints` is counted again.
        results: COCO keypoint results, possibly none.
        sigmas: K, of the OKS.
        image_ids: images to evaluate; None means all of the ground truth.

    Returns:
        AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL in 0..1; -1, as in COCO, if there is no person to find.

    Raises:
        InputError: the JSON or a result is not valid.
    """
    truth = ground_truth if isinstance(ground_truth, Mapping) else read_ground_truth(ground_truth)
    annotations = [
        _annotation(annotation, len(sigmas), annotation.get("area", _area(annotation)))
        for annotation in truth["annotations"]
    ]
    (metrics,) = _metrics({**truth, "annotations": annotations}, results, sigmas, [image_ids])
    return metrics


def crowdpose_metrics(
    ground_truth: Mapping[str, Any] | str | os.PathLike[str],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float] = CROWDPOSE.sigmas,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return the nine metrics of the CrowdPose protocol.

    The area of the OKS is 0.53 times the box, whatever `area` the file gives. A person with `num_keypoints` 0 is
    ignored; the file's own number, if given, counts visible keypoints (2) alone.

    Args:
        ground_truth: CrowdPose JSON or its content: COCO keypoint JSON with a `crowdIndex` for every image.
        results: COCO keypoint results, possibly none.
        sigmas: K, of the OKS.
        image_ids: images to evaluate; None means all of the ground truth.

    Returns:
        AP, AP50, AP75, AR, AR50, AR75, and by `crowd_levels` AP(easy), AP(medium), AP(hard), in 0..1; -1 if there is no
        person to find.

    Raises:
        InputError: the JSON or a result is not valid, or an image has no `crowdIndex`.
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
    whole, *parts = _metrics({**truth, "annotations": annotations}, results, sigmas, [image_ids, *levels.values()])
    by_level = {f"AP({level})": part["AP"] for level, part in zip(levels, parts, strict=True)}
    return {name: whole[name] for name in CROWDPOSE_METRICS} | by_level


def crowd_levels(ground_truth: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return image ids by the image's `crowdIndex` c: easy c < 0.1, medium 0.1 <= c <= 0.8, hard c > 0.8.

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


def _metrics(
    truth: dict[str, Any],
    results: Sequence[Mapping[str, Any]],
    sigmas: Sequence[float],
    selections: Sequence[Sequence[int] | None],
) -> list[dict[str, float]]:
    """Return COCO's ten metrics for each selection of image ids, None = all; of complete annotations."""
    with needs_extra("eval", "eval"):
        import hotcoco
    poses = _checked_results(truth, results, sigmas)
    found = []
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # hotcoco warns that sigmas other than COCO's are not COCO's
        coco = hotcoco.COCO(
            {
                "images": [{key: v for key, v in image.items() if key in IMAGE_KEYS} for image in truth["images"]],
                "annotations": truth["annotations"],
                "categories": [{"id": item["id"], "name": str(item["id"])} for item in truth["categories"]],
            }
        )
        detections = coco.load_res(poses)
        for image_ids in selections:
            if image_ids is not None and not image_ids:  # an empty list would mean all of them
                found.append(dict.fromkeys(METRICS, -1.0))
                continue
            evaluator = hotcoco.COCOeval(coco, detections, "keypoints")
            evaluator.params.kpt_oks_sigmas = [float(sigma) for sigma in sigmas]
            if image_ids is not None:
                evaluator.params.img_ids = sorted(image_ids)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            values = evaluator.get_results()
            found.append({name: float(values[name.replace("M", "m").replace("L", "l")]) for name in METRICS})
    return found


def _checked_results(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], sigmas: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the results as plain numbers; InputError for the first that does not fit."""
    if isinstance(results, Mapping) or any(not isinstance(result, Mapping) for result in results):
        raise InputError("results: expected a list of COCO keypoint results, such as 'annotations' of a results file")
    if not all(sigma > 0 for sigma in sigmas):
        raise InputError(f"sigmas are {short(list(sigmas))}, expected positive numbers")
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    checked = []
    for position, result in enumerate(results):
        where = f"results[{position}]"
        if missing := {"image_id", "category_id", "keypoints", "score"} - result.keys():
            raise InputError(f"{where}: field {min(missing)!r} is missing")
        for field, known in (("image_id", images), ("category_id", categories)):
            if result[field] not in known:
                raise InputError(f"{where}: {field} {short(result[field])} is not in the ground truth")
        try:
            keypoints = np.asarray(result["keypoints"], dtype=np.float64).reshape(-1)
        except (TypeError, ValueError):
            keypoints = np.array([])
        if not keypoints.size or not isinstance(result["keypoints"], Sequence | np.ndarray):
            raise InputError(f"{where}: 'keypoints' is {short(result['keypoints'])}, expected a list of numbers")
        if len(keypoints) != 3 * len(sigmas):
            raise InputError(f"{where}: {len(keypoints)} numbers in 'keypoints', expected {3 * len(sigmas)}")
        if not isinstance(result["score"], Real):
            raise InputError(f"{where}: 'score' is {short(result['score'])}, expected a number")
        if not (np.isfinite(keypoints).all() and np.isfinite(float(result["score"]))):
            raise InputError(f"{where}: 'keypoints' or 'score' is not finite")
        plain = {"image_id": int(result["image_id"]), "category_id": int(result["category_id"])}
        checked.append({**result, **plain, "keypoints": keypoints.tolist(), "score": float(result["score"])})
    return checked


def _annotation(annotation: Mapping[str, Any], num_keypoints: int, area: float) -> dict[str, Any]:
    """Return the fields of an annotation that the evaluation reads. A crowd may lack keypoints."""
    keypoints = annotation.get("keypoints") or [0] * (3 * num_keypoints)
    return {
        **{key: annotation[key] for key in ("id", "image_id", "category_id", "bbox")},
        "iscrowd": int(bool(annotation.get("iscrowd", 0))),
        "area": area,
        "keypoints": keypoints,
        "num_keypoints": sum(visibility > 0 for visibility in keypoints[2::3]),
    }


def _own_number(annotation: Mapping[str, Any], counted: int) -> int:
    """Return the file's `num_keypoints`, or the counted number if it gives none."""
    number = annotation.get("num_keypoints", counted)
    if not isinstance(number, int) or not 0 <= number < 2**31:
        raise InputError(
            f"annotation {annotation['id']}: 'num_keypoints' is {short(number)}, expected a whole number from 0"
        )
    return number


def _area(annotation: Mapping[str, Any]) -> float:
    return AREA_OF_BOX * annotation["bbox"][2] * annotation["bbox"][3]


def write_evaluation(folder: Path, model: HPetrForPoseEstimation, data: Path, result: EvalResult) -> Path:
    """Write the metrics of a checkpoint's weights into its card and return the card's path.

    Args:
        folder: of the checkpoint.
        model: its model.
        data: the file that describes the data set.
        result: of `evaluate`.

    Raises:
        InputError: the card there was written by hand, or it cannot be written.
    """
    how = " with a flip test" if result.flip_test else ""
    evaluation = Evaluation(data_name(data) + how, result.images, result.metrics)
    write_card(folder, model_card(model.config, folder.resolve().name, model.num_parameters(), evaluation))
    return folder / CARD
