"""Backbone and neck: pixels to feature maps of one width at several strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from hpetr.errors import InputError
from hpetr.model.config import HPetrConfig
from hpetr.model.host import to_device
from hpetr.model.nano.prior import PosePrior, Prior
from hpetr.model.nano.settings import NanoSettings


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Neck(nn.Module):
    """A 1x1 convolution and a norm a level; levels past the backbone's come from its last map, strided.

    The first extra level reads the backbone's last map, each further one the level before it. No activation. Under
    `TokenNorm`, which sees one cell alone, the convolutions have a bias: a weak map stays a weak one.
    """

    def __init__(self, channels: list[int], d_model: int, num_levels: int, norm: str):
        super().__init__()
        extra = max(num_levels - len(channels), 0)
        sources = channels[:num_levels] + [channels[-1] if i == 0 else d_model for i in range(extra)]
        self.num_backbone_levels = num_levels - extra
        self.convs = nn.ModuleList(
            nn.Conv2d(source, d_model, 1, bias=norm == "token")
            if level < self.num_backbone_levels
            else nn.Conv2d(source, d_model, 3, stride=2, padding=1, bias=norm == "token")
            for level, source in enumerate(sources)
        )
        self.norms = nn.ModuleList(
            TokenNorm(d_model) if norm == "token" else nn.GroupNorm(32, d_model) for _ in sources
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Backbone maps (B, C_l, H_l, W_l) -> num_levels maps (B, D, H_l, W_l)."""
        outputs: list[Tensor] = []
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            first_extra = level == self.num_backbone_levels
            source = maps[level] if level < self.num_backbone_levels else maps[-1] if first_extra else outputs[-1]
            if level >= self.num_backbone_levels and source.shape[-2:] == (1, 1):
                # The same numbers. The bfloat16 gradient of a strided, padded convolution on one pixel reads memory
                # that nobody wrote (torch 2.13, a CPU with AVX512-BF16: NaN in 22 of 40 tries).
                weight, bias = cast("Tensor", conv.weight), cast("Tensor | None", conv.bias)
                convolved = F.conv2d(F.pad(source, (1, 1, 1, 1)), weight, bias, stride=2)
            else:
                convolved = conv(source)
            outputs.append(norm(convolved))
        return outputs


class FoldedConvNorm(nn.Module):
    """A convolution whose frozen batch norm is folded into its weights, then an activation in place.

    It takes the place, and the names, of one of transformers' modules. Against the three modules one after the other,
    a ResNet-50 spends a fifth less time, and keeps half as much for the backward pass: a batch norm in eval mode would
    keep its input.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.convolution = cast(nn.Conv2d, module.convolution)
        self.normalization = cast(nn.BatchNorm2d, module.normalization).requires_grad_(False)
        activation = getattr(module, "activation", nn.Identity())
        self.activation = nn.ReLU(inplace=True) if isinstance(activation, nn.ReLU) else activation

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.convolution, self.normalization
        mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
        scale = norm.weight * (variance + norm.eps).rsqrt()  # (outputs,)
        weight = conv.weight * scale[:, None, None, None]
        return self.activation(conv._conv_forward(x, weight, norm.bias - mean * scale))


def fold_batch_norms(body: nn.Module) -> None:
    """Put `FoldedConvNorm` in the place of every module that is a convolution and a batch norm (ResNet's all are)."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            norm = getattr(child, "normalization", None)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(child, "convolution", None), nn.Conv2d):
                setattr(parent, name, FoldedConvNorm(child))


class FeatureExtractor(nn.Module):
    """`model.backbone`: any transformers backbone, what the recipe freezes of it, the neck, and the prior if any."""

    # transformers sets both
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., list[Tensor]]

    def __init__(self, config: HPetrConfig):
        super().__init__()
        self.body = AutoBackbone.from_config(config.backbone_config)
        if config.backbone_config.model_type == "swin":
            # SwinBackbone normalizes each output by itself and never uses this norm (3,072 parameters in Swin-L).
            self.body.swin.layernorm = nn.Identity()
        channels = list(self.body.channels)
        self.prior_levels = config.pose_prior
        sources = [channels.pop(level) for level in range(self.prior_levels)]
        if len(set(sources)) > 1:
            raise InputError(
                f"config: pose_prior = {self.prior_levels}, of maps with {sources} channels; expected equally many"
            )
        self.prior = PosePrior(config, sources[0]) if sources else None
        self.prior_settings = NanoSettings(**config.nano)
        self.neck = Neck(channels, config.d_model, config.num_feature_levels, config.neck_norm)
        self.freeze_batch_norm = config.freeze_batch_norm
        if config.backbone_config.model_type == "resnet" and config.num_frozen_stages > 0:
            frozen = [self.body.embedder, *self.body.encoder.stages[: config.num_frozen_stages]]
            for module in frozen:
                module.requires_grad_(False)
        if self.freeze_batch_norm:
            for norm in self.batch_norms():
                norm.requires_grad_(False)
            fold_batch_norms(self.body)

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.body.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> FeatureExtractor:
        super().train(mode)
        if self.freeze_batch_norm:
            for norm in self.batch_norms():
                norm.eval()
        return self

    def body_maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Feature maps of the body.

        With gradient checkpointing, a body that keeps no checkpoints of its own (ResNet) is computed again as a whole,
        when the backward pass has freed everything behind it; unless its batch norms would count the batch twice.
        """

        def run(pixels: Tensor) -> list[Tensor]:
            if not torch.is_grad_enabled():
                # The same convolutions on channels-last pixels take a fifth less time on a CPU; training gains nothing.
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return list(self.body(pixels).feature_maps)

        again = self.freeze_batch_norm and not self.body.supports_gradient_checkpointing
        if self.gradient_checkpointing and self.training and again:
            return self._gradient_checkpointing_func(run, pixel_values)
        return run(pixel_values)

    def forward(
        self, pixel_values: Tensor, padding: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor] | None, Prior | None]:
        """Pixels (B, 3, H, W) and their padding (B, H, W), true outside the image, to maps of every level.

        Returns:
            Maps (B, D, H_l, W_l); their padding masks (B, H_l, W_l), or None without padding; and what the prior says.
        """
        if padding is not None:
            # What lies in the padding must not reach the image: the published pipeline pads with zeros.
            pixel_values = pixel_values.masked_fill(padding[:, None], 0.0)
        maps = self.body_maps(pixel_values)
        prior_maps = [] if self.prior is None else [self.prior(maps.pop(level)) for level in range(self.prior_levels)]
        maps = self.neck(maps)
        shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        prior = Prior.from_maps(prior_maps, shapes, self.prior_settings) if prior_maps else None
        masks = None if padding is None else [nearest(padding, m.shape[-2], m.shape[-1]) for m in maps]
        return maps, masks, prior


def nearest(mask: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) to (B, height, width) by nearest interpolation, as `F.interpolate` rounds it.

    Written out, because an exported interpolation rounds otherwise: in ONNX Runtime and OpenVINO, the cells of one in
    twelve sizes would be off by one (75 pixels to 10 cells, for example).
    """
    sides = torch.tensor([mask.shape[1:], (height, width)], dtype=torch.float32)
    scale = to_device(sides[0] / sides[1], mask.device)  # (2,)
    rows = (torch.arange(height, device=mask.device) * scale[0]).long()
    columns = (torch.arange(width, device=mask.device) * scale[1]).long()
    return mask.index_select(1, rows).index_select(2, columns)
