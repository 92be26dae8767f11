"""Writing a model for programs without hpetr's network code: ONNX, OpenVINO, or a program of torch.export."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpetr import __version__
from hpetr.errors import InputError, first_line, needs_extra
from hpetr.images.files import check_output, is_stream, write_bytes
from hpetr.poses.skeleton import Skeleton
from hpetr.runtime.description import KEY, ModelDescription

if TYPE_CHECKING:
    import onnx

    from hpetr.model.hpetr import HPetrForPoseEstimation
    from hpetr.model.image_processor import HPetrImageProcessor


class Format(NamedTuple):
    """A file format.

    Attributes:
        suffixes: of its files; the last one is the model, the others are beside it.
        packages: needed for writing, each with the extra that installs it.
        build: returns the files' contents of a model in eval mode and its description; true for float16 weights.
        half: whether weights can be float16.
    """

    suffixes: tuple[str, ...]
    packages: dict[str, str]
    build: Callable[[HPetrForPoseEstimation, ModelDescription, bool], list[bytes]]
    half: bool = True


def output_files(output: Path, form: str) -> list[Path]:
    """Return the files of a model in the format `form`; the last one is `output`."""
    return [*map(output.with_suffix, FORMATS[form].suffixes[:-1]), output]


def check_export(
    output: Path, form: str = "onnx", *, half: bool = False, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Check, before any work, that a model can be written; `inputs` are files that it must not replace.

    Raises:
        InputError: unknown format, wrong suffix, a file that cannot be written, a missing package, or half precision in
            a format without it.
    """
    if form not in FORMATS:
        raise InputError(f"--format {form}: expected {', '.join(FORMATS)}")
    if half and not FORMATS[form].half:
        raise InputError(f"--half: is for onnx and openvino, expected no --half with {form}")
    for package, extra in FORMATS[form].packages.items():
        with needs_extra(extra, "export"):
            importlib.import_module(package)
    check_output(output, inputs, FORMATS[form].suffixes[-1:])
    *beside, _ = output_files(output, form)
    if beside and is_stream(output):
        raise InputError(f"{output}: expected the name of a file, since {form} writes another one beside it")
    for path in beside:
        check_output(path, inputs)


def describe(model: HPetrForPoseEstimation, processor: HPetrImageProcessor, name: str) -> ModelDescription:
    """Return the description of a model that is called `name`."""
    return ModelDescription(
        model=name,
        hpetr=__version__,
        shortest_edge=processor.size["shortest_edge"],
        longest_edge=processor.size["longest_edge"],
        antialias=processor.antialias,
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
        pad_size_divisor=processor.pad_size_divisor,
        threshold=processor.threshold,
        keypoint_threshold=processor.keypoint_threshold,
        num_poses=model.config.num_poses,
        classes=tuple(label for _, label in sorted((model.config.id2label or {}).items())),
        skeleton=Skeleton.from_dict(model.config.skeleton),
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
    `keypoint_scores` (B, T, K), ones if the model has none; see `HPetrOutput`. All arithmetic is float32.

    The file holds the description as JSON under "hpetr": in an ONNX file's metadata, in OpenVINO's `rt_info` ("hpetr",
    "description"), or in a torch.export file's extra file "hpetr.json".

    Args:
        model: on the CPU; it is put into eval mode.
        processor: of the model.
        output: the file, written whole or not at all: `.onnx`; `.xml`, with a `.bin` of the weights beside it; or
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
    contents = FORMATS[form].build(model, description, half)
    for file, data in zip(output_files(path, form), contents, strict=True):
        write_bytes(file, data)
    return description


def _build_onnx(model: HPetrForPoseEstimation, description: ModelDescription, half: bool) -> list[bytes]:
    from hpetr.export.onnx_graph import build_graph, halve

    graph = build_graph(model, description.pad_size_divisor)
    if half:
        halve(graph)
    graph.producer_name, graph.producer_version = "hpetr", __version__
    graph.metadata_props.add(key=KEY, value=description.to_json())
    return [graph.SerializeToString()]


def _build_openvino(model: HPetrForPoseEstimation, description: ModelDescription, half: bool) -> list[bytes]:
    from hpetr.export.onnx_graph import build_graph

    return to_openvino(build_graph(model, description.pad_size_divisor), description, half)


def to_openvino(graph: onnx.ModelProto, description: ModelDescription, half: bool) -> list[bytes]:
    """Return an ONNX graph as OpenVINO's `.bin` and `.xml`, with weights in float16 if `half`."""
    import openvino

    # Not openvino.convert_model, which reports its use over the network.
    network = openvino.Core().read_model(graph.SerializeToString())
    network.set_rt_info(description.to_json(), [KEY, "description"])
    with tempfile.TemporaryDirectory(prefix="hpetr-") as folder:  # a kill leaves nothing in the output's folder
        file = Path(folder) / "model.xml"
        try:
            openvino.save_model(network, file, compress_to_fp16=half)
            return [file.with_suffix(".bin").read_bytes(), file.read_bytes()]
        except (OSError, RuntimeError) as error:  # OpenVINO raises a RuntimeError for everything
            raise InputError(f"{folder}: cannot be written ({first_line(error)})") from error


def _build_program(model: HPetrForPoseEstimation, description: ModelDescription, half: bool) -> list[bytes]:
    import torch

    from hpetr.export.trace import WholeModel, trace

    program, data = trace(WholeModel(model), description.pad_size_divisor, gradients=True), BytesIO()
    torch.export.save(program, data, extra_files={f"{KEY}.json": description.to_json()})
    return [data.getvalue()]


ONNX = {"onnx": "export", "onnxscript": "export"}
FORMATS = {
    "onnx": Format((".onnx",), ONNX, _build_onnx),
    # The .xml is written last: its weights are there before it.
    "openvino": Format((".bin", ".xml"), ONNX | {"openvino": "openvino"}, _build_openvino),
    "torch-export": Format((".pt2",), {}, _build_program, half=False),
}
