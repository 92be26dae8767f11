"""Backbone and neck: from pixels to feature maps of one width at several strides."""

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
    """A 1x1 convolution and a norm for each level, without activation.

    Levels beyond the backbone's are strided 3x3 convolutions: the first one reads the backbone's last map, each further
    one the level before it. Before `TokenNorm`, which sees single cells, the convolutions have a bias, so that a weak
    map stays weak.
    """

    def __init__(self, channels: list[int], d_model: int, num_levels: int, norm: str, *, bias: bool):
        super().__init__()
        extra = max(num_levels - len(channels), 0)
        sources = channels[:num_levels] + [channels[-1] if i == 0 else d_model for i in range(extra)]
        self.num_backbone_levels = num_levels - extra
        self.convs = nn.ModuleList(
            nn.Conv2d(source, d_model, 1, bias=bias)
            if level < self.num_backbone_levels
            else nn.Conv2d(source, d_model, 3, stride=2, padding=1, bias=bias)
            for level, source in enumerate(sources)
        )
        self.norms = nn.ModuleList(
            TokenNorm(d_model) if norm == "token" else nn.GroupNorm(32, d_model) for _ in sources
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map the backbone's maps (B, C_l, H_l, W_l) to num_levels maps (B, D, H_l, W_l)."""
        outputs: list[Tensor] = []
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            first_extra = level == self.num_backbone_levels
            source = maps[level] if level < self.num_backbone_levels else maps[-1] if first_extra else outputs[-1]
            if level >= self.num_backbone_levels and source.shape[-2:] == (1, 1):
                # The same result. The bfloat16 gradient of a strided, padded convolution on one pixel reads
                # uninitialized memory (torch 2.13, a CPU with AVX512-BF16: NaN in 22 of 40 tries).
                weight, bias = cast("Tensor", conv.weight), cast("Tensor | None", conv.bias)
                convolved = F.conv2d(F.pad(source, (1, 1, 1, 1)), weight, bias, stride=2)
            else:
                convolved = conv(source)
            outputs.append(norm(convolved))
        return outputs


class FoldedConvNorm(nn.Module):
    """A convolution with its frozen batch norm folded into the weights, and an in-place activation.

    It replaces one of transformers' modules and keeps the parameter names. A ResNet-50 takes a fifth less time than
    with the three modules, and keeps half as much memory for the backward pass: a batch norm in eval mode keeps its
    input.
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
    """Replace every module of a convolution and a batch norm, as all of ResNet's are, by `FoldedConvNorm`."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            norm = getattr(child, "normalization", None)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(getattr(child, "convolution", None), nn.Conv2d):
                setattr(parent, name, FoldedConvNorm(child))


class FeatureExtractor(nn.Module):
    """Any transformers backbone with its frozen parts, the neck, and the prior of a model that has one."""

    # transformers sets both
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., list[Tensor]]

    def __init__(self, config: HPetrConfig):
        super().__init__()
        self.body = AutoBackbone.from_config(config.backbone_config)
        if config.backbone_config.model_type == "swin":
            # SwinBackbone normalizes each output separately and never uses this norm (3,072 parameters in Swin-L).
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
        bias = config.neck_bias or config.neck_norm == "token"
        self.neck = Neck(channels, config.d_model, config.num_feature_levels, config.neck_norm, bias=bias)
        self.freeze_batch_norm = config.freeze_batch_norm
        if config.backbone_config.model_type == "resnet" and config.num_frozen_stages > 0:
            frozen = [self.body.embedder, *self.body.encoder.stages[: config.num_frozen_stages]]
            for module in frozen:
                module.requires_grad_(False)
        if self.freeze_batch_norm:
            for norm in self.batch_norms():
                norm.requires_grad_(False)
                if config.batch_norm_buffers:
                    for name, parameter in list(norm.named_parameters()):
                        delattr(norm, name)
                        norm.register_buffer(name, parameter.data)
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
        """Return the feature maps of the body.

        With gradient checkpointing, a body without checkpoints of its own (ResNet) is recomputed as a whole, when the
        backward pass has freed all later activations. A body with trainable batch norms is not: they would count the
        batch twice.
        """

        def run(pixels: Tensor) -> list[Tensor]:
            if not torch.is_grad_enabled():
                # Channels-last pixels take a fifth less time on a CPU; training gains nothing.
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            return list(self.body(pixels).feature_maps)

        again = self.freeze_batch_norm and not self.body.supports_gradient_checkpointing
        if self.gradient_checkpointing and self.training and again:
            return self._gradient_checkpointing_func(run, pixel_values)
        return run(pixel_values)

    def forward(
        self, pixel_values: Tensor, padding: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor] | None, Prior | None]:
        """Return the feature maps of every level.

        Args:
            pixel_values: (B, 3, H, W).
            padding: (B, H, W), true outside the image; None without padding.

        Returns:
            Maps (B, D, H_l, W_l); their padding masks (B, H_l, W_l), or None without padding; and the prior of a model
            that has one.
        """
        if padding is not None:
            # The published pipeline pads with zeros: other values would reach the image through the convolutions.
            pixel_values = pixel_values.masked_fill(padding[:, None], 0.0)
        maps = self.body_maps(pixel_values)
        prior_maps = [] if self.prior is None else [self.prior(maps.pop(level)) for level in range(self.prior_levels)]
        maps = self.neck(maps)
        shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        prior = Prior.from_maps(prior_maps, shapes, self.prior_settings) if prior_maps else None
        masks = None if padding is None else [nearest(padding, m.shape[-2], m.shape[-1]) for m in maps]
        return maps, masks, prior


def nearest(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask (B, H, W) to (B, height, width) by nearest interpolation, rounded as `F.interpolate` does.

    It is written out because exported interpolations round differently: in ONNX Runtime and OpenVINO the cells of one
    size in twelve are off by one (75 pixels to 10 cells, for example).
    """
    sides = torch.tensor([mask.shape[1:], (height, width)], dtype=torch.float32)
    scale = to_device(sides[0] / sides[1], mask.device)  # (2,)
    rows = (torch.arange(height, device=mask.device) * scale[0]).long()
    columns = (torch.arange(width, device=mask.device) * scale[1]).long()
    return mask.index_select(1, rows).index_select(2, columns)
