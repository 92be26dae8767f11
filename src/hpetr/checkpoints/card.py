"""The model card: README.md of a checkpoint, which says what the model is and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult as HubResult
from huggingface_hub import ModelCardData

from hpetr.checkpoints.hub import CARD
from hpetr.errors import InputError
from hpetr.images.files import write_bytes
from hpetr.model.config import HPetrConfig
from hpetr.poses.skeleton import Skeleton

if TYPE_CHECKING:
    pass

TASK = "keypoint-detection"
# A card with this line is ours and is written anew; any other is somebody's own and stays.
MARK = "<!-- Written by hpetr. Without this line it is never replaced. -->"
BACKBONES = {"resnet": "ResNet", "swin": "Swin", "efficientnet_lite": "EfficientNet-Lite0"}


@dataclass(frozen=True)
class Evaluation:
    """Figures of exactly the weights that a card stands beside.

    Attributes:
        data: what they were measured on.
        images: how many.
        metrics: AP and the others, in 0..1; -1 where there was nobody to find.
    """

    data: str
    images: int
    metrics: Mapping[str, float]


def model_card(
    config: HPetrConfig,
    name: str,
    parameters: int | None = None,
    evaluation: Evaluation | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The text of a card, metadata of the hub included.

    Args:
        config: of the model.
        name: of the folder, or of the hub's repository `OWNER/NAME`.
        parameters: how many numbers the model has; None leaves them out.
        evaluation: figures of these weights, where they are known.
        tags: more of them for the metadata.
    """
    method = "H-PETR" if config.num_one_to_many_queries else "PETR"
    short = name.rpartition("/")[2]
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="hpetr",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["hpetr", "pose-estimation", "keypoints", method, *tags])),
        model_name=short if evaluation else None,
        eval_results=_results(evaluation) if evaluation else None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        MARK,
        f"# {short}",
        _summary(config, method, parameters),
        _figures(evaluation),
        _skeleton(
            Skeleton.from_dict(config.skeleton), [str(name) for _, name in sorted((config.id2label or {}).items())]
        ),
        _use(name),
        "## Licence\n\nApache-2.0, as hpetr. Where the training data, or the weights that the training started from, "
        "ask for another licence, `license` above has to say so.",
    ]
    return "\n\n".join(parts) + "\n"


def is_own_text(folder: Path) -> bool:
    """Whether somebody wrote the folder's card by hand."""
    path = folder / CARD
    return path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, text: str) -> None:
    """Write the folder's card.

    Raises:
        InputError: the card there was written by hand, or it cannot be written.
    """
    _refuse_own_text(folder)
    write_bytes(folder / CARD, text.encode())


def check_card(checkpoint: str | None) -> None:
    """Raise InputError where `write_evaluation` would: before the work."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise InputError(
            f"--card: {checkpoint or 'a zoo'} is no checkpoint's folder, expected one to write a card into"
        )
    _refuse_own_text(Path(checkpoint))


def data_name(path: Path) -> str:
    """What a card says of a data set's file: a card may be published, so no more of the path than names the data."""
    return "/".join(path.resolve().parts[-2:])


def _refuse_own_text(folder: Path) -> None:
    if is_own_text(folder):
        raise InputError(f"{folder / CARD}: was not written by hpetr and is kept; move it away to have it replaced")


def _results(evaluation: Evaluation) -> list[HubResult]:
    return [
        HubResult(
            task_type=TASK,
            dataset_type="coco-keypoints",
            dataset_name=evaluation.data,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in evaluation.metrics.items()
        if value >= 0
    ]


def _summary(config: HPetrConfig, method: str, parameters: int | None) -> str:
    kind = config.backbone_config.model_type
    paper = {
        "PETR": "PETR (Shi et al., CVPR 2022)",
        "H-PETR": "H-PETR (PETR with the hybrid matching of H-DETR, Jia et al., arXiv 2207.13080)",
    }[method]
    size = "" if parameters is None else f" {parameters:,} parameters."
    return (
        "Multi-person pose estimation with one network and no non-maximum suppression: an image goes in, the "
        "keypoints of all people come out.\n\n"
        f"{paper} with a {BACKBONES.get(kind, kind)} backbone; {config.encoder_layers} encoder, "
        f"{config.decoder_layers} pose-decoder and {config.joint_decoder_layers} joint-decoder layers of width "
        f"{config.d_model}; {config.num_queries} queries, at most {config.num_poses} poses.{size}"
    )


def _figures(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "## Figures\n\nNone known: these weights were saved without an evaluation."
    names = list(evaluation.metrics)
    values = ["-" if value < 0 else f"{value:.4f}" for value in evaluation.metrics.values()]
    rows = [names, ["---"] * len(names), values]
    table = "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in rows)
    return f"## Figures\n\nOf {evaluation.images:,} images of {evaluation.data}, by `hpetr eval`:\n\n{table}"


def _skeleton(skeleton: Skeleton, classes: Sequence[str]) -> str:
    rows = ["| | keypoint | mirrored | sigma |", "|---|---|---|---|"]
    for index, (name, sigma) in enumerate(zip(skeleton.names, skeleton.sigmas, strict=True)):
        mirrored = skeleton.flip_index[index]
        other = "" if mirrored == index else _cell(skeleton.names[mirrored])
        rows.append(f"| {index} | {_cell(name)} | {other} | {sigma:g} |")
    edges = ", ".join(f"{first}-{second}" for first, second in skeleton.edges) or "none"
    shown = ", ".join(_cell(name) for name in classes)
    return "\n".join([f"## Skeleton\n\nClasses: {shown}. Limbs: {edges}.\n", *rows])


def _use(name: str) -> str:
    place = f"hf://{name}" if "/" in name else name
    return f"""## Use

```bash
hpetr predict photo.jpg --checkpoint {place}
```

```python
from hpetr import PosePredictor

result = PosePredictor("{place}")("photo.jpg")
result.keypoints  # (people, K, 2) x, y in pixels of the photo
result.scores  # (people,) best first
```

With transformers: `hpetr.HPetrForPoseEstimation` and `hpetr.HPetrImageProcessor`, or, once `hpetr.model` is imported,
`AutoModelForKeypointDetection` and `AutoImageProcessor`."""


def _cell(text: object) -> str:
    """Text that a table's cell can hold."""
    return " ".join(str(text).replace("|", "\\|").split())
