"""Names of the stages of an image and of a training step, as torch's profiler shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DECODE, RESIZE, POST_PROCESSING = "decode", "resize and normalize", "post-processing"
BACKBONE, ENCODER, PROPOSALS = "backbone and neck", "encoder", "proposals"
POSE_DECODER, JOINT_DECODER = "pose decoder", "joint decoder"
COSTS, ASSIGNMENT, HEATMAP, LOSSES = "matching: costs", "matching: assignment", "heatmap branch", "losses"
NETWORK_STAGES = (BACKBONE, ENCODER, PROPOSALS, POSE_DECODER, JOINT_DECODER)
PREFIX = "hpetr."


def stage(name: str) -> AbstractContextManager[object]:
    """Return a context that the profiler shows as `hpetr.NAME`; without a profiler it costs a few microseconds.

    Compilers and exporters see nothing: they would write the marks into their graphs.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(PREFIX + name)
