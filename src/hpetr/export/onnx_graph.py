"""A model as one ONNX graph, with free batch, height and width.

The model is traced in two halves, images to tokens and tokens to poses, which `onnx.compose` joins. In one piece, the
number of tokens is a sum of products of rounded quotients of height and width, and torch's symbolic arithmetic on it
takes minutes; the second half sees one symbol.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from onnxscript import opset18
from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram, register_dataclass
from torch.fx.experimental.symbolic_shapes import optimization_hint
from torch.utils._pytree import tree_leaves, tree_map

from hpetr.export.trace import COARSEST, FREE, TRACED, name_outputs, quiet, trace_as
from hpetr.model.grid import Grid
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.nano.prior import Prior
from hpetr.model.ops import kept_as_operator
from hpetr.runtime.description import INPUTS, OUTPUTS

op: Any = opset18  # its annotations exclude Python numbers
OPSET = 18  # has GridSample and LayerNormalization, and older runtimes read it
DIMENSIONS = {
    "pixel_values": ("batch", 3, "height", "width"),
    "pixel_mask": ("batch", "height", "width"),
    "scores": ("batch", "poses"),
    "poses": ("batch", "poses", "keypoints", 2),
    "pose_labels": ("batch", "poses"),
    "keypoint_scores": ("batch", "poses", "keypoints"),
}
# The first half takes images as blocks of U x U pixels, where U divides all heights and widths. The sides of its maps
# are then polynomials in two whole numbers, for which torch's symbolic arithmetic takes a fraction of the time.
TO_BLOCKS = """<ir_version: %d, opset_import: ["" : %d]>
blocks (float[batch, 3, height, width] pixel_values, int64[batch, height, width] pixel_mask)
    => (float[batch, 3, rows, u, columns, u] pixel_values_blocks, int64[batch, rows, u, columns, u] pixel_mask_blocks)
{
    u = Constant <value_ints = [%d]> ()
    three = Constant <value_ints = [3]> ()
    shape = Shape (pixel_mask)
    batch, height, width = Split <num_outputs = 3> (shape)
    rows = Div (height, u)
    columns = Div (width, u)
    pixel_shape = Concat <axis = 0> (batch, three, rows, u, columns, u)
    mask_shape = Concat <axis = 0> (batch, rows, u, columns, u)
    pixel_values_blocks = Reshape (pixel_values, pixel_shape)
    pixel_mask_blocks = Reshape (pixel_mask, mask_shape)
}"""
register_dataclass(Grid)
register_dataclass(Prior)


class ImagesToTokens(nn.Module):
    """The first half: everything that `tokenize` returns, as a list of tensors.

    `tree` is the structure of `tokenize`'s result, with `Tensor` for a tensor, `SymInt` for a size that depends on the
    images, and everything else as it is. A size passes as the length of a tensor.
    """

    tree: Any

    def __init__(self, model: HPetrForPoseEstimation):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[Tensor]:
        """Map blocks of pixels (B, 3, R, U, C, U) and mask (B, R, U, C, U) to the tensors of `tree`, in its order."""
        pixel_values, pixel_mask = (x.flatten(-2).flatten(-3, -2) for x in (pixel_values, pixel_mask))
        found = self.model.tokenize(pixel_values, pixel_mask == 0)
        self.tree = tree_map(lambda x: next((kind for kind in (Tensor, SymInt) if isinstance(x, kind)), x), found)
        leaves = [x for x in tree_leaves(found) if isinstance(x, Tensor | SymInt)]
        return [pixel_values.new_zeros(x) if isinstance(x, SymInt) else x for x in leaves]


class TokensToPoses(nn.Module):
    """The second half; `tree` is that of `ImagesToTokens`."""

    def __init__(self, model: HPetrForPoseEstimation, tree: Any):
        super().__init__()
        self.model, self.tree = model, tree

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Map the tensors of the first half to those of `OUTPUTS`."""
        rest = iter(tensors)
        values = {Tensor: lambda: next(rest), SymInt: lambda: next(rest).shape[0]}
        tokens, positions, grid, prior = tree_map(lambda x: values[x]() if isinstance(x, type) else x, self.tree)
        memory = self.model.encoder(tokens, positions, grid)
        proposals = self.model.propose(memory, grid, prior)
        predictions, _ = self.model.pose_decoder(memory, grid, proposals, self.model.groups[:1])
        return name_outputs(*self.model.refine_best(memory, grid, predictions))


def sampling_to_onnx(value: Any, sides: Sequence[Any], locations: Any, weights: Any) -> Any:
    """Translate `hpetr::deformable_sampling` to a GridSample of every level, as in `ops/reference.py`.

    ONNX Runtime and OpenVINO take 1.3 to 3 times as long with a Gather of the four neighbors.
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
    """Return the model in eval mode as ONNX, float32, with inputs `INPUTS` and outputs `OUTPUTS`; see `DIMENSIONS`.

    `pixel_mask` is int64 as the processor gives it, labels are int64. Every node is named after its module.

    Args:
        divisor: height and width of every batch are multiples of it.
    """
    images = ImagesToTokens(model)
    with kept_as_operator():
        unit = math.gcd(divisor, COARSEST)
        batch, rows, columns = TRACED[0], *(-(-side // unit) for side in TRACED[1:])
        pixels, mask = (
            torch.zeros(batch, 3, rows, unit, columns, unit),
            torch.ones(batch, rows, unit, columns, unit).long(),
        )
        sizes = {0: FREE, 2: FREE, 4: FREE}, {0: FREE, 1: FREE, 3: FREE}
        first = trace_as(images, (pixels, mask), sizes, gradients=False)
        # Sizes that depend on the images are symbols in the first half. The second example has their traced values.
        between = [node.meta["val"] for node in first.graph.output_node().args[0]]
        example = tuple(torch.zeros([optimization_hint(n) for n in x.shape], dtype=x.dtype) for x in between)
        free = tuple({axis: FREE for axis, n in enumerate(x.shape) if isinstance(n, SymInt)} for x in between)
        second = trace_as(TokensToPoses(model, images.tree), example, (free,), gradients=False)
    names = [f"between_{number}" for number in range(len(between))]
    joints = [f"{name}_blocks" for name in INPUTS], names
    halves = _convert(first, *joints, "images"), _convert(second, names, OUTPUTS, "poses")
    graph = onnx.parser.parse_model(TO_BLOCKS % (halves[0].ir_version, OPSET, unit))
    for half, inputs in zip(halves, joints, strict=True):
        graph = compose.merge_models(graph, half, [(name, name) for name in inputs])
    _tidy(graph)
    onnx.checker.check_model(graph)
    return graph


def _convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], prefix: str) -> onnx.ModelProto:
    with quiet():
        exported = torch.onnx.export(
            program,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
            custom_translation_table={torch.ops.hpetr.deformable_sampling.default: sampling_to_onnx},
        )
    assert exported is not None
    model = exported.model_proto
    del model.graph.value_info[:]  # symbols of equal names mean different sizes in the two halves
    return compose.add_prefix(model, f"{prefix}.", rename_inputs=False, rename_outputs=False)


def _tidy(model: onnx.ModelProto) -> None:
    """Name nodes and dimensions, and remove paths and stack traces of this machine."""
    names: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        path = [scope for scope in ast.literal_eval(scopes[0])[:-1] if scope] if scopes else []
        name = f"{path[-1].removeprefix('model.') if path else 'graph'}/{node.op_type}"
        names[name] += 1
        node.name = name if names[name] == 1 else f"{name}_{names[name]}"
    for value in (*model.graph.input, *model.graph.output):
        for dimension, size in zip(value.type.tensor_type.shape.dim, DIMENSIONS[value.name], strict=True):
            if isinstance(size, str) and not dimension.dim_value:
                dimension.dim_param = size
    graph = model.graph
    graph.name = "hpetr"
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def halve(model: onnx.ModelProto) -> None:
    """Store weights of matrices and convolutions as float16, cast to float32 before they are used."""
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
