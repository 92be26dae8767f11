"""The meaning of a model's name: checkpoint, preset, or exported file."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hpetr.checkpoints.folder import BUNDLED, bundled_checkpoint, is_hub_place, resolve_checkpoint
from hpetr.errors import InputError
from hpetr.inference.torch_predictor import PosePredictor
from hpetr.model.presets import PRESETS
from hpetr.poses.predictor import Predictor
from hpetr.runtime import ExportedPredictor, is_exported

Kind = Literal["checkpoint", "preset", "exported"]


CHECKPOINT: tuple[Kind, ...] = ("checkpoint",)


@dataclass(frozen=True)
class NamedModel:
    """A model's name and its meaning.

    Attributes:
        kind: "checkpoint", "preset" or "exported".
        title: short name to show: of the folder, hub repository, preset or file.
        path: checkpoint folder or exported file; None for a preset.
    """

    kind: Kind
    title: str
    path: Path | None


def find_model(name: str | os.PathLike[str] | None, kinds: Collection[Kind] = CHECKPOINT) -> NamedModel:
    """Find the model that a name means.

    Args:
        name: checkpoint folder, `hf://OWNER/NAME`, exported `.onnx` or `.xml` file, or preset. None and "h-petr-nano"
            mean the checkpoint in the package. A folder of a preset's name is that folder.
        kinds: the kinds that are expected.

    Raises:
        InputError: the name means nothing, or a model of another kind; or the hub does not give it.
    """
    text = BUNDLED if name is None else os.fspath(name)
    if is_exported(text):
        if "exported" not in kinds:
            raise InputError(f"{text}: is an exported model, expected a checkpoint folder{_or_preset(kinds)}")
        return NamedModel("exported", Path(text).name, Path(text))
    is_bundled = text == BUNDLED and bundled_checkpoint().is_dir()
    if text in PRESETS and not is_bundled and not os.path.isdir(text):
        if "preset" not in kinds:
            raise InputError(
                f"{text}: is a preset, a design without trained weights; expected a checkpoint: a folder that "
                f"`hpetr train` or `hpetr convert` wrote, hf://OWNER/NAME, or {BUNDLED}"
            )
        return NamedModel("preset", text, None)
    if "preset" in kinds and not is_bundled and not is_hub_place(text) and not os.path.exists(text):
        raise InputError(f"{text}: neither a checkpoint folder nor a preset, expected one of {', '.join(PRESETS)}")
    folder = resolve_checkpoint(None if name is None else text)
    return NamedModel("checkpoint", text if is_hub_place(text) else folder.resolve().name, folder)


def _or_preset(kinds: Collection[Kind]) -> str:
    return " or a preset" if "preset" in kinds else ""


def open_predictor(
    model: str | os.PathLike[str] | None,
    device: str | torch.device = "auto",
    threshold: float | None = None,
    *,
    precision: str = "float32",
    compiled: bool = False,
    keypoint_threshold: float | None = None,
) -> Predictor:
    """Open the predictor of a checkpoint or of an exported model.

    Args:
        model: see `find_model`.
        device: see `PosePredictor`.
        threshold: see `PosePredictor`.
        precision: see `PosePredictor`; an exported model has one precision.
        compiled: see `PosePredictor`; not for an exported model.
        keypoint_threshold: see `PosePredictor`.

    Raises:
        InputError: see `find_model`, `PosePredictor` and `hpetr.runtime.ExportedPredictor`; or a precision for an
            exported model.
    """
    named = find_model(model, ("checkpoint", "exported"))
    if named.kind == "checkpoint":
        return PosePredictor(
            named.path,
            device,
            threshold,
            precision=precision,
            compiled=compiled,
            keypoint_threshold=keypoint_threshold,
        )
    if precision != "float32" or compiled:
        raise InputError(f"{model}: is an exported model, --precision and --compile are for checkpoints")
    assert named.path is not None
    return ExportedPredictor(named.path, threshold, device=str(device), keypoint_threshold=keypoint_threshold)
