"""Kernels: multi-scale deformable sampling and the choice of its implementation; `separable.py` has convolutions in C.

`reference.py` is plain torch and the definition of the result; `cpu.py` is C, `gpu.py` is Triton. An implementation for
another device is a module of its own with the same function, and a few lines in `kernel_name`.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from hpetr.errors import InputError
from hpetr.model.ops import cpu
from hpetr.model.ops.reference import deformable_sampling_reference

__all__ = ["deformable_sampling", "kept_as_operator", "kernel_name"]

logger = logging.getLogger("hpetr")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LARGEST_SIDE = 2**24  # beyond it float32 cannot tell one pixel from the next
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_kept_as_operator = ContextVar("kept_as_operator", default=False)


@functools.cache
def _gpu() -> ModuleType | None:
    """`hpetr.model.ops.gpu`; None, after one warning in the log, where there is no Triton.

    Not imported before a GPU asks for it: Triton takes a second, and whoever has no GPU mostly has no Triton.
    """
    try:
        return importlib.import_module("hpetr.model.ops.gpu")
    except ImportError as error:
        logger.warning("deformable sampling uses slow plain torch on the GPU: %s", error)
        return None


def _deformable_sampling_triton(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Call the operator of `gpu.py`, which `kernel_name` has imported: `torch.compile` cannot trace an import."""
    sides = [side for shape in spatial_shapes for side in shape]
    return torch.ops.hpetr.deformable_sampling_triton(value, sides, locations, weights)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": deformable_sampling_reference,
    "c": cpu.deformable_sampling_c,
    "triton": _deformable_sampling_triton,
}


@torch.compiler.assume_constant_result
def kernel_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """Which kernel `deformable_sampling` uses for values of this device and dtype: "c", "triton" or "reference".

    The environment variable `HPETR_KERNEL` forces one of them; unset or "auto", the fastest one that works here is
    taken. Asking for the first time compiles the kernel. With `TRITON_INTERPRET=1` Triton can be forced on the CPU.

    Raises:
        InputError: `HPETR_KERNEL` names no kernel, or forces one that cannot run here.
    """
    setting = os.environ.get("HPETR_KERNEL", "auto")
    if setting not in ("auto", *_KERNELS):
        raise InputError(f"HPETR_KERNEL={setting}: expected auto, {' or '.join(sorted(_KERNELS))}")
    device = torch.device(device)
    if setting == "reference" or device.type == "meta":  # meta: shapes only, nothing is computed
        return "reference"
    name = {"cpu": "c", "cuda": "triton"}.get(device.type, "reference")
    if setting == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        name = "triton"
    dtypes = cpu.DTYPES if name == "c" else _GPU_DTYPES
    if dtype not in dtypes:
        name = "reference"
    if setting not in ("auto", name):
        kind = "CPU" if setting == "c" else "GPU"
        wanted = ", ".join(str(x) for x in (cpu.DTYPES if setting == "c" else _GPU_DTYPES))
        raise InputError(f"HPETR_KERNEL={setting}: expected a {kind} tensor of {wanted}, got {device}, {dtype}")
    if name == "reference" or (name == "c" and cpu.load() is not None):
        return name
    if name == "triton" and (gpu := _gpu()) is not None and gpu.works(device):
        return name
    if setting == name:
        raise InputError(f"HPETR_KERNEL={setting}: this kernel cannot be had here (the log says why)")
    return "reference"


@contextmanager
def kept_as_operator() -> Iterator[None]:
    """Within it, `torch.export` keeps each sampling as one node `hpetr::deformable_sampling` instead of plain torch.

    Whoever translates the graph has to know that operator. Tracing h-petr-nano takes less than half the time: the
    shapes inside `grid_sample` are long symbolic expressions.
    """
    token = _kept_as_operator.set(True)
    try:
        yield
    finally:
        _kept_as_operator.reset(token)


def deformable_sampling(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples from feature maps of several scales (the core of deformable attention).

    Maps are read with zeros outside and pixel centers at half-integers (`align_corners=False`): location (x, y) is
    pixel (x * W_l - 0.5, y * H_l - 0.5) of level l. NaN and infinite locations are safe: the kernels in C and Triton
    take them as outside the map.

    Args:
        value: (B, S, M, D) tokens of all levels, one after the other, each row by row; M heads of width D.
        spatial_shapes: L pairs (H_l, W_l) of ints, S = sum of H_l * W_l.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), [0, 1] across the level's map.
        attention_weights: (B, Q, M, L, P), already normalized.
            Each of `value`'s dtype, or float32 where `value` is float16 or bfloat16: half-precision locations miss by
            up to half a pixel on a map 200 wide. The arithmetic is float32 at least.

    Returns:
        (B, Q, M*D) of `value`'s dtype. Differentiable once in the three tensors. Deterministic, except the gradient of
        `value` on a GPU, which therefore fails under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # no checks: comparing symbolic sizes would tie the exported graph to the traced ones
        export = cpu.deformable_sampling_c if _kept_as_operator.get() else deformable_sampling_reference
        return export(value, spatial_shapes, sampling_locations, attention_weights)
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    _check_types(value, sampling_locations, attention_weights)
    kernel = _KERNELS[kernel_name(value.device, value.dtype)]
    return kernel(value, spatial_shapes, sampling_locations, attention_weights)


def _check_shapes(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "expected value (B, S, M, D), sampling_locations (B, Q, M, L, P, 2) and attention_weights (B, Q, M, L, P), "
            f"got {tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}"
        )
    batch, tokens, heads, width = value.shape
    for h, w in spatial_shapes:
        if not (0 < h < _LARGEST_SIDE and 0 < w < _LARGEST_SIDE):
            raise ValueError(f"spatial_shapes: expected positive sizes (H, W) below 2^24, got {(h, w)}")
    if sum(h * w for h, w in spatial_shapes) != tokens:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} do not add up to value's {tokens} tokens")
    queries, points = locations.shape[1], locations.shape[4]
    expected = (batch, queries, heads, len(spatial_shapes), points)
    if tuple(locations.shape) != (*expected, 2) or tuple(weights.shape) != expected:
        raise ValueError(
            f"expected sampling_locations {(*expected, 2)} and attention_weights {expected}, "
            f"got {tuple(locations.shape)} and {tuple(weights.shape)}"
        )
    if not (len(spatial_shapes) and heads and width and points):
        raise ValueError(
            f"levels, heads, head width and points must not be 0, got value {tuple(value.shape)}, "
            f"sampling_locations {tuple(locations.shape)}"
        )
    if tokens >= 2**31:
        raise ValueError(f"value: expected fewer than 2^31 tokens, got {tokens}")


def _check_types(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    if not value.device == locations.device == weights.device:
        raise ValueError(f"tensors on different devices: {value.device}, {locations.device}, {weights.device}")
    if any(x.layout != torch.strided for x in (value, locations, weights)):
        raise ValueError(f"expected dense tensors, got {value.layout}, {locations.layout} and {weights.layout}")
    half = value.dtype in (torch.float16, torch.bfloat16)
    allowed = (value.dtype, torch.float32) if half else (value.dtype,)
    if value.dtype not in _DTYPES or locations.dtype not in allowed or weights.dtype not in allowed:
        raise ValueError(
            "expected value, sampling_locations and attention_weights of one dtype, float16 to float64 (the last two "
            f"may be float32 beside a half-precision value), got {value.dtype}, {locations.dtype} and {weights.dtype}"
        )
