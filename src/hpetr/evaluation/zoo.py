"""Official checkpoints beside the published metrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpetr.checkpoints.folder import CONFIG, load_checkpoint, resolve_device
from hpetr.checkpoints.official import identify, load_official, read_official, weight_shapes
from hpetr.data.dataset import PoseDataset
from hpetr.errors import InputError
from hpetr.evaluation.evaluate import EvalResult, evaluate
from hpetr.images.files import write_json
from hpetr.inference import processes
from hpetr.inference.torch_predictor import default_batch_size
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor


@dataclass(frozen=True)
class PublishedAP:
    """Keypoint AP in 0..1 on COCO val2017, or on CrowdPose's test images.

    Attributes:
        official: of the official runs.
        petr_zoo: of PETR's own model zoo for its file of this model, or None.
        flip_test: of the official run with a flip test, or None.
    """

    official: float
    petr_zoo: float | None = None
    flip_test: float | None = None


PUBLISHED: dict[str, PublishedAP] = {
    "petr-r50": PublishedAP(0.693, petr_zoo=0.688),
    "petr-r101": PublishedAP(0.699, petr_zoo=0.700),
    "petr-swin-l": PublishedAP(0.733, petr_zoo=0.731),
    "h-petr-r50": PublishedAP(0.709),
    "h-petr-r101": PublishedAP(0.710),
    "h-petr-swin-l": PublishedAP(0.749),
    "petr-swin-l-crowdpose": PublishedAP(0.717, flip_test=0.723),
    "group-pose-r50": PublishedAP(0.720),
    "group-pose-swin-t": PublishedAP(0.736),
    "group-pose-swin-l": PublishedAP(0.748),
    "group-pose-swin-l-crowdpose": PublishedAP(0.741),
}


@dataclass(frozen=True)
class ZooScore:
    """A checkpoint of the zoo and its evaluation."""

    path: Path
    preset: str
    result: EvalResult

    @property
    def published(self) -> float | None:
        """The AP to compare with; None if none is published with a flip test."""
        published = PUBLISHED[self.preset]
        return published.flip_test if self.result.flip_test else published.official

    @property
    def difference(self) -> float | None:
        """AP minus the published one; None without one, or if the data have no person to find."""
        ap = self.result.metrics["AP"]
        return None if self.published is None or ap < 0 else ap - self.published


@dataclass(frozen=True)
class ZooResult:
    """The evaluated checkpoints, and the paths of the others with the reasons."""

    scores: list[ZooScore]
    left_out: list[tuple[Path, str]]

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write all metrics as JSON, with `about` in front.

        Raises:
            InputError: the file cannot be written.
        """
        checkpoints = [
            {
                "checkpoint": str(score.path),
                "preset": score.preset,
                **score.result.to_dict(),
                "published_AP": score.published,
                "published_AP_petr_zoo": PUBLISHED[score.preset].petr_zoo,
                "difference": score.difference,
            }
            for score in self.scores
        ]
        left_out = [{"checkpoint": str(path), "reason": reason} for path, reason in self.left_out]
        write_json(path, {**about, "checkpoints": checkpoints, "left_out": left_out})


def find_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the `.pth` files and checkpoint folders directly in a folder, by name.

    Raises:
        InputError: there is no such folder, or none of either in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder, expected official checkpoints (.pth)")
    found = sorted(path for path in root.iterdir() if path.suffix == ".pth" or (path / CONFIG).is_file())
    if not found:
        raise InputError(f"{root}: nothing to evaluate, expected official checkpoints (.pth) or checkpoint folders")
    return found


def evaluate_zoo(
    paths: Sequence[Path],
    dataset: PoseDataset,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    flip_test: bool = False,
) -> ZooResult:
    """Evaluate every checkpoint that is of the zoo and has the data's K; the others are left out, with the reason.

    Args:
        paths: see `find_checkpoints`.
        dataset: see `evaluate`.
        device: where the models go.
        batch_size: images that go through the network together; None takes 8 on a GPU and 1 on the CPU.
        progress: called with numbers of images, which in the end are len(paths) * len(dataset).
        flip_test: see `evaluate`.

    Raises:
        InputError: no checkpoint could be evaluated, or one could not be on these data; see `evaluate`.
    """
    scores: list[ZooScore] = []
    left_out: list[tuple[Path, str]] = []
    for path in paths:
        try:
            load = partial(load_zoo_model, path, device, dataset.skeleton.num_keypoints)
            preset, model, processor = processes.together(load)
        except InputError as error:
            left_out.append((path, str(error)))
            if progress is not None:
                progress(len(dataset))
            continue
        size = batch_size or default_batch_size(model)
        result = evaluate(model, processor, dataset, size, progress, flip_test=flip_test)
        # The poses of six models would fill memory for nothing.
        scores.append(ZooScore(path, preset, replace(result, results=[])))
    if not scores:
        path, reason = left_out[0]
        raise InputError(f"{path.parent}: none of {len(paths)} checkpoints can be evaluated; the first: {reason}")
    return ZooResult(scores, left_out)


def load_zoo_model(
    path: Path, device: str | torch.device, num_keypoints: int
) -> tuple[str, HPetrForPoseEstimation, HPetrImageProcessor]:
    """Preset, model and processor of an official `.pth` file or a checkpoint folder; their names play no part.

    Raises:
        InputError: the checkpoint cannot be read, is none of the zoo's, or has another K than `num_keypoints`.
    """
    chosen = resolve_device(device)
    if path.is_dir():
        model, processor = load_checkpoint(path, "cpu")
        preset = identify(weight_shapes(model.state_dict()), path, official=False)
    else:
        state = read_official(path)
        preset = identify(weight_shapes(state), path)
        model, processor = load_official(state, preset), HPetrImageProcessor.preset(preset)
    config, zoo = model.config, HPetrConfig.preset(preset)
    if (config.num_keypoints, config.num_labels) != (zoo.num_keypoints, zoo.num_labels):
        found = f"{preset} with {config.num_keypoints} keypoints and {config.num_labels} classes"
        raise InputError(f"{path}: is none of the zoo's models, but {found}")
    if config.num_keypoints != num_keypoints:
        raise InputError(f"{path}: {preset} has {config.num_keypoints} keypoints, the data {num_keypoints}")
    return preset, model.eval().to(chosen), processor
