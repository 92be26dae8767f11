"""What a model is and what runs it: parameters, FLOPs, tokens, kernel and versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import hpetr
from hpetr.checkpoints.folder import BUNDLED, bundled_checkpoint, load_config, load_processor, resolve_checkpoint
from hpetr.checkpoints.hub import is_hub_place
from hpetr.errors import InputError
from hpetr.images.pixels import keep_ratio_size
from hpetr.model.config import HPetrConfig
from hpetr.model.grid import Grid
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.model.ops import kernel_name
from hpetr.model.presets import PRESETS

# The size that images of COCO mostly have, height and width.
USUAL_IMAGE = (480, 640)


@dataclass(frozen=True)
class ModelInfo:
    """Figures of a model.

    Attributes:
        name: preset or folder.
        parameters: all. trainable: those that training changes. frozen: the rest.
        size: height and width in pixels of the network's input that `flops` and `tokens` are for.
        flops: floating-point operations of one image, 2 for a multiply-add, of matrix products, convolutions and
            self-attention; the bilinear sampling of deformable attention is not counted.
        tokens: of each feature level, finest first.
    """

    name: str
    parameters: int
    trainable: int
    frozen: int
    size: tuple[int, int]
    flops: int
    tokens: tuple[int, ...]


def model_info(target: str, size: tuple[int, int] | None = None) -> ModelInfo:
    """Figures of a preset or a checkpoint folder; no weights are read or made.

    Args:
        target: preset's name, or folder. The bundled checkpoint's name means the bundled checkpoint.
        size: height and width of the network's input; None takes what the processor makes of a 640 x 480 image.

    Raises:
        InputError: neither a preset nor a checkpoint, or the size is not positive.
    """
    config, processor = _config_and_processor(target)
    height, width = size or keep_ratio_size(
        *USUAL_IMAGE, processor.size["shortest_edge"], processor.size["longest_edge"]
    )
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


def _config_and_processor(target: str) -> tuple[HPetrConfig, HPetrImageProcessor]:
    bundled = target == BUNDLED and bundled_checkpoint().is_dir()
    if target in PRESETS and not bundled and not os.path.isdir(target):
        return HPetrConfig.preset(target), HPetrImageProcessor()
    if not bundled and not is_hub_place(target) and not os.path.exists(target):
        raise InputError(f"{target}: neither a checkpoint folder nor a preset, expected one of {', '.join(PRESETS)}")
    folder = resolve_checkpoint(target)
    return load_config(folder), load_processor(folder)


def environment_info() -> dict[str, str]:
    """Versions, threads and the deformable-sampling kernel in use here, for bug reports."""
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
