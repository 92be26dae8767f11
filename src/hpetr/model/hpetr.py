"""The whole model: pixels to poses, and with labels to losses."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from hpetr.errors import InputError
from hpetr.model.attention import DeformableAttention
from hpetr.model.backbone import FeatureExtractor
from hpetr.model.config import HPetrConfig
from hpetr.model.decoders import JointDecoder, PoseDecoder, Predictions, Proposals
from hpetr.model.encoder import Encoder, Grid, make_grid
from hpetr.model.host import to_device
from hpetr.model.losses import (
    Matching,
    decoder_losses,
    finish_matching,
    heatmap_loss,
    joint_losses,
    match_counts,
    proposal_losses,
    start_matching,
)
from hpetr.model.matching import Targets, check_labels, make_targets
from hpetr.model.prior import PosePrior

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from hpetr.card import Evaluation

CLASS_PRIOR, HEATMAP_PRIOR = 0.01, 0.1


@dataclass
class HPetrOutput(ModelOutput):
    """What the model gives; coordinates are x, y with 1 = the unpadded picture's width and height.

    N = one-to-one queries, T = `config.num_poses`, S = tokens, C = classes, K = joints.

    Attributes:
        loss: scalar, with labels. loss_dict: its weighted terms, which sum to it.
        scores: (B, T) class probability, best first. poses: (B, T, K, 2) after the joint decoder. pose_labels: (B, T).
            keypoint_scores: (B, T, K) probability that a joint is right, where `config.keypoint_scores`.
            None while training with labels, where the joint decoder refines the matched poses instead.
        logits: (B, N, C), keypoints: (B, N, K, 2) of the last pose-decoder layer.
        decoder_logits: (layers, B, N, C), decoder_keypoints: (layers, B, N, K, 2).
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


class HPetrForPoseEstimation(PreTrainedModel):
    """PETR (Shi et al., CVPR 2022) and H-PETR (Jia et al., arXiv 2207.13080): all people's poses at once, no NMS."""

    config: HPetrConfig
    config_class = HPetrConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: HPetrConfig):
        super().__init__(config)
        self.backbone = FeatureExtractor(config)
        self.level_embedding = nn.Embedding(config.num_feature_levels, config.d_model)
        self.encoder = Encoder(config, config.encoder_layers, config.num_feature_levels, config.encoder_first_level)
        self.pose_decoder = PoseDecoder(config)
        self.joint_decoder = JointDecoder(config)
        if self.has_heatmap_branch(config):
            self.heatmap_encoder = Encoder(config, 1, 1)
            self.heatmap_head = nn.Linear(config.d_model, config.num_keypoints)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Visit modules without weights of their own, too, which transformers leaves out in code that is not its own.

        They hold the exceptions of `_init_weights`; it writes through `transformers.initialization` alone, which spares
        what was loaded.
        """
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform matrices, zero biases, normal(0, 1) embeddings, and the exceptions METHOD names."""
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
            # What changes logits begins with no change.
            for head in (layers if self.config.queries == "proposals" else []) + (
                [proposals] if self.config.pose_prior else []
            ):
                init.zeros_(cast("Tensor", head.weight))
                init.zeros_(cast("Tensor", head.bias))
            for head in module.keypoint_heads:
                init.zeros_(cast("Tensor", cast(nn.Sequential, head)[-1].weight))
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
        """Whether the heatmap loss is that of a branch of its own, as published, and not of the prior's heatmaps."""
        return config.loss_heatmap > 0 and not config.pose_prior

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: there are no tokens to embed. accelerate's FSDP asks, and transformers would raise."""
        return None

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        evaluation: Evaluation | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """transformers' `save_pretrained`, which writes config.json and model.safetensors, with a model card README.md.

        Args:
            save_directory: made where it is not there. A README.md that was not written by hpetr stays.
            push_to_hub: upload the folder, as a whole, to `repo_id`; None takes the folder's name.
            evaluation: figures of these weights for the card.
            name: of the model in the card; None takes the folder's.
            tags: more of them for the card.
            kwargs: see transformers.
        """
        from hpetr import card, hub

        folder = Path(save_directory)
        super().save_pretrained(folder, **kwargs)
        if kwargs.get("is_main_process", True) and not card.is_own_text(folder):
            title = name or folder.resolve().name
            card.write_card(folder, card.model_card(self.config, title, self.num_parameters(), evaluation, tags))
        if push_to_hub:
            hub.upload(folder, repo_id or folder.resolve().name, token=kwargs.get("token"))

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        evaluation: Evaluation | None = None,
        tags: Sequence[str] = (),
        max_shard_size: int | str = "50GB",
        **options: Any,
    ) -> CommitInfo:
        """Upload the model with its card to the Hugging Face hub; a card that the repository has already is kept.

        `hpetr predict` needs the processor too: push it to the same repository, or `hf upload` a checkpoint's folder.

        Args:
            repo_id: `OWNER/NAME`; the repository is made where there is none.
            evaluation, tags: see `save_pretrained`.
            options: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`.
        """
        from hpetr.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, max_shard_size=max_shard_size, evaluation=evaluation, name=repo_id, tags=tags or ()
            )
            return upload(folder, repo_id, **options)

    @staticmethod
    def padding(pixel_mask: Tensor | None) -> Tensor | None:
        """True on padding (B, H, W); None where there is none, which spares h-petr-nano 8% of its time.

        Only the CPU looks: a look at a GPU's mask would wait for all that the GPU has to do before.
        """
        if pixel_mask is None:
            return None
        if pixel_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(pixel_mask.all()):
            return None
        return pixel_mask == 0

    def tokenize(self, pixel_values: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Grid]:
        """Pixels (B, 3, H, W) and padding (B, H, W) to tokens (B, S, D), their positions (B or 1, S, D) and grid."""
        maps, masks, prior = self.backbone(pixel_values, padding)
        shares = None
        if padding is not None and self.config.steps == "size":
            inside = ~padding
            shares = torch.stack([inside[:, 0].float().mean(1), inside[:, :, 0].float().mean(1)], -1)  # (B, 2)
        grid = make_grid(maps, masks, shares, prior)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # (B, S, D)
        levels = torch.cat(
            [
                embedding.expand(height * width, -1)
                for embedding, (height, width) in zip(self.level_embedding.weight, grid.spatial_shapes, strict=True)
            ]
        )  # (S, D)
        return tokens, (grid.positions + levels).to(levels.dtype), grid

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Grid]:
        """Pixels (B, 3, H, W) and mask (B, H, W) to memory (B, S, D) and its grid."""
        tokens, positions, grid = self.tokenize(pixel_values, self.padding(pixel_mask))
        return self.encoder(tokens, positions, grid), grid

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
    ) -> HPetrOutput:
        """Estimate the poses of all people.

        Args:
            pixel_values: (B, 3, H, W) normalised RGB, each picture in the top left corner.
            pixel_mask: (B, H, W), 1 = picture, 0 = padding; None when nothing is padded.
            labels: B dicts with `keypoints` (n, K, 3) x, y, visibility in pixels of the unpadded picture, `boxes`
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
                f"pixel_values: {pixel_values.dtype}, expected normalised floats (PoseCollator.normalize makes them)"
            )
        if labels is not None:
            check_labels(labels, batch, self.config.num_keypoints)
        memory, grid = self.encode(pixel_values, pixel_mask)
        one_to_many = labels is not None and self.config.num_one_to_many_queries > 0
        proposals, layers, groups = self.pose_decoder(memory, grid, one_to_many=one_to_many)
        one_to_one = Predictions(layers.logits[:, :, : groups[0]], layers.keypoints[:, :, : groups[0]])
        output = HPetrOutput(
            logits=one_to_one.logits[-1],
            keypoints=one_to_one.keypoints[-1],
            decoder_logits=one_to_one.logits,
            decoder_keypoints=one_to_one.keypoints,
            proposal_logits=proposals.logits,
        )
        if labels is not None:
            targets = make_targets(labels, self.picture_sizes(pixel_values, pixel_mask))
            output.loss_dict = self.losses(memory, grid, proposals, layers, groups, targets, width)
            output.loss = torch.stack(list(output.loss_dict.values())).sum()
        if labels is None or not self.training:
            refined = self.refine_best(memory, grid, one_to_one)
            output.scores, output.poses, output.pose_labels, output.keypoint_scores = refined
        return output

    @staticmethod
    def picture_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """(B, 2) width and height of the unpadded pictures."""
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            size = to_device(torch.tensor([[width, height]], dtype=torch.float32), pixel_values.device)
            return size.expand(batch, 2)
        inside = pixel_mask != 0
        return torch.stack([inside[:, 0].sum(-1), inside[:, :, 0].sum(-1)], -1).float()

    def refine_best(
        self, memory: Tensor, grid: Grid, predictions: Predictions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scores (B, T), poses (B, T, K, 2), labels (B, T) and joints' scores (B, T, K) of the best T.

        The joint decoder refines the poses; only a model with `config.keypoint_scores` has the last.
        """
        scores = predictions.logits[-1].sigmoid()  # (B, N, C)
        classes = scores.shape[-1]
        flat = scores.flatten(1)
        best, index = flat.topk(torch.sym_min(self.config.num_poses, flat.shape[1]), dim=1)  # (B, T)
        query = torch.div(index, classes, rounding_mode="floor")[..., None, None]
        chosen = predictions.keypoints[-1].gather(1, query.expand(-1, -1, *predictions.keypoints.shape[-2:]))
        poses, logits = self.joint_decoder(memory, grid, chosen)
        keypoint_scores = None if logits is None else logits.sigmoid()
        # Steps of `config.steps` = "size" may lead out of the picture.
        return best, poses[-1].clamp(0, 1), index % classes, keypoint_scores

    def losses(
        self,
        memory: Tensor,
        grid: Grid,
        proposals: Proposals,
        layers: Predictions,
        groups: list[int],
        targets: Targets,
        padded_width: int,
    ) -> dict[str, Tensor]:
        """All weighted terms; see `losses.py`. The heatmap branch runs while the matching costs go to the host."""
        config, device = self.config, memory.device
        sigmas = to_device(torch.tensor(config.skeleton["sigmas"], dtype=torch.float32), device)
        groups = [size for size in groups if size]
        every = proposals.predictions()
        assignment = start_matching(every, layers, groups, targets, config, sigmas)
        heatmap = self.heatmap_losses(memory, grid, targets, padded_width) if config.loss_heatmap else {}
        matching = finish_matching(assignment, groups, device)
        counts = match_counts(matching, targets)
        terms = proposal_losses(proposals, every.keypoints, matching.proposals, targets, config, sigmas, counts[0])
        terms |= decoder_losses(layers, groups, matching.layers, targets, config, sigmas, counts[1])
        poses, scores = self.joint_decoder(memory, grid, self.matched_poses(layers.keypoints[-1].detach(), matching))
        return terms | heatmap | joint_losses(poses, scores, matching.joint, targets, config, sigmas, counts[2])

    @staticmethod
    def matched_poses(keypoints: Tensor, matching: Matching) -> Tensor:
        """Matched poses of each image side by side: keypoints (B, Q, K, 2) -> (B, T, K, 2).

        T is the largest number of matches of an image, at least 1; the places left over are copies of query 0 that no
        loss counts.
        """
        index = torch.zeros(len(keypoints), matching.most, dtype=torch.long, device=keypoints.device)
        index[matching.joint.image, matching.joint.slot] = matching.joint.query
        return keypoints.gather(1, index[..., None, None].expand(-1, -1, *keypoints.shape[-2:]))

    def heatmap_losses(self, memory: Tensor, grid: Grid, targets: Targets, padded_width: int) -> dict[str, Tensor]:
        """The heatmap branch over the finest level alone, without position, as published; or the prior's heatmaps."""
        first = grid.first_level()
        height, width = grid.spatial_shapes[0]
        padding = None if first.padding_mask is None else first.padding_mask.unflatten(-1, (height, width))
        if grid.prior is None:
            tokens = memory[:, : height * width]
            features = self.heatmap_encoder(tokens, torch.zeros_like(tokens[:1]), first)
            logits = self.heatmap_head(features).transpose(1, 2).unflatten(-1, (height, width))  # (B, K, H, W)
        else:
            logits = grid.prior.heat[0]
            height, width = logits.shape[-2:]
            if padding is not None:
                padding = padding.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
        return heatmap_loss(logits, padding, targets, round(padded_width / width), self.config)
