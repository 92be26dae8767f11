"""Official checkpoints (mmcv naming) to hpetr and back, weight for weight.

`official_names` states every name once, for both directions.
"""

from __future__ import annotations

import argparse
import os
import pickle
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hpetr.checkpoints.folder import build_on_meta
from hpetr.checkpoints.official_names import SIZES, UNFOLDED, is_official, is_weight, tensor_pairs
from hpetr.errors import InputError, first_line
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.presets import PRESETS

StateDict = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def weight_shapes(state: StateDict) -> Shapes:
    """Return the shapes of all weights by name: they identify a model."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if is_weight(name)}


def unfold_order(channels: int, *, inverse: bool = False) -> Tensor:
    """Return the order of the 4 C channels of Swin's patch merging.

    mmdet merges 2 x 2 patches with nn.Unfold: channel-major, rows first (c, y, x). transformers concatenates the four
    patches, columns first (x, y, c). `official[..., order]` is ours; with `inverse`, `ours[..., order]` is official.
    """
    index = torch.arange(4 * channels).view(channels, 2, 2)  # (c, y, x) -> official position
    order = index.permute(2, 1, 0).flatten()  # (4 C,)
    return order.argsort() if inverse else order


def _reorder(official: str, tensor: Tensor, *, inverse: bool = False) -> Tensor:
    if UNFOLDED.fullmatch(official):
        return tensor[..., unfold_order(tensor.shape[-1] // 4, inverse=inverse)]
    return tensor.clone()


def from_official(state: StateDict, config: HPetrConfig) -> StateDict:
    """Return official tensors under our names and in our layouts.

    Raises:
        InputError: an official name has no place in this model.
    """
    places = tensor_pairs(build_on_meta(config).state_dict(), config)
    ours: StateDict = {}
    for name in filter(is_weight, state):
        if name not in places:
            raise InputError(f"official checkpoint: unexpected tensor {name!r}")
        parts = dict(zip(places[name], _reorder(name, state[name]).tensor_split(len(places[name])), strict=True))
        if any(part in ours and not torch.equal(ours[part], tensor) for part, tensor in parts.items()):
            raise InputError(f"official checkpoint: tensor {name!r} differs from the other one of the same head")
        ours |= parts
    return ours


def to_official(model: HPetrForPoseEstimation) -> StateDict:
    """Return the model's weights under their official names and in official layouts; the inverse of `from_official`.

    Raises:
        InputError: the official code has no such model.
    """
    state = model.state_dict()
    return {
        name: _reorder(name, torch.cat([state[part] for part in parts]), inverse=True)
        for name, parts in tensor_pairs(state, model.config).items()
    }


def read_official(path: Path) -> StateDict:
    """Read the state dict of a `.pth` file: under `state_dict` (mmcv) or `model` (Group Pose), or a bare one.

    Pickled code never runs.

    Raises:
        InputError: the file is missing, truncated, holds pickled objects other than tensors, or no state dict.
    """
    if not os.path.isfile(path):
        found = "is a folder" if os.path.isdir(path) else "no such file"
        raise InputError(f"{path}: {found}, expected an official checkpoint (.pth)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # Group Pose's options; runs no code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds pickled objects other than tensors or is no checkpoint, expected a state dict; nothing "
            "in it was executed"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    except Exception as error:  # torch's reader raises any kind of error for a broken file
        raise InputError(f"{path}: cannot be read as a checkpoint (truncated?), expected a .pth file") from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: expected a state dict of tensors, or a dict with one under 'state_dict' or 'model'")
    return state


def official_sizes(shapes: Shapes) -> dict[str, int]:
    """Return the settings of `SIZES` that tensors of these shapes have, under official names or ours."""
    sizes = {key: shapes[name][0] for key, names in SIZES.items() for name in names if shapes.get(name)}
    if any(name.endswith("instance_embedding.weight") for name in shapes):
        sizes["num_labels"] = sizes.get("num_labels", 2) - 1  # Group Pose's heads have a column before the first class
    return sizes


@cache
def _expected(preset: str, official: bool, **sizes: int) -> Shapes:
    """Return the shapes of a preset's tensors under official names or ours."""
    model = build_on_meta(HPetrConfig.preset(preset, **sizes))
    return weight_shapes(to_official(model) if official else model.state_dict())


def _misfits(shapes: Shapes, expected: Shapes) -> list[str]:
    """Return one phrase for each tensor that does not fit."""
    found = [f"unexpected tensor {name!r}" for name in shapes if name not in expected]
    found += [f"tensor {name!r} is missing" for name in expected if name not in shapes]
    return found + [
        f"tensor {name!r} has shape {shape}, expected {expected[name]}"
        for name, shape in shapes.items()
        if shape != expected.get(name, shape)
    ]


def identify(shapes: Shapes, where: str | Path, *, official: bool = True) -> str:
    """Return the preset whose tensors have these names and shapes, with any number of keypoints and classes.

    Args:
        shapes: see `weight_shapes`.
        where: the file, for the error.
        official: whether the names are the official code's or ours.

    Raises:
        InputError: no preset has; names the nearest and the first tensor that does not fit.
    """
    nearest, fewest = "", list(shapes)
    presets = [name for name in PRESETS if is_official(HPetrConfig.preset(name))]
    for sizes in ({}, official_sizes(shapes)):  # the preset's own sizes first: others may have the same tensors
        for preset in presets:
            misfits = _misfits(shapes, _expected(preset, official, **sizes))
            if not misfits:
                return preset
            if not nearest or len(misfits) < len(fewest):
                nearest, fewest = preset, misfits
    raise InputError(
        f"{where}: is none of the zoo's models; of the nearest, {nearest}, {len(fewest)} tensors do not fit, first: "
        f"{fewest[0]}"
    )


def load_official(
    source: str | Path | StateDict, preset: str | None = None, where: str | Path = "state dict"
) -> HPetrForPoseEstimation:
    """Load the model `preset` with the weights of an official checkpoint, in evaluation mode.

    The numbers of keypoints and classes are the checkpoint's, so that CrowdPose's 14 keypoints load as well.

    Args:
        source: path of a `.pth` file, see `read_official`, or a state dict.
        preset: name of the model, see `HPetrConfig.preset`; None finds it by the tensors.
        where: the file of a state dict, for errors.

    Raises:
        InputError: wrong file, or a checkpoint of another model: names the first tensor that does not fit.
    """
    state, where = (source, where) if isinstance(source, dict) else (read_official(Path(source)), source)
    shapes = weight_shapes(state)
    preset = preset or identify(shapes, where)
    sizes = official_sizes(shapes)
    config = HPetrConfig.preset(preset, **sizes)
    try:
        problems = _misfits(shapes, _expected(preset, official=True, **sizes))
    except InputError as error:
        problems = [str(error)]
    problems += [f"tensor {name!r} holds NaN or infinity" for name in shapes if not state[name].isfinite().all()]
    if problems:
        raise InputError(f"{where}: {problems[0]}; is it a checkpoint of {preset}?")
    model = HPetrForPoseEstimation(config)
    model.load_state_dict(from_official(state, config), strict=False)
    return model.eval()
