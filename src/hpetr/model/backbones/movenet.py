"""MoveNet MultiPose Lightning (Google, Apache-2.0) as a transformers backbone, light enough for a CPU.

The network is MobileNetV2 at 1.5 times its width, a feature pyramid that ends at stride 4, and six heads in the style
of CenterNet. In the released weights, the batch norms are folded into the convolutions. Pixels are
(RGB - 127.5) / 127.5: image_mean = image_std = (0.5, 0.5, 0.5).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from hpetr.model.ops.separable import NOTHING, RELU, is_supported, separable

# Blocks, stride of the first block, expansion and output channels of each stage.
STAGES = ((1, 1, 1, 24), (2, 2, 6, 40), (3, 2, 6, 48), (4, 2, 6, 96), (3, 1, 6, 144), (3, 2, 6, 240), (1, 1, 6, 480))
STEM_CHANNELS = 48
TOP_CHANNELS = 1280
# Levels of the pyramid, from stride 32 down to 4: source, channels of its 1x1 convolution, channels after smoothing.
PYRAMID = (("top", 64, 64), ("stage4", 64, 32), ("stage3", 32, 24), ("stage2", 24, 24))
HEAD_WIDTH = 96
# Output channels of each head, and the factor of its outputs. The factors bring the standard deviation on photographs
# to that of the pyramid's channels, 0.2 to 0.6; without them it is 9 for distances in cells and 2 for logits.
HEADS = {
    "box_offset": (2, 2.0),
    "box_scale": (2, 0.05),
    "center": (1, 0.25),
    "heatmap": (17, 0.25),
    "offset": (34, 0.5),
    "regress": (34, 0.125),
}
HEAD_CHANNELS = PYRAMID[-1][2] + sum(channels for channels, _ in HEADS.values())
# Stride and channels of every map, finest first.
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

    `out_features` are names of `MAPS`, finest first; the network has only the parts that they need. "stem", "stage1" to
    "stage7" and "top", its last 1x1 convolution, are of the trunk, "fpn4" to "fpn32" of the pyramid. "heads4" is the
    pyramid's finest map followed by the outputs of the heads, "heads8" is "heads4" with each 2x2 cells joined into one.
    "half_heads4" and "half_heads8" are those of the image at half its size: MoveNet was trained on people of up to 256
    pixels, and finds larger ones better there.
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


class AlignedConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2 that pads even sizes below and to the right alone, like TensorFlow's "SAME"."""

    def forward(self, x: Tensor) -> Tensor:
        eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())  # a traced graph must fit all sizes
        if eager and self.groups > 1 and x.shape[-2] % 2 == 0 and x.shape[-1] % 2 == 0:
            # Padding the kernel instead of the input saves a copy: 10% of a small network's time on a CPU. Not in
            # training: torch's backward pass of an even kernel takes up to 3 times as long.
            return F.conv2d(x, F.pad(self.weight, (1, 0, 1, 0)), self.bias, 2, 1, 1, self.groups)
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias, 2, 0, 1, self.groups)


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """Return a convolution whose output has ceil(size / stride) cells."""
    conv_class = nn.Conv2d if stride == 1 else AlignedConv2d
    return conv_class(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _join_cells(x: Tensor) -> Tensor:
    """Join each 2x2 cells of a map (B, C, H, W), row by row, into one: (B, 4 C, H / 2, W / 2).

    On a channels-last map of 690 channels and 72 x 96 cells this takes 2 ms on one core, and F.pixel_unshuffle, which
    orders the channels in another way, 22 ms.
    """
    batch, channels, height, width = x.shape
    cells = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
    return cells.reshape(batch, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)


def _pad(pixels: Tensor) -> Tensor:
    """Pad pixels (B, 3, H, W) with zeros to the right and below, to multiples of 32."""
    height, width = pixels.shape[-2:]
    # Not -width % 32: an exporter cannot see that the sum of the two is a multiple of 32.
    right, below = ((side + 31) // 32 * 32 - side for side in (width, height))
    return F.pad(pixels, (0, right, 0, below)) if right or below else pixels


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
        if self.expand is not None and is_supported(x, self.expand, self.depthwise, self.project):
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
        if is_supported(x, self.depthwise, self.pointwise):
            return separable(x, self.depthwise, self.pointwise, clamps=(NOTHING, RELU))
        return F.relu_(self.pointwise(self.depthwise(x)))


class Pyramid(nn.Module):
    """Maps of strides 32 to 4: the next coarser one, enlarged twice, plus the trunk's of the same stride."""

    def __init__(self, levels: int):
        super().__init__()
        self.sources = [source for source, _, _ in PYRAMID[:levels]]
        self.lateral = nn.ModuleList(_conv(MAPS[source][1], width) for source, width, _ in PYRAMID[:levels])
        self.smooth = nn.ModuleList(SeparableConv(width, outputs) for _, width, outputs in PYRAMID[1:levels])

    def forward(self, trunk: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.lateral[0](trunk[self.sources[0]])
        maps = {FPN[0]: x}
        for number, smooth in enumerate(self.smooth, 1):
            beside = self.lateral[number](trunk[self.sources[number]])  # twice as large
            x = smooth(beside + F.interpolate(x, beside.shape[-2:], mode="bilinear", align_corners=False))
            maps[FPN[number]] = x
        return maps


class Head(nn.Module):
    """A separable convolution to 96 channels, then a 1x1 convolution to the outputs."""

    def __init__(self, outputs: int):
        super().__init__()
        self.hidden = SeparableConv(PYRAMID[-1][2], HEAD_WIDTH)
        self.output = _conv(HEAD_WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


class MoveNetBackbone(BackboneMixin, PreTrainedModel):
    """Map pixel values (B, 3, H, W) to the maps of `config.out_features`, each of ceil(size / stride) cells.

    Pixels are padded with zeros to multiples of 32, and the maps are cut.
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

    def _heads(self, finest: Tensor) -> Tensor:
        """Return the pyramid's finest map (B, C, H, W) followed by the scaled outputs of all heads."""
        heads = cast("dict[str, Head]", dict(self.heads.items()))
        convolutions = {name: (h.hidden.depthwise, h.hidden.pointwise, h.output) for name, h in heads.items()}
        if not is_supported(finest, *(conv for one in convolutions.values() for conv in one)):
            return torch.cat([finest, *(head(finest) * HEADS[name][1] for name, head in heads.items())], 1)
        batch, end, height, width = finest.shape
        joined = finest.new_empty(batch, height, width, HEAD_CHANNELS)
        joined[..., :end] = finest.permute(0, 2, 3, 1)
        for name, (depthwise, pointwise, output) in convolutions.items():
            start, end = end, end + HEADS[name][0]
            slot, scale = joined[..., start:end], HEADS[name][1]
            separable(finest, depthwise, pointwise, last=output, clamps=(NOTHING, RELU), scale=scale, out=slot)
        return joined.permute(0, 3, 1, 2)

    def _maps(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return all maps of pixels (B, 3, H, W), whose sides are multiples of 32."""
        x = self.activation(self.stem(pixels))
        maps = {"stem": x}
        for number, stage in enumerate(self.stages, 1):
            x = maps[f"stage{number}"] = stage(x)
        if self.top is not None:
            maps["top"] = self.activation(self.top(x))
        if self.pyramid is not None:
            maps |= self.pyramid(maps)
        if len(self.heads):
            maps["heads4"] = self._heads(maps["fpn4"])
            maps["heads8"] = _join_cells(maps["heads4"])
        return maps

    def forward(self, pixel_values: Tensor, *args: object, **kwargs: object) -> BackboneOutput:
        """Return the maps of `config.out_features`; the other arguments are transformers' and have no effect."""
        height, width = pixel_values.shape[-2:]
        pixels = _pad(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = self._maps(pixels)
        if any(name.startswith("half_") for name in self.out_features):
            # The mean of each 2x2 pixels, in a third of the time that avg_pool2d takes.
            size = [side // 2 for side in pixels.shape[-2:]]
            half = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
            maps |= {f"half_{name}": x for name, x in self._maps(_pad(half)).items()}
        wanted = []
        for name in self.out_features:
            stride = MAPS[name][0]
            # Not -(-height // stride): an exported graph rounds quotients of negative numbers to zero.
            rows, columns = ((side + stride - 1) // stride for side in (height, width))
            wanted.append(maps[name][..., :rows, :columns])
        return BackboneOutput(feature_maps=cast("tuple[Tensor]", tuple(wanted)))


AutoConfig.register(MoveNetConfig.model_type, MoveNetConfig, exist_ok=True)
AutoBackbone.register(MoveNetConfig, MoveNetBackbone, exist_ok=True)
