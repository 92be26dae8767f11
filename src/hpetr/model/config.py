"""The configuration of a model, and the presets of the zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hpetr.errors import InputError, suggestion
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.presets import PRESETS, RESNET_50
from hpetr.poses.skeleton import COCO, Skeleton

# Beyond every model that somebody will train, and low enough that a wrong number is told before it takes all memory.
MOST, MOST_LAYERS = 65_536, 1_000
# Of transformers, about what a call gives: no part of an architecture, and the neck needs feature maps by name.
SWITCHES = ("return_dict", "output_hidden_states", "output_attentions", "dtype")
MAY_BE_ZERO = {"num_frozen_stages", "num_one_to_many_queries", "pose_prior", "encoder_first_level"}
# What the published models have comes first.
CHOICES = {
    "neck_norm": ("group", "token"),
    "queries": ("learned", "proposals"),
    "steps": ("logit", "size"),
    "oks_loss": ("log", "linear"),
    "class_target": ("one", "oks"),
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raise InputError for a number or switch of `HPetrConfig` that is none, or out of its range."""
    for name, value in values.items():
        kind = HPetrConfig.__annotations__[name]
        if kind == "int":
            most = MOST_LAYERS if name.endswith("_layers") or name.endswith("_levels") else MOST
            _check_whole(name, value, 0 if name in MAY_BE_ZERO else 1, most)
        elif kind == "str" and value not in CHOICES[name]:
            raise InputError(f"config: {name} is {value!r}, expected {' or '.join(CHOICES[name])}")
        elif kind == "bool" and not isinstance(value, bool):
            raise InputError(f"config: {name} is {value!r}, expected true or false")
        elif kind == "float":
            share = name.endswith("dropout")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < (1 if share else math.inf):
                raise InputError(f"config: {name} is {value!r}, expected a number {'in 0..1' if share else 'from 0'}")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"config: {name} is {value!r}, expected a whole number in {least}..{most:,}")


def _backbone(values: Any) -> PreTrainedConfig:
    """The configuration of a backbone that is one already, or of a dict with `model_type`.

    Raises:
        InputError: no such backbone, a value that it refuses, or a number that no backbone has.
    """
    if isinstance(values, PreTrainedConfig):
        return values
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise InputError(f"config: backbone_config is {str(values)[:60]!r}, expected a mapping with model_type")
    for name, value in values.items():
        layers = name in ("depths", "num_hidden_layers", "num_layers")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > (MOST_LAYERS if layers else MOST):
                raise InputError(f"config: backbone_config.{name} is {value!r}, expected sizes of a backbone")
    try:
        kept = {name: value for name, value in values.items() if name not in {"model_type", *SWITCHES}}
        return AutoConfig.for_model(values["model_type"], **kept)
    except Exception as error:  # each configuration checks its values in its own way
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        raise InputError(f"config: backbone_config: {reason[:300]}") from error


def _nano_settings(values: Any) -> dict[str, Any]:
    """Return all fields of `NanoSettings`, the given ones replaced; else InputError."""
    known = asdict(NanoSettings())
    for name, value in (values or {}).items():
        if name not in known:
            hint = suggestion(name, known, "expected a field of NanoSettings")
            raise InputError(f"config: nano: unknown field {name!r}, {hint}")
        kind = type(known[name])
        if type(value) is not kind or not 0 < value < math.inf:
            raise InputError(f"config: nano.{name} is {value!r}, expected a positive {kind.__name__}")
    return known | (values or {})


class HPetrConfig(PreTrainedConfig):
    """Everything that defines the architecture and the loss of a model.

    The defaults are petr-r50 on COCO. `HPetrConfig.preset(name)` gives the models of the zoo.

    Args:
        backbone_config: configuration of any transformers backbone (dict with `model_type`, or a config object).
        freeze_batch_norm: keep every BatchNorm of the backbone in eval mode with frozen affine parameters.
        num_frozen_stages: ResNet only: freeze the stem and this many stages; 0 freezes nothing.
        num_keypoints: K, joints of one pose.
        skeleton: `Skeleton.to_dict()`; None takes COCO's for K = 17 and a generic one otherwise.
        d_model, num_heads, num_feature_levels: width, attention heads, feature levels (one more than the backbone
            gives adds a strided level).
        encoder_first_level: the encoder leaves tokens of finer levels as the neck gives them, and reads them. Most
            tokens are the finest level's; RT-DETR (Zhao et al. 2024) spares them likewise.
        num_points: points per head and level of plain deformable attention.
        pose_prior: how many of the finest levels have one: of the backbone's feature maps, one of half the level's
            stride precedes the level's own, and goes to a `PosePrior` and not to the neck: proposals start from
            what it says, and the pose decoder's poses from its heatmaps; needs steps =
            "size" and queries = "proposals". The heatmap loss is then that of its heatmaps.
        neck_norm: "group" as published, over whole maps; "token", a LayerNorm of each cell: what a map says of one cell
            then depends neither on the others nor on the padding.
        keypoint_head_dim: hidden width of the keypoint MLPs of proposals and pose decoder.
        queries: "learned" as published, one content and position a rank; "proposals": the content comes from the
            token that proposed the pose, the position, in every layer, from the pose itself, and class logits are
            changes of the proposal's.
        steps: in what the heads count. "logit" as published, of a share of the image; "size": proposals in cells, the
            pose decoder in tenths of half the pose's extent, the joint decoder in quarters of the finest level's cells.
            A person of the same pixels then takes the same steps wherever it stands and however large the image is.
        num_queries: one-to-one queries. num_one_to_many_queries: extra queries of hybrid matching, training only.
        one_to_many_k: how often each ground truth is repeated for them.
        proposal_k: how often each ground truth is matched to proposals.
        num_poses: T, how many poses go through the joint decoder at inference, best first.
        keypoint_scores: give each joint a score of its own, which the published models do not: the probability that it
            is where OKS counts it as at least half right.
        dropout: of FFNs and self-attention. deformable_dropout: of the output of every deformable attention.
        cost_*: weights of the matching cost. loss_*: weights of the losses (METHOD: PETR section 3.4, H-DETR). With
            loss_heatmap = 0 the model has no heatmap branch.
        class_target: of the pose decoder's matched queries. "one" as published; "oks", the OKS of their poses: a score
            then says how good a pose is.
        oks_loss: "log" as published, -log OKS; "linear", 1 - OKS: people that nobody sees, whose -log OKS has by far
            the largest gradient, then do not outweigh those whose joints are nearly right.
    """

    model_type = "hpetr"

    backbone_config: Any = None  # None, a dict, or after __post_init__ always a PreTrainedConfig
    freeze_batch_norm: bool = True
    num_frozen_stages: int = 1
    num_keypoints: int = 17
    skeleton: Any = None  # after __post_init__ always Skeleton.to_dict()
    d_model: int = 256
    num_heads: int = 8
    num_feature_levels: int = 4
    num_points: int = 4
    pose_prior: int = 0
    neck_norm: str = "group"
    encoder_layers: int = 6
    encoder_first_level: int = 0
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 3
    decoder_ffn_dim: int = 1024
    joint_decoder_layers: int = 2
    joint_decoder_ffn_dim: int = 1024
    keypoint_head_dim: int = 512
    queries: str = "learned"
    steps: str = "logit"
    nano: Any = None  # None or a dict, after __post_init__ always all fields of NanoSettings
    num_queries: int = 300
    num_one_to_many_queries: int = 0
    one_to_many_k: int = 5
    proposal_k: int = 1
    num_poses: int = 100
    keypoint_scores: bool = False
    dropout: float = 0.1
    deformable_dropout: float = 0.1
    cost_class: float = 2.0
    cost_l1: float = 70.0
    cost_oks: float = 7.0
    loss_class: float = 2.0
    loss_l1: float = 70.0
    loss_oks: float = 2.0
    oks_loss: str = "log"
    class_target: str = "one"
    loss_heatmap: float = 4.0
    loss_joint_l1: float = 80.0
    loss_joint_oks: float = 3.0
    loss_keypoint_score: float = 1.0

    def __post_init__(self, **kwargs):
        check_numbers({name: getattr(self, name) for name in HPetrConfig.__annotations__})
        self.backbone_config = _backbone(RESNET_50 if self.backbone_config is None else self.backbone_config)
        if self.skeleton is None:
            skeleton = COCO if self.num_keypoints == COCO.num_keypoints else Skeleton.generic(self.num_keypoints)
            self.skeleton = skeleton.to_dict()
        names = self.skeleton.get("names") if isinstance(self.skeleton, dict) else None
        if isinstance(names, list | tuple) and len(names) != self.num_keypoints:
            raise InputError(f"config: skeleton has {len(names)} joints, expected num_keypoints = {self.num_keypoints}")
        Skeleton.from_dict(self.skeleton)
        if self.d_model % self.num_heads or self.d_model % 4:
            raise InputError(
                f"config: d_model = {self.d_model}, expected a multiple of 4 and of num_heads = {self.num_heads}"
            )
        for name in ("pose_prior", "encoder_first_level"):
            if getattr(self, name) > self.num_feature_levels - (name == "encoder_first_level"):
                raise InputError(
                    f"config: {name} = {getattr(self, name)} with num_feature_levels = {self.num_feature_levels}"
                )
        if self.pose_prior and (self.steps, self.queries) != ("size", "proposals"):
            raise InputError(
                f"config: pose_prior with steps = {self.steps!r} and queries = {self.queries!r}, expected 'size' and "
                "'proposals'"
            )
        self.nano = _nano_settings(self.nano)
        labels_wanted = kwargs.get("num_labels") or 1
        _check_whole("num_labels", labels_wanted, 1, MOST)
        if self.id2label is None:
            # Names of our own: transformers does not save its default ones of two labels.
            names = ["person"] if labels_wanted == 1 else [f"class {i}" for i in range(labels_wanted)]
            self.id2label, self.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        try:
            super().__post_init__(**kwargs)
            labels = sorted(self.id2label or {})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"config: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
        if not labels or labels != list(range(len(labels))):
            raise InputError(f"config: id2label has the labels {labels}, expected 0, 1, 2, ...")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> HPetrConfig:
        """The configuration of a model of the zoo, e.g. `HPetrConfig.preset("h-petr-r50", num_keypoints=14)`.

        Raises:
            InputError: unknown name or unknown override.
        """
        if name not in PRESETS:
            hint = suggestion(name, PRESETS, f"expected one of {', '.join(PRESETS)}")
            raise InputError(f"preset: unknown name {name!r}, {hint}")
        known = {field for base in cls.__mro__ for field in getattr(base, "__annotations__", {})} | {"num_labels"}
        if unknown := sorted(set(overrides) - known):
            hint = suggestion(unknown[0], known, "expected a field of HPetrConfig")
            raise InputError(f"preset {name}: unknown option {unknown[0]!r}, {hint}")
        values = {**PRESETS[name], **overrides}
        if "skeleton" not in overrides and values.get("num_keypoints") != PRESETS[name].get("num_keypoints"):
            values.pop("skeleton", None)  # the preset's is of another K
        return cls(**values)
