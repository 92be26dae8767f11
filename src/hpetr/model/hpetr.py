"""The whole model: pixels to poses, and with labels to losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from hpetr.errors import InputError
from hpetr.model.attention import DeformableAttention
from hpetr.model.backbone import FeatureExtractor
from hpetr.model.config import HPetrConfig
from hpetr.model.criterion import Criterion, GroupCriterion
from hpetr.model.encoder import Encoder
from hpetr.model.grid import Grid, make_grid
from hpetr.model.group_decoder import GroupDecoder
from hpetr.model.groups import QueryGroup, query_groups
from hpetr.model.host import to_device
from hpetr.model.joint_decoder import JointDecoder
from hpetr.model.matching import check_labels, make_targets
from hpetr.model.nano.losses import place_losses
from hpetr.model.nano.prior import GuidedProposals, PosePrior, Prior
from hpetr.model.nano.queries import PriorQueries, ProposalQueries
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.nano.steps import SizeSteps
from hpetr.model.pose_decoder import PoseDecoder
from hpetr.model.proposals import Predictions, Proposals
from hpetr.model.queries import LearnedQueries, Queries
from hpetr.model.stages import BACKBONE, ENCODER, JOINT_DECODER, POSE_DECODER, PROPOSALS, stage
from hpetr.model.steps import LogitSteps, Steps

CLASS_PRIOR, HEATMAP_PRIOR = 0.01, 0.1


@dataclass
class HPetrOutput(ModelOutput):
    """The model's output; coordinates are x, y with 1 = the unpadded image's width and height.

    N = one-to-one queries, T = `config.num_poses`, S = tokens, C = classes, K = keypoints.

    Attributes:
        loss: scalar, with labels.
        loss_dict: its weighted terms, which sum to it.
        scores: (B, T) class probability, best first. None while training with labels, where the joint decoder refines
            the matched poses instead.
        poses: (B, T, K, 2) after the joint decoder; None as `scores`.
        pose_labels: (B, T); None as `scores`.
        keypoint_scores: (B, T, K) probability that a keypoint is right, with `config.keypoint_scores`.
        logits: (B, N, C) of the last pose-decoder layer.
        keypoints: (B, N, K, 2) of the last pose-decoder layer.
        decoder_logits: (layers, B, N, C).
        decoder_keypoints: (layers, B, N, K, 2).
        proposal_logits: (B, S, C).
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    scores: Tensor | None = None
    poses: Tensor | None = None
    pose_labels: Tensor | None = None
    keypoint_scores: Tensor | None = None
    logits: Tensor | None = None
    keypoints: Tensor | None = None
    decoder_logits: Tensor | None = None
    decoder_keypoints: Tensor | None = None
    proposal_logits: Tensor | None = None


def build_steps(config: HPetrConfig) -> Steps:
    """Return the steps that `config.steps` names."""
    return LogitSteps() if config.steps == "logit" else SizeSteps(NanoSettings(**config.nano))


def build_queries(config: HPetrConfig, groups: Sequence[QueryGroup]) -> Queries:
    """Return the queries that `config.queries` and `config.pose_prior` name."""
    if config.queries == "learned":
        return LearnedQueries(config, groups)
    if config.pose_prior:
        return PriorQueries(config, groups, NanoSettings(**config.nano))
    return ProposalQueries(config, groups)


def build_pose_decoder(config: HPetrConfig, groups: Sequence[QueryGroup]) -> PoseDecoder | GroupDecoder:
    """Return the decoder that `config.decoder` names."""
    if config.decoder == "group":
        return GroupDecoder(config)
    return PoseDecoder(config, build_queries(config, groups), build_steps(config))


class HPetrForPoseEstimation(PreTrainedModel):
    """PETR (Shi et al., CVPR 2022) and H-PETR (Jia et al., arXiv 2207.13080): the poses of all people at once, no NMS.

    Args:
        config: sizes, parts and loss weights.
        groups: the query groups; None takes those of the configuration.
    """

    config: HPetrConfig
    config_class = HPetrConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: HPetrConfig, groups: Sequence[QueryGroup] | None = None):
        super().__init__(config)
        self.groups = query_groups(config) if groups is None else list(groups)
        self.criterion = (GroupCriterion if config.decoder == "group" else Criterion)(config)
        self.backbone = FeatureExtractor(config)
        self.level_embedding = nn.Embedding(config.num_feature_levels, config.d_model)
        self.encoder = Encoder(config, config.encoder_layers, config.num_feature_levels, config.encoder_first_level)
        self.pose_decoder = build_pose_decoder(config, self.groups)
        self.joint_decoder = JointDecoder(config, build_steps(config)) if config.joint_decoder_layers else None
        if self.has_heatmap_branch(config):
            self.heatmap_encoder = Encoder(config, 1, 1)
            self.heatmap_head = nn.Linear(config.d_model, config.num_keypoints)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Visit modules without weights of their own, too, which transformers skips in code that is not its own.

        They hold the exceptions of `_init_weights`, which writes through `transformers.initialization` alone and so
        spares loaded weights.
        """
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as published: Xavier-uniform matrices, zero biases, normal(0, 1) embeddings, and exceptions."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, DeformableAttention):
            init.zeros_(module.sampling_offsets.weight)
            init.copy_(module.sampling_offsets.bias, module.initial_offsets())
            init.zeros_(module.attention_weights.weight)
        elif isinstance(module, PoseDecoder):
            *layers, proposals = module.class_heads
            for head in module.class_heads:
                init.constant_(cast("Tensor", head.bias), math.log(CLASS_PRIOR / (1 - CLASS_PRIOR)))
            # Heads whose output is added to logits start with no change.
            for head in (layers if self.config.queries == "proposals" else []) + (
                [proposals] if self.config.pose_prior else []
            ):
                init.zeros_(cast("Tensor", head.weight))
                init.zeros_(cast("Tensor", head.bias))
            for head in module.keypoint_heads:
                init.zeros_(cast("Tensor", cast(nn.Sequential, head)[-1].weight))
        elif isinstance(module, GroupDecoder):
            # The heads keep PyTorch's own initial values, as published; heads of a kind start as copies of one.
            for heads in (module.class_heads, module.keypoint_heads[:-1], module.keypoint_heads[-1:]):
                for layer in heads[0].modules():
                    if isinstance(layer, nn.Linear):
                        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
                        init.uniform_(layer.bias, -(layer.in_features**-0.5), layer.in_features**-0.5)
                for head in heads:
                    for own, first in zip(head.parameters(), heads[0].parameters(), strict=True):
                        init.copy_(own, first)
            for head in module.class_heads:
                init.constant_(cast("Tensor", head.bias), math.log(CLASS_PRIOR / (1 - CLASS_PRIOR)))
            for head in module.keypoint_heads:
                init.zeros_(cast("Tensor", cast(nn.Sequential, head)[-1].weight))
                init.zeros_(cast("Tensor", cast(nn.Sequential, head)[-1].bias))
            for embedding in (module.keypoint_embedding, module.instance_embedding):
                init.xavier_uniform_(embedding.weight)
        elif isinstance(module, PosePrior):
            init.zeros_(module.projection.weight)
            init.copy_(cast("Tensor", module.projection.bias), module.initial_bias())
        elif isinstance(module, JointDecoder):
            for head in [*module.heads, *([] if module.score_head is None else [module.score_head])]:
                init.zeros_(cast("Tensor", cast(nn.Sequential, head)[-1].weight))
        elif isinstance(module, HPetrForPoseEstimation) and self.has_heatmap_branch(module.config):
            init.normal_(module.heatmap_head.weight, std=0.01)
            init.constant_(module.heatmap_head.bias, math.log(HEATMAP_PRIOR / (1 - HEATMAP_PRIOR)))

    @staticmethod
    def has_heatmap_branch(config: HPetrConfig) -> bool:
        """Return whether the heatmap loss has a branch of its own, as published, and is not of the prior's heatmaps."""
        return config.loss_heatmap > 0 and not config.pose_prior

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return None: there are no tokens to embed. accelerate's FSDP asks, and transformers would raise."""
        return None

    @staticmethod
    def padding(pixel_mask: Tensor | None) -> Tensor | None:
        """Return the padding (B, H, W), true outside the image; None without padding.

        A batch without padding spares h-petr-nano 8% of its time. Only the CPU looks: a look at a GPU's mask would wait
        for all work that is queued there.
        """
        if pixel_mask is None:
            return None
        if pixel_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(pixel_mask.all()):
            return None
        return pixel_mask == 0

    def tokenize(self, pixel_values: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Grid, Prior | None]:
        """Return tokens (B, S, D), their positions (B or 1, S, D), their grid, and the prior of a model that has one.

        Args:
            pixel_values: (B, 3, H, W).
            padding: (B, H, W), true outside the image; None without padding.
        """
        with stage(BACKBONE):
            maps, masks, prior = self.backbone(pixel_values, padding)
        shares = None
        if padding is not None and self.config.steps == "size":
            inside = ~padding
            shares = torch.stack([inside[:, 0].float().mean(1), inside[:, :, 0].float().mean(1)], -1)  # (B, 2)
        config = self.config
        grid = make_grid(maps, masks, shares, temperature=config.position_temperature, offset=config.position_offset)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # (B, S, D)
        levels = torch.cat(
            [
                embedding.expand(height * width, -1)
                for embedding, (height, width) in zip(self.level_embedding.weight, grid.spatial_shapes, strict=True)
            ]
        )  # (S, D)
        return tokens, (grid.positions + levels).to(levels.dtype), grid, prior

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Grid, Prior | None]:
        """Return the memory (B, S, D) of pixels (B, 3, H, W) and mask (B, H, W), its grid, and the prior if any."""
        tokens, positions, grid, prior = self.tokenize(pixel_values, self.padding(pixel_mask))
        with stage(ENCODER):
            return self.encoder(tokens, positions, grid), grid, prior

    def propose(self, memory: Tensor, grid: Grid, prior: Prior | None) -> Proposals:
        """Return the proposals of memory (B, S, D), guided by the prior of a model that has one."""
        with stage(PROPOSALS):
            proposals = self.pose_decoder.propose(memory, grid)
            return proposals if prior is None else prior.guide(proposals)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
    ) -> HPetrOutput:
        """Estimate the poses of all people.

        Args:
            pixel_values: (B, 3, H, W) normalized RGB, each image in the top left corner.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None when nothing is padded.
            labels: B dicts with `keypoints` (n, K, 3) x, y, visibility in pixels of the unpadded image, `boxes`
                (n, 4) xyxy, `areas` (n,) pixels^2, `class_labels` (n,), and optionally `ignore_boxes` (m, 4): regions
                that are neither person nor background.

        Raises:
            InputError: labels or mask do not have these shapes, or the pixels are no floats.
            FloatingPointError: a matching cost is not finite.
        """
        batch, _, height, width = pixel_values.shape
        if pixel_mask is not None and pixel_mask.shape != (batch, height, width):
            raise InputError(f"pixel_mask: shape {tuple(pixel_mask.shape)}, expected {(batch, height, width)}")
        if not pixel_values.is_floating_point():
            raise InputError(
                f"pixel_values: {pixel_values.dtype}, expected normalized floats (PoseCollator.normalize makes them)"
            )
        if labels is not None:
            check_labels(labels, batch, self.config.num_keypoints)
        memory, grid, prior = self.encode(pixel_values, pixel_mask)
        proposals = self.propose(memory, grid, prior)
        groups = self.groups[:1] if labels is None else self.groups
        with stage(POSE_DECODER):
            layers, sizes = self.pose_decoder(memory, grid, proposals, groups)
        one_to_one = Predictions(layers.logits[:, :, : sizes[0]], layers.keypoints[:, :, : sizes[0]])
        output = HPetrOutput(
            logits=one_to_one.logits[-1],
            keypoints=one_to_one.keypoints[-1],
            decoder_logits=one_to_one.logits,
            decoder_keypoints=one_to_one.keypoints,
            proposal_logits=proposals.logits,
        )
        if labels is not None:
            targets = make_targets(labels, self.image_sizes(pixel_values, pixel_mask))
            output.loss_dict = self.criterion(
                proposals,
                layers,
                groups,
                sizes,
                targets,
                width,
                refine=partial(self.refine, memory, grid),
                heatmap=partial(self.heatmap, memory, grid, prior),
                places=self.places(proposals, grid),
            )
            output.loss = torch.stack(list(output.loss_dict.values())).sum()
        if labels is None or not self.training:
            refined = self.refine_best(memory, grid, one_to_one)
            output.scores, output.poses, output.pose_labels, output.keypoint_scores = refined
        return output

    @staticmethod
    def image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Return the width and height (B, 2) of the unpadded images."""
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            size = to_device(torch.tensor([[width, height]], dtype=torch.float32), pixel_values.device)
            return size.expand(batch, 2)
        inside = pixel_mask != 0
        return torch.stack([inside[:, 0].sum(-1), inside[:, :, 0].sum(-1)], -1).float()

    def refine_best(
        self, memory: Tensor, grid: Grid, predictions: Predictions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the best T poses, refined by the joint decoder.

        Returns:
            Scores (B, T), poses (B, T, K, 2), labels (B, T), and keypoint scores (B, T, K) or None.
        """
        scores = predictions.logits[-1][..., self.config.leading_columns :].sigmoid()  # (B, N, C)
        classes = scores.shape[-1]
        flat = scores.flatten(1)
        best, index = flat.topk(torch.sym_min(self.config.num_poses, flat.shape[1]), dim=1)  # (B, T)
        query = torch.div(index, classes, rounding_mode="floor")[..., None, None]
        chosen = predictions.keypoints[-1].gather(1, query.expand(-1, -1, *predictions.keypoints.shape[-2:]))
        poses, logits = self.refine(memory, grid, chosen)
        keypoint_scores = None if logits is None else logits.sigmoid()
        # `SizeSteps` may lead out of the image.
        return best, poses[-1].clamp(0, 1), index % classes, keypoint_scores

    def refine(self, memory: Tensor, grid: Grid, poses: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the joint decoder's poses (layers, B, T, K, 2) and keypoint logits for poses (B, T, K, 2).

        A model without a joint decoder returns the poses themselves, and None.
        """
        if self.joint_decoder is None:
            return poses[None], None
        with stage(JOINT_DECODER):
            return self.joint_decoder(memory, grid, poses)

    def places(self, proposals: Proposals, grid: Grid) -> Callable[..., dict[str, Tensor]] | None:
        """Return the loss of the places that a prior gives to keypoints, for a model that has one and this loss."""
        if not self.config.loss_place or not isinstance(proposals, GuidedProposals):
            return None
        return partial(place_losses, proposals, grid, self.config)

    def heatmap(self, memory: Tensor, grid: Grid, prior: Prior | None) -> tuple[Tensor, Tensor | None]:
        """Return heatmap logits (B, K, H, W) and padding (B, H, W), or None without padding.

        They come from the heatmap branch, which sees the finest level alone and no position, as published; or from the
        prior of a model that has one.
        """
        if prior is not None:
            return prior.finest_heatmap(grid)
        first = grid.first_level()
        height, width = grid.spatial_shapes[0]
        tokens = memory[:, : height * width]
        features = self.heatmap_encoder(tokens, torch.zeros_like(tokens[:1]), first)
        logits = self.heatmap_head(features).transpose(1, 2).unflatten(-1, (height, width))
        return logits, None if first.padding_mask is None else first.padding_mask.unflatten(-1, (height, width))
