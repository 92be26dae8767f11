"""Our names of tensors and the official ones.

In these tables "#" is a number, "#+1" the same plus 1, and "*" the rest of the name. The first row that fits counts.
Several of our tensors with one official name are its equal parts, in the table's order. Two official names of one
tensor of ours, with a space between them, hold the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig

Table = Mapping[str, str]

# PETR and H-PETR name modules as mmcv does.
ENCODER_LAYER = {
    "attention.*": "attentions.0.*",
    "attention_norm.*": "norms.0.*",
    "ffn.linear1.*": "ffns.0.layers.0.0.*",
    "ffn.linear2.*": "ffns.0.layers.1.*",
    "ffn_norm.*": "norms.1.*",
}
DECODER_LAYER = {
    **ENCODER_LAYER,
    "self_attention.*": "attentions.0.attn.*",
    "self_attention_norm.*": "norms.0.*",
    "attention.*": "attentions.1.*",
    "attention_norm.*": "norms.1.*",
    "ffn_norm.*": "norms.2.*",
}
PETR_STACKS = (
    ("encoder", "encoder", ENCODER_LAYER),
    ("heatmap_encoder", "hm_encoder", ENCODER_LAYER),
    ("pose_decoder", "decoder", DECODER_LAYER),
    ("joint_decoder", "refine_decoder", DECODER_LAYER),
)
PETR = {
    f"{ours}.layers.#.{part}": f"bbox_head.transformer.{official}.layers.#.{name}"
    for ours, official, layer in PETR_STACKS
    for part, name in layer.items()
} | {
    "level_embedding.weight": "bbox_head.transformer.level_embeds",
    "pose_decoder.proposal_proj.*": "bbox_head.transformer.enc_output.*",
    "pose_decoder.proposal_norm.*": "bbox_head.transformer.enc_output_norm.*",
    "pose_decoder.query_embedding.*": "bbox_head.query_embedding.*",
    "pose_decoder.class_heads.*": "bbox_head.cls_branches.*",
    "pose_decoder.keypoint_heads.*": "bbox_head.kpt_branches.*",
    "joint_decoder.query_embedding.*": "bbox_head.transformer.refine_query_embedding.*",
    "joint_decoder.heads.*": "bbox_head.refine_kpt_branches.*",
    "heatmap_head.*": "bbox_head.fc_hm.*",
}
# The zoo's necks have three backbone levels and one extra.
for level, name in enumerate(("convs.0", "convs.1", "convs.2", "extra_convs.0")):
    PETR[f"backbone.neck.convs.{level}.weight"] = f"neck.{name}.conv.weight"
    PETR[f"backbone.neck.norms.{level}.*"] = f"neck.{name}.gn.*"
GROUP_LAYER = {
    "within_attention.*": "within_attn.*",
    "within_norm.*": "within_norm.*",
    "across_attention.*": "across_attn.*",
    "across_norm.*": "across_norm.*",
    "attention.*": "cross_attn.*",
    "attention_norm.*": "norm1.*",
    "ffn.linear#.*": "linear#.*",
    "ffn_norm.*": "norm2.*",
}


def group_pose(layers: int) -> Table:
    """Return the names of Group Pose with this number of decoder layers; its heads are registered twice."""
    ours, official = "pose_decoder.", "transformer."
    rows = {f"layers.#.{part}": f"decoder.layers.#.{name}" for part, name in GROUP_LAYER.items()}
    rows |= {
        "proposal_proj.*": "enc_output.*",
        "proposal_norm.*": "enc_output_norm.*",
        "keypoint_embedding.*": "keypoint_embedding.*",
        "instance_embedding.*": "instance_embedding.*",
        f"class_heads.{layers}.*": "enc_out_class_embed.*",
    }
    # Official MLPs count their linear layers alone, ours the activations between them too.
    rows |= {f"keypoint_heads.{layers}.{2 * i}.*": f"enc_pose_embed.layers.{i}.*" for i in range(4)}
    rows |= {f"position_head.{2 * i}.*": f"decoder.half_pose_ref_point_head.layers.{i}.*" for i in range(2)}
    heads = {"class_heads.#.*": "class_embed.#.*"}
    heads |= {f"keypoint_heads.#.{2 * i}.*": f"pose_embed.#.layers.{i}.*" for i in range(3)}
    return {
        "encoder.layers.#.attention.*": "transformer.encoder.layers.#.self_attn.*",
        "encoder.layers.#.attention_norm.*": "transformer.encoder.layers.#.norm1.*",
        "encoder.layers.#.ffn.linear#.*": "transformer.encoder.layers.#.linear#.*",
        "encoder.layers.#.ffn_norm.*": "transformer.encoder.layers.#.norm2.*",
        "level_embedding.weight": "transformer.level_embed",
        "backbone.neck.convs.#.*": "input_proj.#.0.*",
        "backbone.neck.norms.#.*": "input_proj.#.1.*",
        **{ours + part: official + name for part, name in rows.items()},
        **{ours + part: f"{name} {official}decoder.{name}" for part, name in heads.items()},
    }


# torchvision's
RESNET = {
    "embedder.embedder.convolution.*": "conv1.*",
    "embedder.embedder.normalization.*": "bn1.*",
    "encoder.stages.#.layers.#.layer.#.convolution.*": "layer#+1.#.conv#+1.*",
    "encoder.stages.#.layers.#.layer.#.normalization.*": "layer#+1.#.bn#+1.*",
    "encoder.stages.#.layers.#.shortcut.convolution.*": "layer#+1.#.downsample.0.*",
    "encoder.stages.#.layers.#.shortcut.normalization.*": "layer#+1.#.downsample.1.*",
}


def swin(projection: str, block: str, attention: str, linear1: str, linear2: str) -> Table:
    """Return the names of a Swin, the authors' or mmdet's, which name five modules differently."""
    ours, name = "swin.encoder.layers.#.blocks.#.", f"{block}.#.blocks.#."
    return {
        "swin.embeddings.patch_embeddings.projection.*": f"patch_embed.{projection}.*",
        "swin.embeddings.norm.*": "patch_embed.norm.*",
        f"{ours}layernorm_before.*": f"{name}norm1.*",
        f"{ours}layernorm_after.*": f"{name}norm2.*",
        f"{ours}mlp.fc1.*": f"{name}{linear1}.*",
        f"{ours}mlp.fc2.*": f"{name}{linear2}.*",
        f"{ours}attention.relative_position_bias.*": f"{name}{attention}.*",
        **{f"{ours}attention.{letter}_proj.*": f"{name}{attention}.qkv.*" for letter in "qkv"},
        f"{ours}attention.o_proj.*": f"{name}{attention}.proj.*",
        "swin.encoder.layers.#.downsample.*": f"{block}.#.downsample.*",
        "hidden_states_norms.stage#.*": "norm#-1.*",
    }


BODY = "backbone.body."
# By `config.decoder` and backbone: prefix and names of the backbone.
BACKBONES = {
    ("pose", "resnet"): ("backbone.", RESNET),
    ("pose", "swin"): (
        "backbone.",
        swin("projection", "stages", "attn.w_msa", "ffn.layers.0.0", "ffn.layers.1"),
    ),
    ("group", "resnet"): ("backbone.0.body.", RESNET),
    ("group", "swin"): ("backbone.0.", swin("proj", "layers", "attn", "mlp.fc1", "mlp.fc2")),
}
# mmdet's patch merging: official tensors whose last dimension has the order of `unfold_order`.
UNFOLDED = re.compile(r"backbone\.stages\.\d+\.downsample\..+")
# Settings in which a checkpoint may differ from its preset, and tensors of that length, official and ours.
SIZES = {
    "num_keypoints": (
        "bbox_head.fc_hm.bias",
        "heatmap_head.bias",
        "transformer.keypoint_embedding.weight",
        "pose_decoder.keypoint_embedding.weight",
    ),
    "num_labels": ("bbox_head.cls_branches.0.bias", "pose_decoder.class_heads.0.bias"),
}


def is_official(config: HPetrConfig) -> bool:
    """Return whether the official code has a model with such a decoder and backbone."""
    return (config.decoder, config.backbone_config.model_type) in BACKBONES


def is_weight(name: str) -> bool:
    """Return whether a tensor is one, and not Swin's window indices or the step counter of a batch norm."""
    return not name.endswith(("relative_position_index", "num_batches_tracked"))


def name_pairs(names: Iterable[str], table: Table) -> Iterator[tuple[str, str]]:
    """Yield the official name and ours of every weight that the table has, in the table's order."""
    left = list(filter(is_weight, names))
    for ours, official in table.items():
        pattern = re.compile(re.escape(ours).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))
        found = {name: match.groups() for name in left if (match := pattern.fullmatch(name))}
        left = [name for name in left if name not in found]
        for name, parts in found.items():
            yield from ((_filled(template, parts), name) for template in official.split())


def _filled(template: str, parts: Iterable[str]) -> str:
    """Return an official name with the parts of ours in the places of its "#" and "*"."""
    rest = iter(parts)

    def fill(token: re.Match[str]) -> str:
        part = next(rest)
        return str(int(part) + int(token[1])) if token[1] else part

    return re.sub(r"#([+-]\d)?|\*", fill, template)


def tensor_pairs(names: Iterable[str], config: HPetrConfig) -> dict[str, list[str]]:
    """Return by official name our tensors, which are its equal parts.

    Args:
        names: of the model's tensors.
        config: of the model.

    Raises:
        InputError: the official code has no such model.
    """
    kind = config.backbone_config.model_type
    if not is_official(config):
        raise InputError(f"convert: no official model has a {kind} backbone, expected a ResNet or Swin preset")
    prefix, backbone = BACKBONES[config.decoder, kind]
    table = dict(PETR if config.decoder == "pose" else group_pose(config.decoder_layers))
    table |= {f"{BODY}{ours}": f"{prefix}{official}" for ours, official in backbone.items()}
    places: dict[str, list[str]] = {}
    left = dict.fromkeys(filter(is_weight, names))
    for official, ours in name_pairs(left.copy(), table):
        places.setdefault(official, []).append(ours)
        left.pop(ours, None)
    if left or config.steps != "logit":
        raise InputError(f"convert: no official model has {next(iter(left), f'steps = {config.steps!r}')}")
    return places
