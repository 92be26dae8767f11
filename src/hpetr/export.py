"""Models for programs without torch: one ONNX file, which also says how pictures go in and poses come out."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hpetr import __version__
from hpetr.errors import InputError
from hpetr.results import check_writable, write_bytes
from hpetr.runtime.description import KEY, ModelDescription
from hpetr.skeleton import Skeleton

if TYPE_CHECKING:
    from hpetr.data.processor import HPetrImageProcessor
    from hpetr.model.hpetr import HPetrForPoseEstimation

ONNX_SUFFIX = ".onnx"
INSTALL = 'pip install "hpetr[export]"'


def check_export(output: Path) -> None:
    """Prove before any work that the ONNX file can be written and that what writes it is there.

    Raises:
        InputError: another suffix, a folder that cannot be written, or a missing package.
    """
    if output.suffix.lower() != ONNX_SUFFIX or output.is_dir():
        raise InputError(f"{output}: expected the name of a file that ends in {ONNX_SUFFIX}")
    for package in ("onnx", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"export: the package {package} is missing, expected after {INSTALL}") from error
    check_writable(output.parent)


def describe(model: HPetrForPoseEstimation, processor: HPetrImageProcessor, name: str) -> ModelDescription:
    """What stands in the file beside the network.

    Args:
        name: of the model.
    """
    config = model.config
    return ModelDescription(
        model=name,
        hpetr=__version__,
        shortest_edge=processor.size["shortest_edge"],
        longest_edge=processor.size["longest_edge"],
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
        pad_size_divisor=processor.pad_size_divisor,
        threshold=processor.threshold,
        num_poses=config.num_poses,
        classes=tuple(label for _, label in sorted((config.id2label or {}).items())),
        skeleton=Skeleton.from_dict(config.skeleton),
    )


def export_onnx(
    model: HPetrForPoseEstimation, processor: HPetrImageProcessor, output: str | os.PathLike[str], name: str = "hpetr"
) -> ModelDescription:
    """Write a model as an ONNX file, float32, for batches of any number and size.

    Inputs are `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W) of the processor; heights and widths are multiples
    of its `pad_size_divisor`. Outputs are `scores` (B, T), `poses` (B, T, K, 2), `pose_labels` (B, T) and
    `keypoint_scores` (B, T, K), ones where the model gives none; see `HPetrOutput`. The description goes into the
    file's metadata as JSON, under "hpetr".

    Args:
        model: on the CPU; it is put into eval mode.
        output: the file, which appears whole or not at all.
        name: of the model, for the description.

    Returns:
        The description.

    Raises:
        InputError: see `check_export`.
    """
    path = Path(output)
    check_export(path)
    from hpetr.onnx_graph import build_graph

    description = describe(model, processor, name)
    graph = build_graph(model.eval(), description.pad_size_divisor)
    graph.producer_name, graph.producer_version = "hpetr", __version__
    entry = graph.metadata_props.add()
    entry.key, entry.value = KEY, description.to_json()
    write_bytes(path, graph.SerializeToString())
    return description
