"""Whole models traced by torch.export, and what every trace needs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hpetr.model.hpetr import HPetrForPoseEstimation

# The sizes of the trace are no part of the graph, but two that are equal by chance would be tied together. These, or
# their next multiples of a divisor, and the sides of their maps at all strides are distinct.
TRACED = (3, 203, 297)
# Quotients by the strides are whole where sides are multiples of the coarsest one: the graph needs no rounding, and
# torch's symbolic arithmetic a fraction of the time.
COARSEST = 32
FREE = Dim.DYNAMIC


class WholeModel(nn.Module):
    """Pixels to poses, as plain tensors."""

    def __init__(self, model: HPetrForPoseEstimation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) and (B, H, W) to scores, poses, pose_labels and keypoint_scores; see `HPetrOutput`."""
        found = self.model(pixel_values, pixel_mask)
        joints = torch.ones_like(found.poses[..., 0]) if found.keypoint_scores is None else found.keypoint_scores
        return {
            "scores": found.scores,
            "poses": found.poses,
            "pose_labels": found.pose_labels,
            "keypoint_scores": joints,
        }


def traced_sides(divisor: int) -> tuple[int, int, Dim, Dim]:
    """Height and width of a trace, and what is said of them: free, or free multiples of `COARSEST`."""
    _, height, width = TRACED
    if divisor % COARSEST:
        return height, width, FREE, FREE
    height, width = (-(-side // COARSEST) * COARSEST for side in (height, width))
    rows, columns = (COARSEST * Dim(name, min=2) for name in ("rows", "columns"))
    return height, width, rows, columns


def build_program(model: HPetrForPoseEstimation, divisor: int) -> ExportedProgram:
    """The model in eval mode as one program of plain torch operators, float32, with free batch, height and width.

    Args:
        divisor: height and width of every batch are multiples of it.
    """
    height, width, rows, columns = traced_sides(divisor)
    images = (torch.zeros(TRACED[0], 3, height, width), torch.ones(TRACED[0], height, width).long())
    sizes = ({0: FREE, 2: rows, 3: columns}, {0: FREE, 1: rows, 2: columns})
    # With gradients: of weights without, torch asks whether strides happen to fit, and ties the graph to the answer.
    with quiet(), requiring_gradients(model, True):
        return torch.export.export(WholeModel(model).eval(), images, dynamic_shapes=sizes, strict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell what they could not simplify, and what in torch is outdated: nobody can do anything about it."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def requiring_gradients(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Parameters with or without gradients, and gradients on: without them, backbones and attention take paths whose
    arithmetic depends on the size of the image.
    """
    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(requires_grad)
