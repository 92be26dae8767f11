"""The model card: README.md of a checkpoint, which says what the model is and how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from hpetr.errors import InputError
from hpetr.images.files import write_bytes
from hpetr.model.config import HPetrConfig
from hpetr.poses.skeleton import Skeleton

CARD = "README.md"
TASK = "keypoint-detection"
# A card with this line may be replaced; any other was written by hand and stays.
MARK = "<!-- Written by hpetr. Without this line it is never replaced. -->"
BACKBONES = {"resnet": "ResNet", "swin": "Swin"}
PAPERS = {
    "PETR": "PETR (Shi et al., CVPR 2022)",
    "Group Pose": "Group Pose (Liu et al., ICCV 2023)",
    "H-PETR": "H-PETR (PETR with the hybrid matching of H-DETR, Jia et al., arXiv 2207.13080)",
}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the weights that a card describes.

    Attributes:
        data: name of the data set.
        images: number of images.
        metrics: AP and the others, in 0..1; -1 if the data have no person of the kind.
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
    """Return the text of a card, with the hub's metadata.

    Args:
        config: of the model.
        name: of the folder, or of the hub's repository `OWNER/NAME`.
        parameters: number of the model's parameters; None leaves it out.
        evaluation: metrics of these weights, if known.
        tags: further tags of the metadata.
    """
    method = "Group Pose" if config.decoder == "group" else "H-PETR" if config.num_one_to_many_queries else "PETR"
    short = name.rpartition("/")[2]
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="hpetr",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["hpetr", "pose-estimation", "keypoints", method, *tags])),
        model_name=short if evaluation else None,
        eval_results=_results(evaluation) if evaluation else None,
    )
    kind = config.backbone_config.model_type
    size = "" if parameters is None else f" {parameters:,} parameters."
    place = f"hf://{name}" if "/" in name else name
    return f"""---
{metadata.to_yaml()}
---

{MARK}

# {short}

Multi-person pose estimation with one network and no non-maximum suppression: an image goes in, the keypoints of all \
people come out.

{PAPERS[method]} with a {BACKBONES.get(kind, kind)} backbone; {config.encoder_layers} encoder, \
{config.decoder_layers} pose-decoder and {config.joint_decoder_layers} joint-decoder layers of width \
{config.d_model}; {config.num_queries} queries, at most {config.num_poses} poses.{size}

## Metrics

{_metrics(evaluation)}

## Skeleton

{_skeleton(config)}

## Use

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
`AutoModelForKeypointDetection` and `AutoImageProcessor`.

## License

Apache-2.0, as hpetr. If the training data, or the weights that the training started from, ask for another license,
change `license` above.
"""


def is_own_text(folder: Path) -> bool:
    """Return whether the folder has a card that was written by hand."""
    path = folder / CARD
    return path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, text: str) -> None:
    """Write the folder's card.

    Raises:
        InputError: the folder has a card that was written by hand, or the card cannot be written.
    """
    _refuse_own_text(folder)
    write_bytes(folder / CARD, text.encode())


def check_card(checkpoint: str | None) -> None:
    """Raise the InputError of `write_card` before the work."""
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise InputError(f"--card: {checkpoint or 'a zoo'} is not a checkpoint folder, expected one for the card")
    _refuse_own_text(Path(checkpoint))


def data_name(path: Path) -> str:
    """Return a data file's name in a card: its folder and name alone, as a card may be published."""
    return "/".join(path.resolve().parts[-2:])


def _refuse_own_text(folder: Path) -> None:
    if is_own_text(folder):
        raise InputError(f"{folder / CARD}: was not written by hpetr and is kept; move it away to have it replaced")


def _results(evaluation: Evaluation) -> list[EvalResult]:
    measured = {metric: round(value, 4) for metric, value in evaluation.metrics.items() if value >= 0}
    return [EvalResult(TASK, "coco-keypoints", evaluation.data, metric, value) for metric, value in measured.items()]


def _metrics(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "None known: these weights were saved without an evaluation."
    values = ["-" if value < 0 else f"{value:.4f}" for value in evaluation.metrics.values()]
    table = _table(evaluation.metrics, [values])
    return f"Of {evaluation.images:,} images of {evaluation.data}, by `hpetr eval`:\n\n{table}"


def _skeleton(config: HPetrConfig) -> str:
    skeleton = Skeleton.from_dict(config.skeleton)
    rows = [
        (index, name, "" if other == index else skeleton.names[other], f"{sigma:g}")
        for index, (name, other, sigma) in enumerate(
            zip(skeleton.names, skeleton.flip_index, skeleton.sigmas, strict=True)
        )
    ]
    classes = ", ".join(_cell(name) for _, name in sorted((config.id2label or {}).items()))
    edges = ", ".join(f"{first}-{second}" for first, second in skeleton.edges) or "none"
    return f"Classes: {classes}. Limbs: {edges}.\n\n{_table(('', 'keypoint', 'mirrored', 'sigma'), rows)}"


def _table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    lines = [[_cell(value) for value in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: object) -> str:
    """Return text that a table's cell can hold."""
    return " ".join(str(text).replace("|", "\\|").split())
