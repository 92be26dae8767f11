"""Kernels: one function, multi-scale deformable sampling, and the choice of its implementation.

`reference.py` is plain torch and the definition of the result; `cpu.py` is C. An implementation for another device is
a module of its own with the same function, and a line in `kernel_name`.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpetr.errors import InputError
from hpetr.kernels import cpu
from hpetr.kernels.reference import deformable_sampling_reference

__all__ = ["deformable_sampling", "kernel_name"]

_KERNELS: dict[str, Callable[..., Tensor]] = {
    "reference": deformable_sampling_reference,
    "c": cpu.deformable_sampling_c,
}


@torch.compiler.assume_constant_result
def kernel_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """Which kernel `deformable_sampling` uses for values of this device and dtype: "c" or "reference".

    The environment variable `HPETR_KERNEL` forces one ("c", "reference"); unset or "auto", the fastest one that works
    here is taken. Asking for the first time compiles the C kernel.

    Raises:
        InputError: `HPETR_KERNEL` names no kernel, or forces one that cannot run here.
    """
    setting = os.environ.get("HPETR_KERNEL", "auto")
    if setting not in ("auto", *_KERNELS):
        raise InputError(f"HPETR_KERNEL={setting}: expected auto, {' or '.join(sorted(_KERNELS))}")
    if torch.device(device).type == "meta":  # shapes only, nothing is computed
        return "reference"
    fits = torch.device(device).type == "cpu" and dtype in cpu.DTYPES
    if setting == "c" and not fits:
        raise InputError(f"HPETR_KERNEL=c: expected a CPU tensor of one of {cpu.DTYPES}, got {device}, {dtype}")
    if setting == "reference" or not fits:
        return "reference"
    if cpu.load() is not None:
        return "c"
    if setting == "c":
        raise InputError("HPETR_KERNEL=c: the C kernel could not be compiled (the log says why)")
    return "reference"


def deformable_sampling(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples from feature maps of several scales (the core of deformable attention).

    Maps are read with zeros outside and pixel centres at half-integers (`align_corners=False`): location (x, y) is
    pixel (x * W_l - 0.5, y * H_l - 0.5) of level l. NaN and infinite locations are safe: the C kernel takes them as
    outside the map.

    Args:
        value: (B, S, M, D) tokens of all levels, one after the other, each row by row; M heads of width D.
        spatial_shapes: L pairs (H_l, W_l) of ints, S = sum of H_l * W_l.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), [0, 1] across the level's map.
        attention_weights: (B, Q, M, L, P), already normalised.
            Both of `value`'s dtype, or both float32 where `value` is float16 or bfloat16: half-precision locations
            miss by up to half a pixel on a map 200 wide. The arithmetic is float32 at least.

    Returns:
        (B, Q, M*D) of `value`'s dtype. Differentiable once in the three tensors; deterministic on the CPU.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # no checks: comparing symbolic sizes would tie the exported graph to the traced ones
        return deformable_sampling_reference(value, spatial_shapes, sampling_locations, attention_weights)
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
        if h < 1 or w < 1:
            raise ValueError(f"spatial_shapes: expected positive sizes (H, W), got {(h, w)}")
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
    half = value.dtype in (torch.float16, torch.bfloat16)
    allowed = (value.dtype, torch.float32) if half else (value.dtype,)
    if not value.is_floating_point() or locations.dtype not in allowed or weights.dtype != locations.dtype:
        raise ValueError(
            "expected value, sampling_locations and attention_weights of one floating dtype (the last two may be "
            f"float32 beside a half-precision value), got {value.dtype}, {locations.dtype} and {weights.dtype}"
        )
