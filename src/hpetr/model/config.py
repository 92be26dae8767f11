"""The configuration of a model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from transformers import AutoConfig, PreTrainedConfig

from hpetr.errors import InputError, first_line, suggestion
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.presets import PRESETS, RESNET_50
from hpetr.poses.skeleton import COCO, Skeleton

# Larger than any useful model, and small enough that a wrong number is refused before it fills the memory.
MAX_SIZE, MAX_LAYERS = 65_536, 1_000
# transformers' options of a call. They are no part of an architecture, and the neck needs feature maps by name.
CALL_OPTIONS = ("return_dict", "output_hidden_states", "output_attentions", "dtype")


@dataclass(frozen=True)
class Range:
    """Values of a field: low <= value <= high, or < high for a share."""

    low: float
    high: float


Size = Annotated[int, Range(1, MAX_SIZE)]
SizeOrZero = Annotated[int, Range(0, MAX_SIZE)]
Layers = Annotated[int, Range(1, MAX_LAYERS)]
LayersOrZero = Annotated[int, Range(0, MAX_LAYERS)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, math.inf)]


def check_field(name: str, kind: Any, value: Any) -> Any:
    """Return a field's value as plain Python, or raise InputError where its annotation does not allow it."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise InputError(f"config: {name} is {value!r}, expected true or false")
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise InputError(f"config: {name} is {value!r}, expected {' or '.join(get_args(kind))}")
    number, limits = get_args(kind)
    wanted = Integral if number is int else Real
    in_range = isinstance(value, wanted) and limits.low <= value <= limits.high
    if isinstance(value, bool) or not in_range or (number is float and value == limits.high):
        expected = f"a whole number in {limits.low}..{limits.high:,}" if number is int else "a number from 0"
        raise InputError(f"config: {name} is {value!r}, expected {'a number in 0..1' if kind == Share else expected}")
    return number(value)


def backbone_config(values: Any) -> PreTrainedConfig:
    """Return the configuration of a backbone, from one or from a dict with `model_type`.

    Raises:
        InputError: an unknown backbone, a value that it refuses, or a number beyond any backbone's.
    """
    if isinstance(values, PreTrainedConfig):
        return values
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise InputError(f"config: backbone_config is {str(values)[:60]!r}, expected a mapping with model_type")
    for name, value in values.items():
        limit = MAX_LAYERS if name in ("depths", "num_hidden_layers", "num_layers") else MAX_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > limit:
                raise InputError(f"config: backbone_config.{name} is {value!r}, expected sizes of a backbone")
    try:
        kept = {name: value for name, value in values.items() if name not in {"model_type", *CALL_OPTIONS}}
        return AutoConfig.for_model(values["model_type"], **kept)
    except Exception as error:  # each configuration checks its values in its own way
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
        raise InputError(f"config: backbone_config: {reason[:300]}") from error


def nano_settings(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all fields of `NanoSettings`, with the given values in place of the defaults; else InputError."""
    settings = asdict(NanoSettings())
    for name, value in (values or {}).items():
        if name not in settings:
            hint = suggestion(name, settings, "expected a field of NanoSettings")
            raise InputError(f"config: nano: unknown field {name!r}, {hint}")
        settings[name] = check_field(f"nano.{name}", Weight if isinstance(settings[name], float) else Size, value)
    return settings


class HPetrConfig(PreTrainedConfig):
    """Everything that defines the architecture and the loss of a model.

    The defaults are petr-r50 on COCO. `HPetrConfig.preset(name)` gives the models of the zoo.

    Args:
        backbone_config: configuration of any transformers backbone (dict with `model_type`, or a config object).
        freeze_batch_norm: keep every BatchNorm of the backbone in eval mode with frozen affine parameters.
        batch_norm_buffers: count the affine parameters of frozen BatchNorms as buffers, as Group Pose does.
        num_frozen_stages: of a ResNet: freeze the stem and this many stages; 0 freezes nothing.
        num_keypoints: K, keypoints of one pose.
        skeleton: `Skeleton.to_dict()`; None takes COCO's for K = 17 and a generic one otherwise.
        d_model: width of the transformer.
        num_heads: attention heads.
        num_feature_levels: feature levels; each level beyond the backbone's maps is a strided one.
        num_points: points per head and level of plain deformable attention.
        pose_prior: number of the finest levels with a prior. For each, the backbone's feature maps start with one of
            half the level's stride, which goes to a `PosePrior` and not to the neck: proposals start from its poses,
            and the decoder's poses from its heatmaps. Needs steps = "size" and queries = "proposals". The heatmap
            loss is then that of its heatmaps.
        neck_norm: "group" as published, over whole maps; "token", a LayerNorm of each cell, which depends neither on
            other cells nor on the padding.
        neck_bias: give the neck's convolutions a bias; with neck_norm = "token" they always have one.
        position_temperature: of the encoder's sine position encoding.
        position_offset: 0.5 encodes the cells' centers, as PETR; 0 their far edges, as Group Pose.
        encoder_layers: number of encoder layers.
        encoder_first_level: the encoder refines this level and coarser ones. It only reads finer levels, which have
            most tokens; RT-DETR (Zhao et al. 2024) spares them likewise.
        encoder_ffn_dim: hidden width of the encoder's FFNs; likewise `decoder_ffn_dim` and `joint_decoder_ffn_dim`.
        decoder: "pose" as PETR, one query for each pose (`PoseDecoder`); "group" as Group Pose, K + 1 queries for each
            pose (`GroupDecoder`).
        decoder_layers: number of pose-decoder layers; `joint_decoder_layers` likewise.
        keypoint_head_dim: hidden width of the keypoint MLPs of proposals and pose decoder.
        queries: "learned" as published, one content and position for each rank; "proposals": the content comes from the
            proposal's token, the position from the pose in every layer, and class logits are changes of the
            proposal's.
        steps: unit of predicted offsets. "logit" as published; "size": proposals in cells, the pose decoder and the
            joint decoder in shares of the pose's half-extent and of a cell (`NanoSettings`), so that a person of the
            same pixels takes the same steps in every image.
        nano: values of `NanoSettings` that differ from its defaults.
        num_queries: one-to-one queries.
        num_one_to_many_queries: further queries of hybrid matching, in training only.
        one_to_many_k: how often each person is repeated for them.
        proposal_k: how often each person is matched to proposals.
        num_poses: T, maximum number of poses of an image at inference.
        leading_columns: class columns before the first class, which are trained as background and never reported. Group
            Pose's heads have one: their columns are COCO's category numbers.
        keypoint_scores: predict the probability that a keypoint is within the distance where its keypoint similarity is
            one half. The published models do not.
        dropout: of FFNs and self-attention.
        deformable_dropout: of the output of every deformable attention.
        cost_class: weight of the class score in the matching cost.
        cost_l1: weight of the distance of keypoints in the matching cost.
        cost_oks: weight of the OKS in the matching cost.
        loss_class: weight of the focal loss (PETR, section 3.4, as the other weights).
        loss_l1: weight of the L1 loss of proposals and pose decoder.
        loss_oks: weight of the pose decoder's OKS loss.
        loss_heatmap: weight of the heatmap loss; 0 for a model without heatmap branch.
        loss_joint_l1: weight of the joint decoder's L1 loss.
        loss_joint_oks: weight of the joint decoder's OKS loss.
        loss_keypoint_score: weight of the loss of keypoint scores.
        loss_place: weight of `Prior.place_loss`, which trains the heatmaps and offsets that keypoints snap to. Without
            it, nothing trains the offsets.
        oks_loss: "log" as published, -log OKS; "linear", 1 - OKS, under which hidden people, whose -log OKS has by far
            the largest gradient, do not outweigh people whose keypoints are nearly right.
        class_target: target of the matched queries. "one" as published; "oks", the OKS of their poses: a score then
            says how good a pose is.
        oks_space: coordinates of the OKS in cost and loss. "pixels" as PETR; "normalized" as Group Pose, where an image
            that is not square weighs the axes differently.
        divisor: of the losses. "keypoints" as PETR: matched queries, and for L1 twice their labelled keypoints;
            "persons" as Group Pose: all persons of the batch, and L1 is a sum over keypoints, also in the cost.
    """

    model_type = "hpetr"

    backbone_config: Any = None  # None, a dict, or after __post_init__ always a PreTrainedConfig
    freeze_batch_norm: bool = True
    batch_norm_buffers: bool = False
    num_frozen_stages: LayersOrZero = 1
    num_keypoints: Size = 17
    skeleton: Any = None  # after __post_init__ always Skeleton.to_dict()
    d_model: Size = 256
    num_heads: Size = 8
    num_feature_levels: Layers = 4
    num_points: Size = 4
    pose_prior: LayersOrZero = 0
    neck_norm: Literal["group", "token"] = "group"
    neck_bias: bool = False
    position_temperature: Weight = 10_000.0
    position_offset: Share = 0.5
    encoder_layers: Layers = 6
    encoder_first_level: LayersOrZero = 0
    encoder_ffn_dim: Size = 1024
    decoder: Literal["pose", "group"] = "pose"
    decoder_layers: Layers = 3
    decoder_ffn_dim: Size = 1024
    joint_decoder_layers: LayersOrZero = 2
    joint_decoder_ffn_dim: Size = 1024
    keypoint_head_dim: Size = 512
    queries: Literal["learned", "proposals"] = "learned"
    steps: Literal["logit", "size"] = "logit"
    nano: Any = None  # None or a dict, after __post_init__ always all fields of NanoSettings
    num_queries: Size = 300
    num_one_to_many_queries: SizeOrZero = 0
    one_to_many_k: Size = 5
    proposal_k: Size = 1
    num_poses: Size = 100
    leading_columns: SizeOrZero = 0
    keypoint_scores: bool = False
    dropout: Share = 0.1
    deformable_dropout: Share = 0.1
    cost_class: Weight = 2.0
    cost_l1: Weight = 70.0
    cost_oks: Weight = 7.0
    loss_class: Weight = 2.0
    loss_l1: Weight = 70.0
    loss_oks: Weight = 2.0
    oks_loss: Literal["log", "linear"] = "log"
    class_target: Literal["one", "oks"] = "one"
    oks_space: Literal["pixels", "normalized"] = "pixels"
    divisor: Literal["keypoints", "persons"] = "keypoints"
    loss_heatmap: Weight = 4.0
    loss_place: Weight = 0.0
    loss_joint_l1: Weight = 80.0
    loss_joint_oks: Weight = 3.0
    loss_keypoint_score: Weight = 1.0

    def __post_init__(self, **kwargs):
        for name, kind in _FIELDS.items():
            setattr(self, name, check_field(name, kind, getattr(self, name)))
        self.backbone_config = backbone_config(RESNET_50 if self.backbone_config is None else self.backbone_config)
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
        if self.decoder == "group" and (self.steps, self.queries) != ("logit", "learned"):
            raise InputError(
                f"config: decoder = 'group' with steps = {self.steps!r} and queries = {self.queries!r}, expected "
                "'logit' and 'learned'"
            )
        if (self.decoder == "group") != (self.joint_decoder_layers == 0):
            raise InputError(
                f"config: joint_decoder_layers = {self.joint_decoder_layers} with decoder = {self.decoder!r}, expected "
                "0 with 'group' and at least 1 with 'pose'"
            )
        if self.pose_prior and (self.steps, self.queries) != ("size", "proposals"):
            raise InputError(
                f"config: pose_prior with steps = {self.steps!r} and queries = {self.queries!r}, expected 'size' and "
                "'proposals'"
            )
        self.nano = nano_settings(self.nano)
        labels_wanted = check_field("num_labels", Size, kwargs.get("num_labels") or 1)
        if self.id2label is None:
            # Names of our own: transformers does not save its default ones of two labels.
            names = ["person"] if labels_wanted == 1 else [f"class {i}" for i in range(labels_wanted)]
            self.id2label, self.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        try:
            super().__post_init__(**kwargs)
            labels = sorted(self.id2label or {})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise InputError(f"config: {first_line(error)}") from error
        if not labels or labels != list(range(len(labels))):
            raise InputError(f"config: id2label has the labels {labels}, expected 0, 1, 2, ...")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
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


# Annotations of this file are objects, not strings: they are what `check_field` reads.
_FIELDS = {
    name: kind
    for name, kind in HPetrConfig.__annotations__.items()
    if get_origin(kind) in (Annotated, Literal) or kind is bool
}
