"""Official checkpoints (mmcv naming) to hpetr and back, weight for weight.

Every official name has exactly one place here; `load_official` fails on anything missing or left over.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig
from hpetr.model.hpetr import HPetrForPoseEstimation

StateDict = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

DEFORMABLE = r"(sampling_offsets|attention_weights|value_proj|output_proj)\.(weight|bias)"
HEAD = r"bbox_head\."
TRANSFORMER = r"bbox_head\.transformer\."


def _layers(official: str, ours: str, *, self_attention: bool) -> list[tuple[str, str]]:
    """Rules for a stack of transformer layers; with self-attention the official code numbers it attention 0."""
    prefix, target = TRANSFORMER + official + r"\.layers\.(\d+)\.", ours + r".layers.\1."
    cross = "1" if self_attention else "0"
    norms = ["self_attention_norm"] * self_attention + ["attention_norm", "ffn_norm"]
    rules = [(prefix + rf"attentions\.{cross}\." + DEFORMABLE, target + r"attention.\2.\3")]
    rules += [(prefix + r"ffns\.0\.layers\.0\.0\.(weight|bias)", target + r"ffn.linear1.\2")]
    rules += [(prefix + r"ffns\.0\.layers\.1\.(weight|bias)", target + r"ffn.linear2.\2")]
    rules += [(prefix + rf"norms\.{i}\.(weight|bias)", target + rf"{norm}.\2") for i, norm in enumerate(norms)]
    if self_attention:
        rules.append((prefix + r"attentions\.0\.attn\.(.+)", target + r"self_attention.\2"))
    return rules


TRANSFORMER_RULES: list[tuple[str, str]] = [
    *_layers("encoder", "encoder", self_attention=False),
    *_layers("hm_encoder", "heatmap_encoder", self_attention=False),
    *_layers("decoder", "pose_decoder", self_attention=True),
    *_layers("refine_decoder", "joint_decoder", self_attention=True),
    (TRANSFORMER + r"level_embeds", "level_embedding.weight"),
    (TRANSFORMER + r"enc_output\.(weight|bias)", r"pose_decoder.proposal_proj.\1"),
    (TRANSFORMER + r"enc_output_norm\.(weight|bias)", r"pose_decoder.proposal_norm.\1"),
    (TRANSFORMER + r"refine_query_embedding\.weight", "joint_decoder.query_embedding.weight"),
    (HEAD + r"query_embedding\.weight", "pose_decoder.query_embedding.weight"),
    (HEAD + r"cls_branches\.(\d+)\.(weight|bias)", r"pose_decoder.class_heads.\1.\2"),
    (HEAD + r"kpt_branches\.(\d+)\.(\d)\.(weight|bias)", r"pose_decoder.keypoint_heads.\1.\2.\3"),
    (HEAD + r"refine_kpt_branches\.(\d+)\.(\d)\.(weight|bias)", r"joint_decoder.heads.\1.\2.\3"),
    (HEAD + r"fc_hm\.(weight|bias)", r"heatmap_head.\1"),
    (r"neck\.convs\.(\d)\.conv\.weight", r"backbone.neck.convs.\1.weight"),
    (r"neck\.convs\.(\d)\.gn\.(weight|bias)", r"backbone.neck.norms.\1.\2"),
    # The zoo's necks have three backbone levels and one extra.
    (r"neck\.extra_convs\.0\.conv\.weight", "backbone.neck.convs.3.weight"),
    (r"neck\.extra_convs\.0\.gn\.(weight|bias)", r"backbone.neck.norms.3.\1"),
]
SWIN_BLOCK = r"backbone\.stages\.(\d)\.blocks\.(\d+)\."
BODY = "backbone.body."
SWIN_RULES: list[tuple[str, str]] = [
    (r"backbone\.patch_embed\.projection\.(.+)", BODY + r"swin.embeddings.patch_embeddings.projection.\1"),
    (r"backbone\.patch_embed\.norm\.(.+)", BODY + r"swin.embeddings.norm.\1"),
    (r"backbone\.stages\.(\d)\.downsample\.(.+)", BODY + r"swin.encoder.layers.\1.downsample.\2"),
    (SWIN_BLOCK + r"norm1\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.layernorm_before.\3"),
    (SWIN_BLOCK + r"norm2\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.layernorm_after.\3"),
    (SWIN_BLOCK + r"ffn\.layers\.0\.0\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.mlp.fc1.\3"),
    (SWIN_BLOCK + r"ffn\.layers\.1\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.mlp.fc2.\3"),
    (SWIN_BLOCK + r"attn\.w_msa\.proj\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.attention.o_proj.\3"),
    (
        SWIN_BLOCK + r"attn\.w_msa\.relative_position_bias_table",
        BODY + r"swin.encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table",
    ),
    # Three tensors of ours stand in one of theirs; see `_convert`.
    (SWIN_BLOCK + r"attn\.w_msa\.qkv\.(.+)", BODY + r"swin.encoder.layers.\1.blocks.\2.attention.{qkv}_proj.\3"),
]
RESNET_LAYER = r"backbone\.layer(\d)\.(\d+)\."


def _resnet(match: re.Match[str]) -> str:
    stage, block, module, rest = match.groups()
    prefix = f"{BODY}encoder.stages.{int(stage) - 1}.layers.{block}."
    if module.startswith("downsample"):
        part = "convolution" if module.endswith("0") else "normalization"
        return f"{prefix}shortcut.{part}.{rest}"
    part = "convolution" if module.startswith("conv") else "normalization"
    return f"{prefix}layer.{int(module[-1]) - 1}.{part}.{rest}"


RESNET_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"backbone\.conv1\.(.+)", BODY + r"embedder.embedder.convolution.\1"),
    (r"backbone\.bn1\.(.+)", BODY + r"embedder.embedder.normalization.\1"),
    (RESNET_LAYER + r"(conv\d|bn\d|downsample\.\d)\.(.+)", _resnet),
]


def _backbone_rules(config: HPetrConfig) -> list:
    kind = config.backbone_config.model_type
    if kind == "swin":
        stages = {f"stage{i + 2}": f"norm{i + 1}" for i in range(3)}
        outputs = [(rf"backbone\.{n}\.(.+)", rf"{BODY}hidden_states_norms.{s}.\1") for s, n in stages.items()]
        return SWIN_RULES + outputs
    if kind == "resnet":
        return RESNET_RULES
    raise InputError(f"convert: no official model has a {kind} backbone, expected a ResNet or Swin preset")


def _rename(name: str, rules: list) -> str | None:
    for pattern, replacement in rules:
        if (match := re.fullmatch(pattern, name)) is not None:
            return replacement(match) if callable(replacement) else match.expand(replacement)
    return None


def unfold_order(channels: int, *, inverse: bool = False) -> Tensor:
    """Order of the 4 C channels that patch merging sees.

    mmdet merges 2 x 2 patches with nn.Unfold: channel-major, rows first (c, y, x). transformers concatenates the four
    patches, columns first (x, y, c). `official[..., order]` gives ours; `inverse` the way back.
    """
    index = torch.arange(4 * channels).view(channels, 2, 2)  # (c, y, x) -> official position
    order = index.permute(2, 1, 0).flatten()
    return order.argsort() if inverse else order


def _skipped(name: str) -> bool:
    """Buffers that are not weights: window indices and the batch-norm step counters of some checkpoints."""
    return name.endswith(("relative_position_index", "num_batches_tracked"))


def weight_shapes(state: StateDict) -> Shapes:
    """Shapes of all tensors that are weights, by name: what tells one model from another."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not _skipped(name)}


def _reorder(name: str, tensor: Tensor, *, inverse: bool) -> Tensor:
    """Swin's patch merging; its attention tables differ only in how they are split (q, k, v), not in their order."""
    if ".downsample." in name and "swin" in name:
        return tensor[..., unfold_order(tensor.shape[-1] // 4, inverse=inverse)]
    return tensor


def from_official(state: StateDict, config: HPetrConfig) -> StateDict:
    """Official names and layouts to ours.

    Raises:
        InputError: an official name has no place in this model.
    """
    rules = TRANSFORMER_RULES + _backbone_rules(config)
    ours: StateDict = {}
    for name, tensor in state.items():
        if _skipped(name):
            continue
        target = _rename(name, rules)
        if target is None:
            raise InputError(f"official checkpoint: unexpected tensor {name!r}")
        if "{qkv}" in target:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                ours[target.replace("{qkv}", letter)] = part.clone()
        else:
            ours[target] = _reorder(target, tensor, inverse=False)
    return ours


def to_official(model: HPetrForPoseEstimation) -> StateDict:
    """The model's weights under their official names and layouts; the inverse of `from_official`.

    Window indices and batch-norm step counters, which hold no weights, are not written.

    Raises:
        InputError: the official code has no such backbone.
    """
    config = model.config
    rules = TRANSFORMER_RULES + _backbone_rules(config)
    state = model.state_dict()
    official: StateDict = {}
    for name in official_names(config):
        target = _rename(name, rules)
        assert target is not None, name
        if "{qkv}" in target:
            official[name] = torch.cat([state[target.replace("{qkv}", letter)] for letter in "qkv"])
        else:
            official[name] = _reorder(target, state[target], inverse=True).clone()
    return official


def official_names(config: HPetrConfig) -> list[str]:
    """Every official tensor name of a model with this configuration, window indices and step counters left out."""
    return _transformer_names(config) + _backbone_names(config)


def _transformer_names(config: HPetrConfig) -> list[str]:
    names: list[str] = []

    def add(prefix: str, *suffixes: str) -> None:
        names.extend(f"{prefix}.{suffix}.{kind}" for suffix in suffixes for kind in ("weight", "bias"))

    deformable = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
    stacks = {
        "encoder": (config.encoder_layers, False),
        "hm_encoder": (1, False),
        "decoder": (config.decoder_layers, True),
        "refine_decoder": (config.joint_decoder_layers, True),
    }
    for stack, (depth, self_attention) in stacks.items():
        for i in range(depth):
            layer = f"bbox_head.transformer.{stack}.layers.{i}"
            if self_attention:
                names.extend(f"{layer}.attentions.0.attn.in_proj_{kind}" for kind in ("weight", "bias"))
                add(layer, "attentions.0.attn.out_proj")
            add(f"{layer}.attentions.{int(self_attention)}", *deformable)
            add(layer, "ffns.0.layers.0.0", "ffns.0.layers.1", *[f"norms.{n}" for n in range(2 + self_attention)])
    add("bbox_head.transformer", "enc_output", "enc_output_norm")
    names.append("bbox_head.transformer.level_embeds")
    names += ["bbox_head.transformer.refine_query_embedding.weight", "bbox_head.query_embedding.weight"]
    for i in range(config.decoder_layers + 1):
        add("bbox_head", f"cls_branches.{i}", *[f"kpt_branches.{i}.{j}" for j in (0, 2, 4, 6)])
    for i in range(config.joint_decoder_layers):
        add("bbox_head", *[f"refine_kpt_branches.{i}.{j}" for j in (0, 2, 4)])
    add("bbox_head", "fc_hm")
    for conv in ("convs.0", "convs.1", "convs.2", "extra_convs.0"):
        names.append(f"neck.{conv}.conv.weight")
        add(f"neck.{conv}", "gn")
    return names


def _backbone_names(config: HPetrConfig) -> list[str]:
    backbone = config.backbone_config
    names: list[str] = []

    def add(prefix: str, *kinds: str) -> None:
        names.extend(f"backbone.{prefix}.{kind}" for kind in kinds)

    both, norm = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")
    if backbone.model_type == "resnet":
        add("conv1", "weight")
        add("bn1", *norm)
        for stage, depth in enumerate(backbone.depths, 1):
            for block in range(depth):
                for i in (1, 2, 3):
                    add(f"layer{stage}.{block}.conv{i}", "weight")
                    add(f"layer{stage}.{block}.bn{i}", *norm)
                if block == 0:
                    add(f"layer{stage}.0.downsample.0", "weight")
                    add(f"layer{stage}.0.downsample.1", *norm)
        return names
    add("patch_embed.projection", *both)
    add("patch_embed.norm", *both)
    for stage, depth in enumerate(backbone.depths):
        for block in range(depth):
            prefix = f"stages.{stage}.blocks.{block}"
            for part in ("norm1", "norm2", "attn.w_msa.qkv", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1"):
                add(f"{prefix}.{part}", *both)
            add(f"{prefix}.attn.w_msa", "relative_position_bias_table")
        if stage < len(backbone.depths) - 1:
            add(f"stages.{stage}.downsample.norm", *both)
            add(f"stages.{stage}.downsample.reduction", "weight")
            add(f"norm{stage + 1}", *both)
    return names


def read_official(path: Path) -> StateDict:
    """The state dict of a `.pth` file: mmcv's layout (`state_dict` inside) or a bare one. Pickled code never runs.

    Raises:
        InputError: the file is missing, truncated, holds pickled objects other than tensors, or no state dict.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an official checkpoint (.pth)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds pickled objects other than tensors or is no checkpoint, expected a state dict; nothing "
            "in it was executed"
        ) from error
    except Exception as error:  # the reader raises whatever a broken file makes it
        raise InputError(f"{path}: cannot be read as a checkpoint (truncated?), expected a .pth file") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: expected a state dict of tensors, or a dict with one under 'state_dict'")
    return content


def load_official(source: str | Path | StateDict, preset: str) -> HPetrForPoseEstimation:
    """The model `preset` with the weights of an official checkpoint, in evaluation mode.

    K is taken from the checkpoint, so CrowdPose's 14 joints load as well.

    Args:
        source: path of a `.pth` file (mmcv's layout or a bare state dict), or a state dict.
        preset: name of the model, see `HPetrConfig.preset`.
    Raises:
        InputError: wrong file, or a checkpoint of another model: names the first tensor that does not fit.
    """
    name = "state dict" if isinstance(source, dict) else str(source)
    state = source if isinstance(source, dict) else read_official(Path(source))
    overrides: dict = {}
    if (heatmap := state.get("bbox_head.fc_hm.bias")) is not None:
        overrides["num_keypoints"] = len(heatmap)
    config = HPetrConfig.preset(preset, **overrides)
    try:
        weights = from_official(state, config)
    except InputError as error:
        raise InputError(f"{name}: {error}; is it a checkpoint of {preset}?") from None
    model = HPetrForPoseEstimation(config)
    expected = weight_shapes(model.state_dict())
    for key in sorted(expected.keys() | weights.keys()):
        if key not in weights:
            raise InputError(f"{name}: tensor for {key!r} is missing; is it a checkpoint of {preset}?")
        if key not in expected or weights[key].shape != expected[key]:
            raise InputError(
                f"{name}: {key!r} has shape {tuple(weights[key].shape)}, expected {expected.get(key, ())}; is "
                f"it a checkpoint of {preset}?"
            )
    model.load_state_dict(weights, strict=False)
    return model.eval()
