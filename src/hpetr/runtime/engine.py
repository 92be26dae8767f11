"""The network of an exported model, in ONNX Runtime or OpenVINO."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hpetr.errors import InputError, first_line
from hpetr.runtime.description import INPUTS, KEY, OUTPUTS, ModelDescription

ONNX, OPENVINO = ".onnx", ".xml"
SUFFIXES = (ONNX, OPENVINO)


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Return whether the name is that of an exported model: it ends in .onnx or .xml and is no folder."""
    return Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir()


class Engine(ABC):
    """An exported model, loaded.

    Attributes:
        description: of the model, from the file.
        device_name: the runtime and its device.
    """

    description: ModelDescription
    device_name: str

    @abstractmethod
    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the `OUTPUTS` by name, see `ModelDescription.to_json`, of (B, 3, H, W) float32 and (B, H, W) int64."""

    def _describe(self, path: Path, text: str | None, tensors: Iterable[str]) -> None:
        """Read and check the description and the names of the network's inputs and outputs."""
        if text is None:
            raise InputError(f"{path}: has no metadata {KEY!r}, expected what hpetr export writes")
        self.description = ModelDescription.from_json(text, str(path))
        names = set(tensors)
        if missing := [name for name in (*INPUTS, *OUTPUTS) if name not in names]:
            raise InputError(f"{path}: has no {missing[0]!r}, expected the inputs and outputs that hpetr export writes")


def load_engine(path: Path, threads: int | None = None, device: str = "auto") -> Engine:
    """Load a file by its suffix.

    Args:
        path: the `.onnx` or `.xml` file.
        threads: threads of the CPU; None leaves the number to the runtime.
        device: "auto" or "cpu"; "cuda" in ONNX Runtime; any device of OpenVINO's.

    Raises:
        InputError: no such file, not an exported model of hpetr, broken, or the runtime or the device is missing.
    """
    if not is_exported(path):
        raise InputError(f"{path}: expected the {' or '.join(SUFFIXES)} file of an exported model")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an exported model")
    return (OnnxEngine if path.suffix.lower() == ONNX else OpenVinoEngine)(path, threads, device)


class OnnxEngine(Engine):
    """A `.onnx` file in ONNX Runtime; arguments and errors are those of `load_engine`."""

    def __init__(self, path: Path, threads: int | None = None, device: str = "auto") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: needs ONNX Runtime, expected after pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a failure becomes one error, without ONNX Runtime's own lines before it
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime has an exception class for each kind of failure, with no common one
            raise InputError(f"{path}: cannot be loaded, expected a whole ONNX file ({first_line(error)})") from error
        tensors = (entry.name for entry in (*self._session.get_inputs(), *self._session.get_outputs()))
        self._describe(path, self._session.get_modelmeta().custom_metadata_map.get(KEY), tensors)
        self.device_name = f"ONNX Runtime, {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        found = self._session.run(list(OUTPUTS), dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True)))
        return dict(zip(OUTPUTS, found, strict=True))


class OpenVinoEngine(Engine):
    """A `.xml` file and its `.bin` in OpenVINO, in float32; arguments and errors are those of `load_engine`."""

    def __init__(self, path: Path, threads: int | None = None, device: str = "auto") -> None:
        try:
            import openvino
        except ImportError as error:
            raise InputError(f"{path}: needs OpenVINO, expected after pip install openvino") from error
        core = openvino.Core()
        chosen = "CPU" if device == "auto" else device.upper()
        if chosen not in core.available_devices:
            names = ", ".join(name.lower() for name in core.available_devices)
            raise InputError(f"device {device}: this OpenVINO has {names}; expected one of them, or auto")
        # Without the hint, devices with half precision compute in it, and coordinates miss their pixel.
        settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        entry = [KEY, "description"]
        try:
            network = core.read_model(path)
            text = str(network.get_rt_info(entry).value) if network.has_rt_info(entry) else None
            self._model = core.compile_model(network, chosen, settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{path}: cannot be loaded, expected it and its .bin beside it ({reason})") from error
        ports = (*self._model.inputs, *self._model.outputs)
        self._describe(path, text, (name for port in ports for name in port.get_names()))
        self.device_name = f"OpenVINO, {chosen}"

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        request = self._model.create_infer_request()  # one per call, so that threads do not mix
        found = request.infer(dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True)))
        return {name: found[name] for name in OUTPUTS}


def _providers(device: str, available: list[str]) -> list[str]:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if device == "cpu" or (device == "auto" and cuda not in available):
        return [cpu]
    if device in ("auto", "cuda") and cuda in available:
        return [cuda, cpu]
    raise InputError(f"device {device}: this ONNX Runtime has {', '.join(available)}; expected auto, cpu or cuda")
