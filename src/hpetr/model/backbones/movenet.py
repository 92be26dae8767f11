"""MoveNet MultiPose's network as a transformers backbone: a trunk that has learned poses, light enough for a CPU.

Google's MoveNet MultiPose Lightning (Apache-2.0) is MobileNetV2 at 1.5 times its width, a feature pyramid that ends at
stride 4, and six heads of CenterNet's kind. Its released weights have the batch norms folded into the convolutions.
Its pixels are (RGB - 127.5) / 127.5: image_mean = image_std = (0.5, 0.5, 0.5) of pixels in 0 ... 1.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from hpetr.model.backbones.efficientnet_lite import AlignedConv2d
from hpetr.model.ops.separable import NOTHING, RELU, separable, takes

# (blocks, stride of the first block, expansion, output channels), one row a stage
STAGES = ((1, 1, 1, 24), (2, 2, 6, 40), (3, 2, 6, 48), (4, 2, 6, 96), (3, 1, 6, 144), (3, 2, 6, 240), (1, 1, 6, 480))
STEM_CHANNELS = 48
TOP_CHANNELS = 1280
# The pyramid's levels from stride 32 down to 4: source, channels of its 1x1 convolution, channels after smoothing.
PYRAMID = (("top", 64, 64), ("stage4", 64, 32), ("stage3", 32, 24), ("stage2", 24, 24))
HEAD_WIDTH = 96
# Output channels of each head, and by what they are multiplied in the maps: on photographs they then vary about as much
# as the pyramid's channels do (standard deviation 0.2 to 0.6). Distances in cells and logits would drown them: 9 and 2.
HEADS = {
    "box_offset": (2, 2.0),
    "box_scale": (2, 0.05),
    "center": (1, 0.25),
    "heatmap": (17, 0.25),
    "offset": (34, 0.5),
    "regress": (34, 0.125),
}
HEAD_CHANNELS = PYRAMID[-1][2] + sum(channels for channels, _ in HEADS.values())
# Name, stride and channels of everything that can be asked for, finest first.
MAPS = {
    "stem": (2, STEM_CHANNELS),
    "stage1": (2, 24),
    "stage2": (4, 40),
    "fpn4": (4, 24),
    "heads4": (4, HEAD_CHANNELS),
    "stage3": (8, 48),
    "fpn8": (8, 24),
    "heads8": (8, 4 * HEAD_CHANNELS),
    "half_heads4": (8, HEAD_CHANNELS),
    "stage4": (16, 96),
    "stage5": (16, 144),
    "fpn16": (16, 32),
    "half_heads8": (16, 4 * HEAD_CHANNELS),
    "stage6": (32, 240),
    "stage7": (32, 480),
    "top": (32, TOP_CHANNELS),
    "fpn32": (32, 64),
}
FPN = ("fpn32", "fpn16", "fpn8", "fpn4")


class MoveNetConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of MoveNet MultiPose.

    `out_features` are names of `MAPS`, finest first: "stem" and "stage1" to "stage7" of the trunk, "top" (its last
    1x1 convolution), "fpn32" to "fpn4" of the pyramid, "heads4" (the pyramid's finest map and the heads' outputs) and
    "heads8" (the same with each 2x2 of cells in one). "half_heads4" and "half_heads8" are "heads4" and "heads8" of the
    image at half its size: MoveNet learned people of up to 256 pixels, and finds large ones better there. What none
    of them needs is not built.
    """

    model_type = "movenet"

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = list(MAPS)
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    conv_class = nn.Conv2d if stride == 1 else AlignedConv2d
    return conv_class(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _cells_together(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4 C, H / 2, W / 2): the channels of each 2x2 cells after one another, row by row.

    Of a channels-last map this copies long runs: 2 ms where F.pixel_unshuffle, with the same channels in another order,
    takes 22 ms (690 channels of 72 x 96 cells, one core).
    """
    batch, channels, height, width = x.shape
    cells = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    return cells.reshape(batch, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)


def _padded(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) with zeros to the right and below, to multiples of 32."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % 32, 0, -height % 32)) if height % 32 or width % 32 else pixels


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, with a residual where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = _conv(inputs, width) if expansion > 1 else None
        self.depthwise = _conv(width, width, 3, stride, width)
        self.project = _conv(width, outputs)
        self.residual = stride == 1 and inputs == outputs
        self.activation = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.expand is not None and takes(x, self.expand, self.depthwise, self.project):
            return separable(x, self.depthwise, self.project, expand=self.expand, residual=self.residual)
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.project(self.activation(self.depthwise(y)))
        return x + y if self.residual else y


class SeparableConv(nn.Module):
    """Depthwise 3x3 without bias, 1x1, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.depthwise = _conv(inputs, inputs, 3, groups=inputs, bias=False)
        self.pointwise = _conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if takes(x, self.depthwise, self.pointwise):
            return separable(x, self.depthwise, self.pointwise, clamps=(NOTHING, RELU))
        return F.relu_(self.pointwise(self.depthwise(x)))


class Pyramid(nn.Module):
    """Maps of the trunk to maps of strides 32 to 4, each the coarser one's, twice as large, plus the trunk's."""

    def __init__(self, levels: int):
        super().__init__()
        self.sources = [source for source, _, _ in PYRAMID[:levels]]
        self.lateral = nn.ModuleList(_conv(MAPS[source][1], width) for source, width, _ in PYRAMID[:levels])
        self.smooth = nn.ModuleList(SeparableConv(width, outputs) for _, width, outputs in PYRAMID[1:levels])

    def forward(self, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.lateral[0](trunk[self.sources[0]])
        maps = {FPN[0]: x}
        for name, source, lateral, smooth in zip(
            FPN[1:], self.sources[1:], self.lateral[1:], self.smooth, strict=False
        ):
            beside = lateral(trunk[source])  # twice as large
            x = smooth(beside + F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=False))
            maps[name] = x
        return maps


class Head(nn.Module):
    """A separable convolution to 96 channels, then 1x1 to the outputs."""

    def __init__(self, outputs: int):
        super().__init__()
        self.hidden = SeparableConv(PYRAMID[-1][2], HEAD_WIDTH)
        self.output = _conv(HEAD_WIDTH, outputs)

    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        return self.hidden.depthwise, self.hidden.pointwise, self.output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


class MoveNetBackbone(BackboneMixin, PreTrainedModel):
    """Maps pixel values (B, 3, H, W) to the feature maps of `config.out_features`, of ceil(size / stride) cells.

    Sizes that are no multiple of 32 are padded with zeros to the right and bottom, and the maps are cut.
    """

    config_class = MoveNetConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def __init__(self, config: MoveNetConfig):
        super().__init__(config)
        self.num_features = [channels for _, channels in MAPS.values()]
        wanted = set(config.out_features)
        heads = any("heads" in name for name in wanted)
        levels = len(PYRAMID) if heads else max((FPN.index(name) + 1 for name in wanted & set(FPN)), default=0)
        top = levels > 0 or "top" in wanted
        depth = len(STAGES) if top else max((int(name[-1]) for name in wanted if name.startswith("stage")), default=0)
        self.stem = _conv(3, STEM_CHANNELS, 3, 2)
        self.activation = nn.ReLU6(inplace=True)
        self.stages = nn.ModuleList()
        inputs = STEM_CHANNELS
        for blocks, stride, expansion, outputs in STAGES[:depth]:
            stage = [InvertedResidual(inputs, outputs, stride, expansion)]
            stage += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            inputs = outputs
        self.top = _conv(inputs, TOP_CHANNELS) if top else None
        self.pyramid = Pyramid(levels) if levels else None
        self.heads = nn.ModuleDict({name: Head(n) for name, (n, _) in HEADS.items()} if heads else {})
        self.post_init()

    def _trunk(self, pixels: Tensor) -> dict[str, Tensor]:
        x = self.activation(self.stem(pixels))
        maps = {"stem": x}
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            maps[f"stage{number}"] = x
        if self.top is not None:
            maps["top"] = self.activation(self.top(x))
        return maps

    def _heads(self, finest: Tensor) -> Tensor:
        """The pyramid's finest map (B, C, H, W) and all heads' outputs, scaled, one after the other."""
        heads = cast("dict[str, Head]", dict(self.heads.items()))
        if not takes(finest, *(conv for head in heads.values() for conv in head.convolutions())):
            return torch.cat([finest, *(head(finest) * HEADS[name][1] for name, head in heads.items())], 1)
        batch, channels, height, width = finest.shape
        joined = finest.new_empty(batch, height, width, HEAD_CHANNELS)
        joined[..., :channels] = finest.permute(0, 2, 3, 1)
        for name, head in heads.items():
            outputs, scale = HEADS[name]
            depthwise, pointwise, output = head.convolutions()
            slot = joined[..., channels : channels + outputs]
            separable(finest, depthwise, pointwise, last=output, clamps=(NOTHING, RELU), scale=scale, out=slot)
            channels += outputs
        return joined.permute(0, 3, 1, 2)

    def _maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """All maps of pixels (B, 3, H, W), of multiples of 32."""
        maps = self._trunk(pixels)
        if self.pyramid is not None:
            maps |= self.pyramid(maps)
        if len(self.heads):
            maps["heads4"] = self._heads(maps["fpn4"])
            maps["heads8"] = _cells_together(maps["heads4"])
        return maps

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BackboneOutput:
        """The maps of `config.out_features`; the other arguments are transformers' and have no effect here."""
        height, width = pixel_values.shape[-2:]
        pixels = _padded(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = self._maps(pixels)
        if any(name.startswith("half_") for name in self.out_features):
            # The mean of each 2x2 pixels, in a third of avg_pool2d's time.
            half = F.interpolate(pixels, scale_factor=0.5, mode="bilinear", align_corners=False)
            half_maps = self._maps(_padded(half))
            maps |= {f"half_{name}": half_maps[name] for name in ("heads4", "heads8")}
        wanted = [maps[name] for name in self.out_features]
        strides = [MAPS[name][0] for name in self.out_features]
        # Not -(-height // s): an export's quotients of negative numbers are rounded to zero.
        ends = [((height + s - 1) // s, (width + s - 1) // s) for s in strides]
        wanted = [x[..., :h, :w] for x, (h, w) in zip(wanted, ends, strict=True)]
        return BackboneOutput(feature_maps=cast("tuple[Tensor]", tuple(wanted)))


AutoConfig.register(MoveNetConfig.model_type, MoveNetConfig, exist_ok=True)
AutoBackbone.register(MoveNetConfig, MoveNetBackbone, exist_ok=True)
