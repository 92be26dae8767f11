"""Blocks of separable convolutions in C, for inference on the CPU; callers have torch's own for everything else.

MobileNetV2's first blocks are six times as wide between their two 1x1 convolutions. torch writes and reads all of that
several times; computed row by row it stays in the cache. For 416 x 544 pixels on one core of a Xeon, the first block of
MoveNet's second stage takes 5.3 ms and 11.1 ms in torch, the last block of its third stage 1.6 and 2.6 ms.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor, nn

from hpetr.model.ops import cpu, kernel_name

# Maximum number of 1x1 weights. They are read once for every row, and with more of them torch is faster.
MAX_WEIGHTS = 2**18
RELU, RELU6, NOTHING = (0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf)


def is_supported(x: Tensor, *convolutions: nn.Conv2d | None) -> bool:
    """Return whether `separable` can run on x (B, C, H, W) with these convolutions, without gradients."""
    weights = [conv.weight for conv in convolutions if conv is not None]
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or torch.is_autocast_enabled("cpu"):
        return False  # compilers and exports need plain torch, autocast another dtype
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (x, *weights)):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return False
    hidden = max(conv.groups for conv in convolutions if conv is not None)
    products = sum(weight.numel() for weight in weights) - 9 * hidden
    return products <= MAX_WEIGHTS and x.numel() > 0 and kernel_name(x.device, x.dtype) == "c"


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
    """Compute [`expand` 1x1, ReLU6,] `depthwise` 3x3, `project` 1x1 [, `last` 1x1] [+ x], if `is_supported`.

    Args:
        x: (B, C, H, W) float32.
        depthwise: has stride 1, or stride 2 like `AlignedConv2d`.
        project: its outputs are those of the block, without `last`.
        expand: None leaves it out.
        last: None leaves it out.
        residual: add x; needs stride 1, and as many output channels as x has.
        clamps: lower and upper limit after `depthwise` and after `project`.
        scale: of the result of `last`.
        out: (B, H', W', channels) to write to. Its last axis is contiguous; it may be a slice of more channels.

    Returns:
        (B, channels, H', W') in channels-last memory; H' and W' are H and W over the stride, rounded up.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, inputs, height, width = x.shape
    stride, final = depthwise.stride[0], project if last is None else last
    out_height, out_width = -(-height // stride), -(-width // stride)
    if out is None:
        out = x.new_empty(batch, out_height, out_width, final.out_channels)
    block = struct.pack(
        "15q6f",  # `block` in csrc/separable_cpu.c
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
    cpu.call("hpetr_separable_f32", block, x, *tensors, out)
    return out.permute(0, 3, 1, 2)
