"""A model as one ONNX graph, with free batch, height and width.

The model is traced in two halves, images to tokens and tokens to poses, which `onnx.compose` joins. In one piece, the
number of tokens would be a sum of products of rounded quotients of height and width, and torch's symbolic arithmetic on
it takes minutes; the second half sees a plain symbol.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from onnxscript import opset18
from torch import Tensor, nn

from hpetr.export.trace import FREE, TRACED, quiet, requiring_gradients, traced_sides
from hpetr.model.grid import Grid
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.nano.prior import Prior
from hpetr.model.nano.settings import NanoSettings
from hpetr.model.ops import kept_as_operator
from hpetr.runtime.description import INPUTS, OUTPUTS

op: Any = opset18  # its types take no Python numbers
OPSET = 18  # GridSample and LayerNormalization are in it, and runtimes of several years read it
DIMENSIONS = {
    "pixel_values": ("batch", 3, "height", "width"),
    "pixel_mask": ("batch", "height", "width"),
    "scores": ("batch", "poses"),
    "poses": ("batch", "poses", "keypoints", 2),
    "pose_labels": ("batch", "poses"),
    "keypoint_scores": ("batch", "poses", "keypoints"),
}


class ImagesToTokens(nn.Module):
    """The first half: everything that the second needs to know of the images."""

    def __init__(self, model: HPetrForPoseEstimation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        """pixel_values (B, 3, H, W), pixel_mask (B, H, W) -> tokens and positions (B, S, D), centers (B, S, 2),
        valid_ratios and cells (B, L, 2), padding (B, S), of every level its padding (B, H_l, W_l), and where the model
        has a prior, what it says of tokens, logits (B, S, C) and steps (B, S, 2 K), and its maps of heat and offsets.
        """
        tokens, positions, grid, prior = self.model.tokenize(pixel_values, pixel_mask == 0)
        assert grid.padding_mask is not None
        levels = grid.padding_mask.split([height * width for height, width in grid.spatial_shapes], 1)
        maps = [level.unflatten(1, shape) for level, shape in zip(levels, grid.spatial_shapes, strict=True)]
        if prior is not None:
            maps += [prior.logits, prior.steps, *prior.heat, *prior.offsets]
        return tokens, positions, grid.centers, grid.valid_ratios, grid.cells, grid.padding_mask, *maps


class TokensToPoses(nn.Module):
    """The second half; of the levels' padding it takes the shapes alone."""

    def __init__(self, model: HPetrForPoseEstimation):
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        centers: Tensor,
        ratios: Tensor,
        cells: Tensor,
        padding: Tensor,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `ImagesToTokens`; gives the tensors of `OUTPUTS`."""
        count = self.model.config.num_feature_levels
        shapes = [(level.shape[1], level.shape[2]) for level in maps[:count]]
        prior = None
        if levels := self.model.config.pose_prior:
            logits, steps, *rest = maps[count:]
            prior = Prior(logits, steps, rest[:levels], rest[levels:], NanoSettings(**self.model.config.nano))
        grid = Grid(shapes, padding, ratios, centers, cells, positions)
        memory = self.model.encoder(tokens, positions, grid)
        proposals = self.model.propose(memory, grid, prior)
        predictions, _ = self.model.pose_decoder(memory, grid, proposals, self.model.groups[:1])
        scores, poses, labels, keypoint_scores = self.model.refine_best(memory, grid, predictions)
        return scores, poses, labels, torch.ones_like(poses[..., 0]) if keypoint_scores is None else keypoint_scores


def sampling_to_onnx(value: Any, sides: Sequence[Any], locations: Any, weights: Any) -> Any:
    """`hpetr::deformable_sampling` in ONNX: a GridSample of every level, as in `kernels/reference.py`.

    Of the ways to write it, GridSample is the fastest in ONNX Runtime and OpenVINO: a Gather of the four neighbors
    takes 1.3 to 3 times as long.
    """
    _, _, heads, width = value.shape  # static, unlike batch and tokens
    points = locations.shape[4]
    queries = op.Shape(locations, start=1, end=2)
    free, one, two = (op.Constant(value_ints=[number]) for number in (-1, 1, 2))
    maps = op.Transpose(value, perm=[0, 2, 3, 1])  # (B, M, D, S)
    grids = op.Transpose(op.Sub(op.Mul(locations, 2.0), 1.0), perm=[3, 0, 2, 1, 4, 5])  # (L, B, M, Q, P, 2)
    shares = op.Transpose(weights, perm=[3, 0, 2, 1, 4])  # (L, B, M, Q, P)
    grid_shape = op.Concat(free, queries, op.Constant(value_ints=[points]), two, axis=0)
    share_shape = op.Concat(free, one, queries, op.Constant(value_ints=[points]), axis=0)
    start = op.Constant(value_ints=[0])
    total = None
    for level in range(len(sides) // 2):
        rows, columns = (op.Reshape(side, one) for side in sides[2 * level : 2 * level + 2])
        end = op.Add(start, op.Mul(rows, columns))
        tokens = op.Slice(maps, start, end, op.Constant(value_ints=[3]))  # (B, M, D, H * W)
        map_shape = op.Concat(free, op.Constant(value_ints=[width]), rows, columns, axis=0)
        index = op.Constant(value_int=level)
        sampled = op.GridSample(
            op.Reshape(tokens, map_shape),  # (B * M, D, H, W)
            op.Reshape(op.Gather(grids, index, axis=0), grid_shape),  # (B * M, Q, P, 2)
            mode="bilinear",
            padding_mode="zeros",
        )  # (B * M, D, Q, P)
        share = op.Reshape(op.Gather(shares, index, axis=0), share_shape)  # (B * M, 1, Q, P)
        mean = op.ReduceSum(op.Mul(sampled, share), free, keepdims=0)  # (B * M, D, Q)
        total = mean if total is None else op.Add(total, mean)
        start = end
    joined = op.Reshape(total, op.Concat(free, op.Constant(value_ints=[heads * width]), queries, axis=0))
    return op.Transpose(joined, perm=[0, 2, 1])  # (B, Q, M * D)


def build_graph(model: HPetrForPoseEstimation, divisor: int) -> onnx.ModelProto:
    """The model in eval mode as ONNX, float32, with inputs `INPUTS` and outputs `OUTPUTS`; see `DIMENSIONS`.

    `pixel_mask` is int64 as the processor gives it, labels are int64. Every node is named after its module.

    Args:
        divisor: height and width of every batch are multiples of it.
    """
    config = model.config
    levels, width, joints = config.num_feature_levels, config.d_model, config.num_keypoints
    batch = TRACED[0]
    height, columns, *sides = traced_sides(divisor)
    sizes: tuple[Any, ...]
    images = (torch.zeros(batch, 3, height, columns), torch.ones(batch, height, columns).long())
    between = ["tokens", "positions", "centers", "ratios", "cells", "padding", *(f"level_{i}" for i in range(levels))]
    maps = [torch.zeros(batch, 11 + 2 * i, 23 + 4 * i, dtype=torch.bool) for i in range(levels)]
    count = sum(m[0].numel() for m in maps)
    tokens = [torch.zeros(batch, count, size) for size in (width, width, 2)]
    # Two tensors: torch.export takes one that comes twice for one input.
    ratios, cells = torch.ones(batch, levels, 2), torch.ones(batch, levels, 2)
    padding = torch.zeros(batch, count, dtype=torch.bool)
    free = [{0, 1}] * 3 + [{0}] * 2 + [{0, 1}] + [{0, 1, 2}] * levels
    if config.pose_prior:
        priors = range(config.pose_prior)
        between += ["prior_logits", "prior_steps"]
        between += [f"prior_{name}_{i}" for name in ("heat", "offsets") for i in priors]
        maps += [torch.zeros(batch, count, size) for size in (len(config.id2label or {}), 2 * joints)]
        maps += [torch.zeros(batch, size, 37 + 4 * i, 53 + 6 * i) for size in (joints, 2 * joints) for i in priors]
        free += [{0, 1}] * 2 + [{0, 2, 3}] * (2 * config.pose_prior)
    with quiet(), requiring_gradients(model, False):
        sizes = {0: FREE, 2: sides[0], 3: sides[1]}, {0: FREE, 1: sides[0], 2: sides[1]}
        first = _convert(ImagesToTokens(model), images, sizes, INPUTS, between)
        sizes = tuple(dict.fromkeys(axes, FREE) for axes in free)
        sizes = (*sizes[:6], sizes[6:])  # torch wants those of *maps together
        second = _convert(TokensToPoses(model), (*tokens, ratios, cells, padding, *maps), sizes, between, OUTPUTS)
    graph = _join(first, second, between)
    _tidy(graph)
    onnx.checker.check_model(graph)
    return graph


def _convert(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """A half as ONNX; `sizes` are torch.export's dynamic shapes."""
    with kept_as_operator():
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=sizes, strict=False)
    exported = torch.onnx.export(
        program,
        (),
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
        custom_translation_table={torch.ops.hpetr.deformable_sampling.default: sampling_to_onnx},
    )
    assert exported is not None
    return exported.model_proto


def _join(first: onnx.ModelProto, second: onnx.ModelProto, between: Sequence[str]) -> onnx.ModelProto:
    for half in (first, second):
        del half.graph.value_info[:]  # their symbols have the same names and mean different sizes
    first, second = (
        compose.add_prefix(half, f"{name}.", rename_inputs=False, rename_outputs=False)
        for half, name in ((first, "images"), (second, "poses"))
    )
    return compose.merge_models(first, second, [(name, name) for name in between])


def _tidy(model: onnx.ModelProto) -> None:
    """Names for nodes and dimensions; no traces of the machine on which the graph was made."""
    taken: dict[str, int] = {}
    for node in model.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        path = [scope for scope in ast.literal_eval(scopes[0])[:-1] if scope] if scopes else []
        name = f"{path[-1].removeprefix('model.') if path else 'graph'}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for tensor in (*model.graph.initializer, *model.graph.value_info):
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output):
        for dimension, size in zip(value.type.tensor_type.shape.dim, DIMENSIONS[value.name], strict=True):
            if isinstance(size, str) and not dimension.dim_value:
                dimension.dim_param = size
        value.ClearField("metadata_props")
    model.graph.name = "hpetr"
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")


def halve(model: onnx.ModelProto) -> None:
    """Keep weights of matrices and convolutions in float16; they are float32 again before anything is computed."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        name, weights = tensor.name, numpy_helper.to_array(tensor)
        if np.abs(weights).max(initial=0) > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}/Cast", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
    onnx.checker.check_model(model)
