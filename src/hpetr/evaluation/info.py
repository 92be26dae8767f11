"""Size and cost of a model, and the versions in use."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import hpetr
from hpetr.checkpoints.folder import load_config, load_processor
from hpetr.errors import InputError
from hpetr.inference.open import find_model
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.model.ops import kernel_name

# The size of most images of COCO, height and width.
USUAL_IMAGE = (480, 640)


@dataclass(frozen=True)
class ModelInfo:
    """Size and cost of a model.

    Attributes:
        name: as it was given.
        parameters: number of all parameters.
        trainable: number of parameters that training changes.
        frozen: number of the others.
        size: height and width of the network's input for `flops` and `tokens`, in pixels.
        flops: floating-point operations of one image, 2 for a multiply-add, of matrix products, convolutions and
            self-attention, without deformable sampling.
        tokens: number of tokens of each feature level, finest first.
    """

    name: str
    parameters: int
    trainable: int
    frozen: int
    size: tuple[int, int]
    flops: int
    tokens: tuple[int, ...]


def model_info(target: str, size: tuple[int, int] | None = None) -> ModelInfo:
    """Return size and cost of a preset or a checkpoint. No weights are read or made.

    Args:
        target: see `hpetr.inference.open.find_model`.
        size: height and width of the network's input; None means those of a 640 x 480 image.

    Raises:
        InputError: neither a preset nor a checkpoint, or the size is not positive.
    """
    found = find_model(target, ("checkpoint", "preset"))
    if found.path is None:
        config, processor = HPetrConfig.preset(target), HPetrImageProcessor.preset(target)
    else:
        config, processor = load_config(found.path), load_processor(found.path)
    height, width = size or processor.resize.size(*USUAL_IMAGE)
    if min(height, width) < 1:
        raise InputError(f"size is {height}x{width}, expected a positive height and width")
    with torch.device("meta"):
        model = HPetrForPoseEstimation(config).eval()
        pixels = torch.empty(1, 3, height, width)
    grids: list[Grid] = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: grids.append(arguments[2]))
    # With gradients on: without them self-attention takes a fused path that the counter does not see.
    with FlopCounterMode(display=False) as counter:
        model(pixels)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, requires_grad in sizes if requires_grad)
    return ModelInfo(
        name=target,
        parameters=total,
        trainable=trainable,
        frozen=total - trainable,
        size=(height, width),
        flops=counter.get_total_flops(),
        tokens=tuple(h * w for h, w in grids[0].spatial_shapes),
    )


def environment_info() -> dict[str, str]:
    """Return the versions, threads and deformable-sampling kernel in use, for bug reports."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "hpetr": hpetr.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "CPU threads": str(torch.get_num_threads()),
        "sampling kernel": kernel_name(torch.device(device), torch.float32),
    }
