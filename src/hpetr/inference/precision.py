"""What a trained network can be run with: a shorter arithmetic, torch's compiler, memory that stays."""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import torch

from hpetr.errors import InputError
from hpetr.model.hpetr import HPetrForPoseEstimation

Precision = Literal["float32", "bfloat16"]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


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


def keep_freed_memory() -> bool:
    """Have this process keep what tensors free for the tensors that follow; for programs that do little else.

    glibc gives memory of large tensors back to the system, which then hands every page out anew: for h-petr-r50 and an
    800 x 1216 image 300,000 page faults, a fifth of the time on two cores. Afterwards the process stays as large as
    it ever was.

    Returns:
        False where the C library is not glibc; nothing has changed then.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
