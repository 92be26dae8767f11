"""What a model's name stands for."""

from __future__ import annotations

import os

import torch

from hpetr.errors import InputError
from hpetr.inference.torch_predictor import PosePredictor
from hpetr.poses.predictor import Predictor
from hpetr.runtime import ExportedPredictor, is_exported


def open_predictor(
    model: str | os.PathLike[str] | None,
    device: str | torch.device = "auto",
    threshold: float | None = None,
    *,
    precision: str = "float32",
    compiled: bool = False,
) -> Predictor:
    """A predictor of a checkpoint, or of the exported model where `model` is a `.onnx` or `.xml` file.

    Args:
        model, device, threshold, precision, compiled: see `PosePredictor`; an exported model has the precision that it
            was exported with.

    Raises:
        InputError: see `PosePredictor` and `hpetr.runtime.ExportedPredictor`, or a precision is asked of an exported
            model.
    """
    if model is None or not is_exported(model):
        return PosePredictor(model, device, threshold, precision=precision, compiled=compiled)
    if precision != "float32" or compiled:
        raise InputError(f"{model}: is an exported model, --precision and --compile are for checkpoints")
    return ExportedPredictor(model, threshold, device=str(device))
