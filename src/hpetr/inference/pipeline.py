"""The task "keypoint-detection" of transformers' `pipeline`, which importing this module registers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForKeypointDetection
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline

from hpetr.model.image_processor import HPetrImageProcessor

TASK = "keypoint-detection"


class KeypointDetectionPipeline(Pipeline):
    """Poses of images: `pipeline("keypoint-detection", model=FOLDER)(image)`.

    An image is anything that `load_image` reads, and a list of images gives a list of results. A result is a list of
    poses, best first, each a dict with

    - `label` and `score`: class and score of the pose;
    - `box`: `xmin`, `ymin`, `xmax`, `ymax` in pixels of the image;
    - `keypoints`: a list of dicts with `name`, `x`, `y` in pixels of the image, and `score`.

    A call takes `threshold`, the minimum score of a pose; without it the processor's counts.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = True  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    image_processor: HPetrImageProcessor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.device.type == "cpu":
            self.model.float()  # a small checkpoint may be float16; a CPU computes in float32

    def _sanitize_parameters(  # type: ignore[override]
        self, threshold: float | None = None
    ) -> tuple[dict, dict, dict]:
        return {}, {}, {} if threshold is None else {"threshold": threshold}

    def preprocess(self, input_: Any) -> dict[str, Any]:  # type: ignore[override]
        batch = self.image_processor(input_)
        sizes = torch.tensor(batch.original_sizes)  # (1, 2)
        return {
            "pixel_values": batch["pixel_values"].to(self.model.dtype),
            "pixel_mask": batch["pixel_mask"],
            "target_sizes": sizes,
        }

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        sizes = input_tensors.pop("target_sizes")
        return {"outputs": self.model(**input_tensors), "target_sizes": sizes}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Any], threshold: float | None = None
    ) -> list[dict[str, Any]]:
        (poses,) = self.image_processor.post_process_pose_estimation(**model_outputs, threshold=threshold)
        names, labels = self.model.config.skeleton["names"], self.model.config.id2label or {}
        return [
            {
                "label": labels[label],
                "score": score,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
                "keypoints": [
                    {"name": name, "x": x, "y": y, "score": keypoint_score}
                    for name, (x, y), keypoint_score in zip(names, keypoints, keypoint_scores, strict=True)
                ],
            }
            for label, score, box, keypoints, keypoint_scores in zip(
                *(poses[key].tolist() for key in ("labels", "scores", "boxes", "keypoints", "keypoint_scores")),
                strict=True,
            )
        ]


PIPELINE_REGISTRY.register_pipeline(TASK, KeypointDetectionPipeline, pt_model=AutoModelForKeypointDetection)
