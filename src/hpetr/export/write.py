"""Models for programs without hpetr's own network code: ONNX, OpenVINO, or a program of torch.export."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from hpetr import __version__
from hpetr.errors import InputError
from hpetr.images.files import check_writable, write_bytes
from hpetr.poses.skeleton import Skeleton
from hpetr.runtime.description import KEY, ModelDescription

if TYPE_CHECKING:
    import onnx

    from hpetr.model.hpetr import HPetrForPoseEstimation
    from hpetr.model.image_processor import HPetrImageProcessor

# Suffix and needed packages, by format.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx": (".onnx", ("onnx", "onnxscript")),
    "openvino": (".xml", ("onnx", "onnxscript", "openvino")),
    "torch-export": (".pt2", ()),
}


def check_export(output: Path, form: str = "onnx", *, half: bool = False) -> None:
    """Prove before any work that the file can be written and that what writes it is there.

    Raises:
        InputError: unknown format, another suffix, a folder that cannot be written, a missing package, or half
            precision of a torch.export program.
    """
    if form not in FORMATS:
        raise InputError(f"--format {form}: expected {', '.join(FORMATS)}")
    suffix, packages = FORMATS[form]
    if output.suffix.lower() != suffix or output.is_dir():
        raise InputError(f"{output}: expected the name of a file that ends in {suffix}")
    if half and form == "torch-export":
        raise InputError("--half: is for onnx and openvino, expected no --half with torch-export")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            extra = "openvino" if package == "openvino" else "export"
            install = f'pip install "hpetr[{extra}]"'
            raise InputError(f"export: the package {package} is missing, expected after {install}") from error
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


def export_model(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    output: str | os.PathLike[str],
    form: str = "onnx",
    name: str = "hpetr",
    *,
    half: bool = False,
) -> ModelDescription:
    """Write a model as a file of another runtime, for batches of any number and size.

    Inputs are `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W) of the processor; heights and widths are multiples
    of its `pad_size_divisor`. Outputs are `scores` (B, T), `poses` (B, T, K, 2), `pose_labels` (B, T) and
    `keypoint_scores` (B, T, K), ones where the model gives none; see `HPetrOutput`. Everything is computed in float32.

    The description goes into the file as JSON, under "hpetr": in an ONNX file's metadata, in OpenVINO's `rt_info`
    ("hpetr", "description"), among a torch.export file's extra files ("hpetr.json").

    Args:
        model: on the CPU; it is put into eval mode.
        output: the file, which appears whole or not at all: `.onnx`; `.xml`, with a `.bin` of the weights beside it; or
            `.pt2`.
        form: "onnx", "openvino" or "torch-export".
        name: of the model, for the description.
        half: keep the weights of matrices and convolutions in float16, which halves the file.

    Returns:
        The description.

    Raises:
        InputError: see `check_export`.
    """
    path = Path(output)
    check_export(path, form, half=half)
    description = describe(model.eval(), processor, name)
    if form == "torch-export":
        _write_program(model, description, path)
        return description
    from hpetr.export.onnx_graph import build_graph, halve

    graph = build_graph(model, description.pad_size_divisor)
    graph.producer_name, graph.producer_version = "hpetr", __version__
    if form == "openvino":
        write_openvino(graph, description, path, half=half)
        return description
    if half:
        halve(graph)
    entry = graph.metadata_props.add()
    entry.key, entry.value = KEY, description.to_json()
    write_bytes(path, graph.SerializeToString())
    return description


def write_openvino(graph: onnx.ModelProto, description: ModelDescription, path: Path, *, half: bool) -> None:
    """Write an ONNX graph as OpenVINO's `.xml` and `.bin`; see `export_model`."""
    import openvino

    # Not openvino.convert_model: that one reports its use over the network.
    network = openvino.Core().read_model(graph.SerializeToString())
    network.set_rt_info(description.to_json(), [KEY, "description"])

    def save(temporary: Path) -> None:
        openvino.save_model(network, temporary, compress_to_fp16=half)

    _write_files(path, (".bin", ".xml"), save)  # the .xml last: where it is, its weights are


def _write_program(model: HPetrForPoseEstimation, description: ModelDescription, path: Path) -> None:
    import torch

    from hpetr.export.trace import build_program

    program, data = build_program(model, description.pad_size_divisor), BytesIO()
    torch.export.save(program, data, extra_files={f"{KEY}.json": description.to_json()})
    write_bytes(path, data.getvalue())


def _write_files(path: Path, suffixes: tuple[str, ...], save: Callable[[Path], None]) -> None:
    """Let `save` write files into a folder of its own, and move them to their places in this order."""
    try:
        with tempfile.TemporaryDirectory(prefix=".hpetr-", dir=path.parent) as folder:
            save(Path(folder) / path.name)
            for suffix in suffixes:
                (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
    except (OSError, RuntimeError) as error:  # RuntimeError: OpenVINO's, of any kind
        reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
        raise InputError(f"{path}: cannot be written ({reason})") from error
