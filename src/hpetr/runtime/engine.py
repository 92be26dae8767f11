"""The network of an exported model, in ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hpetr.errors import InputError
from hpetr.runtime.description import KEY, ModelDescription

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("scores", "poses", "pose_labels", "keypoint_scores")
SUFFIX = ".onnx"


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one of an exported model: of a file, there or not, that ends in .onnx."""
    return Path(path).suffix.lower() == SUFFIX and not Path(path).is_dir()


class Engine:
    """A `.onnx` file, loaded.

    Args:
        threads: of the CPU; None leaves it to ONNX Runtime.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: no such file, not an exported model of hpetr, broken, or ONNX Runtime or the device is not there.
    """

    def __init__(self, path: Path, threads: int | None = None, device: str = "auto") -> None:
        if not is_exported(path):
            raise InputError(f"{path}: expected the {SUFFIX} file of an exported model")
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected an exported model")
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: needs ONNX Runtime, expected after pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong becomes one error, without ONNX Runtime's own lines before it
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # ONNX Runtime has an exception class for each kind of failure, with no common one
            raise InputError(f"{path}: cannot be loaded, expected a whole ONNX file ({_first_line(error)})") from error
        text = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise InputError(f"{path}: has no metadata {KEY!r}, expected what hpetr export writes")
        self.description = ModelDescription.from_json(text, str(path))
        self.device_name = f"ONNX Runtime, {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"
        names = {entry.name for entry in (*self._session.get_inputs(), *self._session.get_outputs())}
        if missing := [name for name in (*INPUTS, *OUTPUTS) if name not in names]:
            raise InputError(f"{path}: has no {missing[0]!r}, expected the inputs and outputs that hpetr export writes")

    def run(self, pixel_values: np.ndarray, pixel_mask: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name, see `ModelDescription.to_json`, of (B, 3, H, W) float32 and (B, H, W) int64."""
        found = self._session.run(list(OUTPUTS), dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True)))
        return dict(zip(OUTPUTS, found, strict=True))


def _providers(device: str, available: list[str]) -> list[str]:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if device == "cpu" or (device == "auto" and cuda not in available):
        return [cpu]
    if device in ("auto", "cuda") and cuda in available:
        return [cuda, cpu]
    raise InputError(f"device {device}: this ONNX Runtime has {', '.join(available)}; expected auto, cpu or cuda")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
