"""Blocks of separable convolutions in C, for inference on the CPU; where they cannot run, the caller has torch's own.

MobileNetV2's first blocks widen their input sixfold between two 1x1 convolutions. torch writes and reads all of it
several times; row by row it stays in the cache. On one core of a Xeon, the first block of MoveNet's second stage takes
5.3 ms for 416 x 544 pixels, and in torch 11.1 ms; the last block of its third stage 1.6 and 2.6 ms.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor, nn

from hpetr.model.ops import cpu, kernel_name

# (inputs + outputs) x hidden channels: of more weights, read once for every row, torch's matrix product makes more.
MOST_WEIGHTS = 2**18
RELU, RELU6, NOTHING = (0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf)


class _Block(ctypes.Structure):
    """Mirrors `block` in csrc/separable_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("inputs", "hidden", "outputs", "last", "expands", "residual")),
        *((name, ctypes.c_int64) for name in ("stride", "before", "pixel", "threads")),
        *((f"{name}_{end}", ctypes.c_float) for name in ("expand", "depthwise", "project") for end in ("low", "high")),
    )


def is_supported(x: Tensor, *convolutions: nn.Conv2d | None) -> bool:
    """Whether `separable` can run on x (B, C, H, W) with these convolutions, and no gradient is asked for."""
    weights = [conv.weight for conv in convolutions if conv is not None]
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or torch.is_autocast_enabled("cpu"):
        return False  # compilers and exports want plain torch, autocast another dtype
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (x, *weights)):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return False
    hidden = max(conv.groups for conv in convolutions if conv is not None)
    products = sum(weight.numel() for weight in weights) - 9 * hidden
    return products <= MOST_WEIGHTS and x.numel() > 0 and kernel_name(x.device, x.dtype) == "c"


def separable(
    x: Tensor,
    depthwise: nn.Conv2d,
    project: nn.Conv2d,
    *,
    expand: nn.Conv2d | None = None,
    last: nn.Conv2d | None = None,
    residual: bool = False,
    clamps: tuple[tuple[float, float], tuple[float, float]] = (RELU6, NOTHING),
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """[`expand` and ReLU6,] `depthwise` 3x3, `project` 1x1 [, `last` 1x1] [+ x], where `is_supported`.

    Args:
        x: (B, C, H, W) float32.
        depthwise: of stride 1, or 2 with windows that start where TensorFlow's "SAME" puts them (`AlignedConv2d`).
        residual: add x; stride 1, and as many channels as come out.
        clamps: least and greatest after `depthwise` and after `project`.
        scale: of the result of `last`.
        out: (B, H', W', channels), where to write; its last axis is contiguous, and it may be a slice of more channels.

    Returns:
        (B, channels, H', W') in channels-last memory; H' and W' are H and W over the stride, rounded up.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, inputs, height, width = x.shape
    stride, final = depthwise.stride[0], project if last is None else last
    out_height, out_width = -(-height // stride), -(-width // stride)
    if out is None:
        out = x.new_empty(batch, out_height, out_width, final.out_channels)
    library = cpu.load()
    assert library is not None, "the caller did not ask is_supported()"
    block = _Block(
        *(batch, height, width, out_height, out_width),
        *(inputs, depthwise.in_channels, project.out_channels, 0 if last is None else last.out_channels),
        *(expand is not None, residual, stride, 1 if stride == 1 else 0),
        *(out.stride(2), torch.get_num_threads(), *RELU6, *clamps[0], *clamps[1]),
    )
    tensors: list[Tensor | None] = []
    for conv in (expand, depthwise, project, last):
        tensors += [None, None] if conv is None else [conv.weight, conv.bias]
    if last is not None and scale != 1:
        tensors[-2:] = [None if t is None else t * scale for t in tensors[-2:]]
    tensors = [None if t is None else t.contiguous() for t in tensors]
    pointers = [None if t is None else t.data_ptr() for t in (x, *tensors, out)]
    if library.hpetr_separable_f32(ctypes.addressof(block), *pointers):
        raise MemoryError("hpetr_separable_f32: out of memory for the threads' scratch space")
    return out.permute(0, 3, 1, 2)
