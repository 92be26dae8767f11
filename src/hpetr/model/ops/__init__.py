"""Multi-scale deformable sampling: its interface and the choice of a kernel.

`reference.py` is plain torch and defines the result, `cpu.py` is in C, `gpu.py` in Triton. A kernel for another device
is one more module with an operator, and an entry in `_OPERATORS`, `_DTYPES` and `_DEVICES`. `separable.py` has
convolutions in C.
"""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from hpetr.errors import InputError
from hpetr.model.ops import cpu
from hpetr.model.ops.reference import deformable_sampling_reference

__all__ = ["deformable_sampling", "kept_as_operator", "kernel_name"]

logger = logging.getLogger("hpetr")

_OPERATORS = {"c": "deformable_sampling", "triton": "deformable_sampling_triton"}
_HALF_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = {"c": cpu.DTYPES, "triton": (torch.float32, *_HALF_DTYPES)}
_DEVICES = {"cpu": "c", "cuda": "triton"}
_MAX_SIDE = 2**24  # float32 cannot tell neighboring pixels of larger maps apart
_kept_as_operator = ContextVar("kept_as_operator", default=False)


@functools.cache
def _is_available(kernel: str, device: torch.device) -> bool:
    """Compile a kernel and return whether it works on a device; the log has the reason if it does not."""
    if kernel == "c":
        return cpu.load() is not None
    try:
        from hpetr.model.ops import gpu  # importing Triton takes a second
    except ImportError as error:
        logger.warning("deformable sampling uses slow plain torch on the GPU: %s", error)
        return False
    return gpu.is_available(device)


@torch.compiler.assume_constant_result
def kernel_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return the kernel of `deformable_sampling` for a device and dtype: "c", "triton" or "reference".

    The environment variable `HPETR_KERNEL` forces one of them; unset or "auto", it is the fastest one that works. The
    first call compiles the kernel. With `TRITON_INTERPRET=1` Triton can be forced on the CPU.

    Raises:
        InputError: `HPETR_KERNEL` names no kernel, or forces one that cannot run here.
    """
    setting = os.environ.get("HPETR_KERNEL", "auto")
    if setting not in ("auto", "reference", *_OPERATORS):
        raise InputError(f"HPETR_KERNEL={setting}: expected auto, c, reference or triton")
    device = torch.device(device)
    if setting == "reference" or device.type == "meta":  # meta tensors have shapes alone
        return "reference"
    name = _DEVICES.get(device.type, "reference")
    if setting == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        name = "triton"
    if name != "reference" and dtype not in _DTYPES[name]:
        name = "reference"
    if setting not in ("auto", name):
        dtypes, kind = ", ".join(map(str, _DTYPES[setting])), "CPU" if setting == "c" else "GPU"
        raise InputError(f"HPETR_KERNEL={setting}: expected a {kind} tensor of {dtypes}, got {device}, {dtype}")
    if name == "reference" or _is_available(name, device):
        return name
    if setting == name:
        raise InputError(f"HPETR_KERNEL={setting}: this kernel does not work here, the log has the reason")
    return "reference"


@contextmanager
def kept_as_operator() -> Iterator[None]:
    """Keep each sampling as one node `hpetr::deformable_sampling` in graphs of `torch.export` instead of plain torch.

    The translation of the graph needs a rule for that operator. Tracing h-petr-nano takes less than half the time: the
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
    """Return the weighted sum of bilinear samples from feature maps of several scales.

    This is the core of deformable attention. Maps are zero outside, and pixel centers are at half-integers
    (`align_corners=False`): location (x, y) is pixel (x * W_l - 0.5, y * H_l - 0.5) of level l. The kernels in C and
    Triton take NaN and infinite locations as outside the map.

    Args:
        value: (B, S, M, D) tokens of all levels, one after the other, each row by row; M heads of width D.
        spatial_shapes: (H_l, W_l) of L levels, S = sum of H_l * W_l.
        sampling_locations: (B, Q, M, L, P, 2) x, y, 0..1 across the level's map.
        attention_weights: (B, Q, M, L, P), already normalized.
            Locations and weights have `value`'s dtype, or float32 beside a float16 or bfloat16 `value`: half-precision
            locations are up to half a pixel off on a map 200 wide. The arithmetic is float32 or float64.

    Returns:
        (B, Q, M*D) of `value`'s dtype. Differentiable once in the three tensors. Deterministic, except the gradient of
        `value` on a GPU, which therefore fails under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        # No checks: comparing symbolic sizes would tie the exported graph to the traced ones.
        kernel = "c" if _kept_as_operator.get() else "reference"
    else:
        _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
        _check_types(value, sampling_locations, attention_weights)
        kernel = kernel_name(value.device, value.dtype)
    if kernel == "reference":
        return deformable_sampling_reference(value, spatial_shapes, sampling_locations, attention_weights)
    sides = [side for shape in spatial_shapes for side in shape]
    # By name, as `torch.compile` cannot trace the import of `gpu.py`; `kernel_name` has imported it.
    return getattr(torch.ops.hpetr, _OPERATORS[kernel])(value, sides, sampling_locations, attention_weights)


def _check_shapes(value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "expected value (B, S, M, D), sampling_locations (B, Q, M, L, P, 2) and attention_weights (B, Q, M, L, P), "
            f"got {tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}"
        )
    batch, tokens, heads, width = value.shape
    if not all(0 < side < _MAX_SIDE for shape in spatial_shapes for side in shape):
        raise ValueError(f"spatial_shapes: expected positive sizes (H, W) below 2^24, got {list(spatial_shapes)}")
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
    allowed = (value.dtype, torch.float32) if value.dtype in _HALF_DTYPES else (value.dtype,)
    if value.dtype not in cpu.DTYPES or locations.dtype not in allowed or weights.dtype not in allowed:
        raise ValueError(
            "expected value, sampling_locations and attention_weights of one dtype, float16 to float64 (the last two "
            f"may be float32 beside a half-precision value), got {value.dtype}, {locations.dtype} and {weights.dtype}"
        )
