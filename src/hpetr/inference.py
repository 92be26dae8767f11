"""What a trained network can be run with: a shorter arithmetic, and torch's compiler."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from hpetr.errors import InputError
from hpetr.model.hpetr import HPetrForPoseEstimation

Precision = Literal["float32", "bfloat16"]


def set_up_inference(
    model: HPetrForPoseEstimation, precision: str = "float32", *, compiled: bool = False
) -> HPetrForPoseEstimation:
    """Choose how the network computes from now on, in place; returns the model.

    Args:
        model: in eval mode.
        precision: "bfloat16" computes products and convolutions in bfloat16 (autocast); coordinates and scores stay
            float32. Weights keep their dtype. Worth it on GPUs; on CPUs only with hardware for bfloat16 matrices (AMX).
        compiled: let torch.compile translate the network when it first runs, which takes a minute or so; sizes and
            batches may still change afterwards.

    Raises:
        InputError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision is {precision!r}, expected {' or '.join(get_args(Precision))}")
    if precision == "bfloat16":
        autocast = torch.autocast(model.device.type, dtype=torch.bfloat16)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
    if compiled:
        model.compile(dynamic=True)
    return model
