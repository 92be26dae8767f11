"""Weights of backbones: the loaded backbone computes what its source computes, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    ResNetForImageClassification,
    ResNetModel,
    SwinBackbone,
    SwinForImageClassification,
    SwinModel,
)

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError
from hpetr.checkpoints.backbone_weights import load_backbone_weights

STAGES = ["stage2", "stage3", "stage4"]
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 2, 1, 1],
    "out_features": STAGES,
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 8],
    "out_features": STAGES,
}


def pose_model(backbone: dict, **changes) -> HPetrForPoseEstimation:
    torch.manual_seed(1)
    small = {"d_model": 32, "num_heads": 4, "encoder_layers": 1, "decoder_layers": 1, "keypoint_head_dim": 32}
    config = HPetrConfig(backbone_config={**copy.deepcopy(backbone), **changes}, **small)
    return HPetrForPoseEstimation(config).eval()


def trained(model_class: type, backbone: dict):
    """A model whose every number, batch norms' statistics included, is other than at the start."""
    torch.manual_seed(2)
    model = model_class(AutoConfig.for_model(**copy.deepcopy(backbone))).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(std=0.2)
    return model


def pixels() -> Tensor:
    return torch.randn(1, 3, 70, 93, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def features(model: HPetrForPoseEstimation) -> list[Tensor]:
    return list(model.backbone.body(pixels()).feature_maps)


@pytest.mark.parametrize("model_class", [ResNetModel, ResNetForImageClassification])
def test_resnet_folder(tmp_path: Path, model_class: type) -> None:
    source = trained(model_class, RESNET)
    source.save_pretrained(tmp_path)
    model = pose_model(RESNET)
    neck = model.backbone.neck.convs[0].weight.clone()
    summary = load_backbone_weights(model, str(tmp_path))
    with torch.inference_mode():
        expected = source(pixels(), output_hidden_states=True).hidden_states[2:]
    for ours, theirs in zip(features(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.backbone.neck.convs[0].weight, neck)  # the backbone alone
    count = sum(not name.endswith("num_batches_tracked") for name in model.backbone.body.state_dict())
    assert f"{count} tensors" in summary
    assert ("classifier.1.weight" in summary) == (model_class is ResNetForImageClassification)


@pytest.mark.parametrize("model_class", [SwinModel, SwinForImageClassification])
def test_swin_folder(tmp_path: Path, model_class: type) -> None:
    """The maps before the norms are the source's; the norms of the outputs, which it lacks, are identity."""
    source = trained(model_class, SWIN)
    source.save_pretrained(tmp_path)
    model = pose_model(SWIN)
    summary = load_backbone_weights(model, str(tmp_path))
    how = {"always_partition": True, "output_hidden_states": True, "output_hidden_states_before_downsampling": True}
    with torch.inference_mode():
        expected = source.base_model(pixels(), **how).reshaped_hidden_states[2:]
    for ours, theirs in zip(features(model), expected, strict=True):
        normed = torch.nn.functional.layer_norm(theirs.movedim(1, -1), ours.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(ours, normed, rtol=1e-5, atol=1e-5)
    assert "6 of output norms start as identity" in summary
    assert "swin.layernorm.weight" in summary


def test_swin_backbone_brings_its_norms(tmp_path: Path) -> None:
    source = trained(SwinBackbone, SWIN)
    source.save_pretrained(tmp_path)
    model = pose_model(SWIN)
    assert "identity" not in load_backbone_weights(model, str(tmp_path))
    with torch.inference_mode():
        expected = source(pixels()).feature_maps
    for ours, theirs in zip(features(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def torchvision_state(source: ResNetModel) -> dict[str, Tensor]:
    """The tensors of a transformers ResNet under torchvision's names."""
    state = {}
    for name, tensor in source.state_dict().items():
        part, tail = ("conv", "weight") if "convolution" in name else ("bn", name.rsplit(".", 1)[-1])
        if name.startswith("embedder."):
            state[f"{part}1.{tail}"] = tensor
            continue
        _, _, stage, _, block, kind, *rest = name.split(".")
        prefix = f"layer{int(stage) + 1}.{block}."
        if kind == "shortcut":
            state[f"{prefix}downsample.{int(part == 'bn')}.{tail}"] = tensor
        else:
            state[f"{prefix}{part}{int(rest[0]) + 1}.{tail}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def test_torchvision_file(tmp_path: Path) -> None:
    """float16 and a classifier as in real files; the stride's place is the model's where the file does not say."""
    path = tmp_path / "resnet.safetensors"
    version_1 = {**RESNET, "downsample_in_bottleneck": True}
    source = trained(ResNetModel, version_1)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            if tensor.ndim == 4:
                tensor.copy_(tensor.half())
    state = {name: t.half() if t.ndim == 4 else t for name, t in torchvision_state(source).items()}
    save_file({**state, "fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}, path)
    model = pose_model(version_1)
    summary = load_backbone_weights(model, str(path))
    assert "downsample_in_bottleneck is true by the model" in summary
    assert "left out 2" in summary
    with torch.inference_mode():
        expected = source(pixels(), output_hidden_states=True).hidden_states[2:]
    for ours, theirs in zip(features(model), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_torchvision_file_that_says_where_its_stride_is(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file(torchvision_state(trained(ResNetModel, RESNET)), path, {"downsample_in_bottleneck": "false"})
    assert "by the model" not in load_backbone_weights(pose_model(RESNET), str(path))
    with pytest.raises(
        InputError, match="downsample_in_bottleneck is false in its metadata, expected the model's true"
    ):
        load_backbone_weights(pose_model(RESNET, downsample_in_bottleneck=True), str(path))


def test_imagenet_of_an_unknown_architecture() -> None:
    with pytest.raises(InputError, match="known for ResNet-50, ResNet-101 and Swin-L, not for this"):
        load_backbone_weights(pose_model(RESNET), "imagenet")


@pytest.mark.parametrize(
    ("preset", "repository"),
    [
        ("petr-r50", "microsoft/resnet-50"),
        ("h-petr-r101", "microsoft/resnet-101 --revision refs/pr/2"),
        ("petr-swin-l-crowdpose", "microsoft/swin-large-patch4-window7-224 --revision refs/pr/1"),
    ],
)
def test_without_network_the_error_says_what_to_do(
    preset: str, repository: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = pose_model(RESNET)  # weights are looked for by the configuration; Swin-L itself would take seconds to build
    model.config.backbone_config = HPetrConfig.preset(preset).backbone_config
    with pytest.raises(InputError, match=f"`hf download {repository} --local-dir FOLDER`") as error:
        load_backbone_weights(model, "imagenet")
    assert "\n" not in str(error.value)
    assert "model.backbone_weights" in str(error.value)


def test_hub_cache_serves_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--resnet-tiny"
    commit = "a" * 40
    source = trained(ResNetModel, RESNET)
    source.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    model = pose_model(RESNET)
    assert "someone/resnet-tiny@v2" in load_backbone_weights(model, "someone/resnet-tiny@v2")
    expected = source.embedder.embedder.convolution.weight
    assert torch.equal(model.backbone.body.embedder.embedder.convolution.weight, expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(ResNetModel, RESNET).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "convnext"}, "model_type is 'convnext', expected 'resnet'"),
        ({"model_type": "hpetr"}, "a checkpoint of hpetr belongs in model.weights"),
        ({"depths": [1, 2, 2, 1]}, r"depths is \[1, 2, 2, 1\], expected the model's \[1, 2, 1, 1\]"),
        ({"downsample_in_bottleneck": True}, "downsample_in_bottleneck is True, expected the model's False"),
    ],
)
def test_another_architecture_is_refused(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    model = pose_model(RESNET)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        load_backbone_weights(model, str(folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_tensors_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, damage: str, kind: str) -> None:
    if kind == "folder":
        path = folder / "model.safetensors"
        state, name = load_file(path), "embedder.embedder.convolution.weight"
    else:
        path = tmp_path / "resnet.safetensors"
        state, name = torchvision_state(ResNetModel.from_pretrained(folder)), "conv1.weight"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        state[name.replace("weight", "bias")] = torch.zeros(8)
    else:
        state[name] = torch.zeros(9, 3, 7, 7)
    save_file(state, path, {"format": "pt"})
    model = pose_model(RESNET)
    before = copy.deepcopy(model.state_dict())
    expected = {"missing": "is missing", "extra": "has no place", "shape": "has another shape"}[damage]
    tensor = "conv1.bias" if (kind, damage) == ("file", "extra") else "embedder.embedder.convolution"
    with pytest.raises(InputError, match=f"tensor '{tensor}.*{expected}"):
        load_backbone_weights(model, str(folder if kind == "folder" else path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_broken_and_absent_files(folder: Path, tmp_path: Path) -> None:
    model = pose_model(RESNET)
    cases = {
        "no.safetensors": "no such file",
        "broken.safetensors": "truncated",
        "names.safetensors": "expected torchvision's tensor names",
        "broken": "truncated",
        "pickled": "pytorch_model.bin is pickled and never loaded",
        "empty": "no config.json",
    }
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    (tmp_path / "names.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("broken", "pickled", "empty"):
        (tmp_path / name).mkdir()
    for name in ("broken", "pickled"):
        (tmp_path / name / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load_backbone_weights(model, str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="a single file is read for a ResNet alone"):
        load_backbone_weights(pose_model(SWIN), str(tmp_path / "names.safetensors"))
