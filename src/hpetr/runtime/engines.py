"""The networks of exported models: ONNX files in ONNX Runtime, OpenVINO's IR in OpenVINO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpetr.errors import InputError
from hpetr.runtime.description import KEY, ModelDescription

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("scores", "poses", "pose_labels")
ONNX_SUFFIX, OPENVINO_SUFFIX, TORCH_SUFFIX = ".onnx", ".xml", ".pt2"


class Engine(Protocol):
    """An exported model, loaded."""

    description: ModelDescription
    device_name: str

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name, see `ModelDescription.to_json`; inputs (B, 3, H, W) float32 and (B, H, W) int64."""


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one of an exported model: .onnx, .xml, or .pt2 (which no engine takes)."""
    return Path(path).suffix.lower() in (ONNX_SUFFIX, OPENVINO_SUFFIX, TORCH_SUFFIX) and not Path(path).is_dir()


def open_engine(path: Path, threads: int | None, device: str) -> Engine:
    """Load an exported model.

    Args:
        threads: of the CPU; None leaves it to the runtime.
        device: "auto", "cpu", "cuda" (ONNX Runtime), or a device of OpenVINO's.

    Raises:
        InputError: no such file, not an exported model of hpetr, broken, or the runtime or device is not there.
    """
    suffix = path.suffix.lower()
    if suffix == TORCH_SUFFIX:
        raise InputError(
            f"{path}: torch.export's archives may hold pickles, which hpetr never loads; expected .onnx or .xml"
        )
    if suffix not in (ONNX_SUFFIX, OPENVINO_SUFFIX):
        raise InputError(f"{path}: expected the .onnx or .xml file of an exported model")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an exported model")
    engine: type[OnnxEngine] | type[OpenVinoEngine] = OnnxEngine if suffix == ONNX_SUFFIX else OpenVinoEngine
    return engine(path, threads, device)


class OnnxEngine:
    """A `.onnx` file in ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None, device: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: needs ONNX Runtime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong becomes one error, without ONNX Runtime's own lines before it
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _onnx_providers(device, onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime has an exception class for each kind of failure, with no common one
            raise InputError(f"{path}: cannot be loaded, is it a whole ONNX file? ({_first_line(error)})") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise InputError(f"{path}: was not exported by hpetr, it has no metadata {KEY!r}")
        self.description = ModelDescription.from_json(text, str(path))
        self.device_name = f"ONNX Runtime, {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"
        self._outputs = [output.name for output in self._session.get_outputs()]
        _check_names(path, [entry.name for entry in self._session.get_inputs()], self._outputs)

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        found = self._session.run(self._outputs, dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True)))
        return dict(zip(self._outputs, found, strict=True))


class OpenVinoEngine:
    """A `.xml` file, with its weights in the `.bin` file beside it, in OpenVINO."""

    def __init__(self, path: Path, threads: int | None, device: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise InputError(f"{path}: needs OpenVINO: pip install openvino") from error
        core = openvino.Core()
        chosen = "CPU" if device in ("auto", "cpu") else device.upper()
        if chosen.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise InputError(f"device {device}: OpenVINO has {', '.join(core.available_devices)}")
        self.device_name = f"OpenVINO, {chosen}"
        # On its own OpenVINO would compute in bfloat16 where the CPU has it: coordinates then miss by pixels.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
            if text is None:
                raise InputError(f"{path}: was not exported by hpetr, it has no metadata {KEY!r}")
            self.description = ModelDescription.from_json(text, str(path))
            self._outputs = [output.get_any_name() for output in model.outputs]
            _check_names(path, [entry.get_any_name() for entry in model.inputs], self._outputs)
            self._model = core.compile_model(model, chosen, settings)
        except RuntimeError as error:
            raise InputError(
                f"{path}: cannot be loaded, are it and its .bin file whole? ({_first_line(error)})"
            ) from error

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        found = self._model(dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True)))
        return {name: np.array(found[name]) for name in self._outputs}  # copies: the next run overwrites them


def _onnx_providers(device: str, available: list[str]) -> list[str]:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if device == "auto":
        return [cuda, cpu] if cuda in available else [cpu]
    if device == "cpu":
        return [cpu]
    if device == "cuda" and cuda in available:
        return [cuda, cpu]
    raise InputError(f"device {device}: this ONNX Runtime has {', '.join(available)}; expected auto, cpu or cuda")


def _check_names(path: Path, inputs: list[str], outputs: list[str]) -> None:
    missing = [name for name in (*INPUTS, *OUTPUTS) if name not in (*inputs, *outputs)]
    if missing:
        raise InputError(f"{path}: has no {missing[0]!r}, expected the inputs and outputs that hpetr export writes")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
