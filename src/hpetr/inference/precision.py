"""Number formats of the network, and memory of the process."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from hpetr.errors import InputError

Precision = Literal["float32", "bfloat16"]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def check_precision(precision: str) -> None:
    """Raise an `InputError` for an unknown precision."""
    if precision not in get_args(Precision):
        raise InputError(f"precision is {precision!r}, expected {' or '.join(get_args(Precision))}")


def autocast(device: torch.device, precision: str = "float32") -> AbstractContextManager[object]:
    """Return a context in which networks compute in a precision.

    Args:
        device: of the network.
        precision: "float32", or "bfloat16" for products and convolutions in bfloat16. Weights keep their dtype;
            coordinates and scores stay float32. bfloat16 pays on GPUs, and on CPUs with AMX.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the tensors that follow; for programs that do little else.

    glibc returns the memory of large tensors to the system, which then clears every page again: for h-petr-r50 and an
    800 x 1216 image 300,000 page faults, a fifth of the time on two cores. The process stays at its largest size.

    Returns:
        False if the C library is not glibc; nothing has changed then.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
