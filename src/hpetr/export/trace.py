"""Tracing of a model by torch.export, with free batch, height and width."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.runtime.description import OUTPUTS

# The traced sizes are no part of the graph, but torch takes two that are equal by chance for one. These, their next
# multiples of a divisor, and the sides of their maps at all strides are distinct.
TRACED = (3, 203, 297)
# All strides divide sides that are multiples of the coarsest one: the graph needs no rounding, and torch's symbolic
# arithmetic takes a fraction of the time.
COARSEST = 32
FREE = Dim.DYNAMIC


def name_outputs(scores: Tensor, poses: Tensor, labels: Tensor, keypoint_scores: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of an exported model by name; keypoint scores are ones if the model has none."""
    joints = torch.ones_like(poses[..., 0]) if keypoint_scores is None else keypoint_scores
    return dict(zip(OUTPUTS, (scores, poses, labels, joints), strict=True))


class WholeModel(nn.Module):
    """Pixels (B, 3, H, W) and mask (B, H, W) to the tensors of `OUTPUTS`."""

    def __init__(self, model: HPetrForPoseEstimation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        found = self.model(pixel_values, pixel_mask)
        return name_outputs(found.scores, found.poses, found.pose_labels, found.keypoint_scores)


def trace(module: nn.Module, divisor: int, *, gradients: bool) -> ExportedProgram:
    """Trace a module of `pixel_values` and `pixel_mask` for sides that are multiples of `divisor`; see `trace_as`."""
    batch, height, width = TRACED
    rows, columns = FREE, FREE
    if divisor % COARSEST == 0:
        height, width = (-(-side // COARSEST) * COARSEST for side in (height, width))
        rows, columns = (COARSEST * Dim(name, min=2) for name in ("rows", "columns"))
    images = (torch.zeros(batch, 3, height, width), torch.ones(batch, height, width).long())
    return trace_as(module, images, ({0: FREE, 2: rows, 3: columns}, {0: FREE, 1: rows, 2: columns}), gradients)


def trace_as(module: nn.Module, inputs: tuple[Tensor, ...], sizes: Any, gradients: bool) -> ExportedProgram:
    """Trace a module in eval mode, float32; `sizes` are the dynamic shapes of `torch.export.export`.

    Gradients are on: without them, backbones and attention take paths whose arithmetic depends on the size of the
    image. With parameters that require none (`gradients` false), torch ties a graph of plain torch operators to the
    strides of the example, but not one of `kept_as_operator`.
    """
    before = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(gradients)
    try:
        with quiet(), torch.enable_grad():
            return torch.export.export(module.eval(), inputs, dynamic_shapes=sizes, strict=False)
    finally:
        for parameter, requires_grad in zip(module.parameters(), before, strict=True):
            parameter.requires_grad_(requires_grad)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what exporters log and warn of: expressions that they could not simplify, and outdated parts of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
