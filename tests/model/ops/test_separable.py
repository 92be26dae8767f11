"""Blocks of separable convolutions: the C kernel against torch's convolutions, and where it stands aside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpetr.model.backbones.movenet import AlignedConv2d, MoveNetBackbone, MoveNetConfig
from hpetr.model.ops import cpu
from hpetr.model.ops.separable import NOTHING, RELU, RELU6, is_supported, separable

needs_c = pytest.mark.skipif(cpu.load() is None, reason="no C compiler")
sides, channels = st.integers(1, 19), st.integers(1, 70)


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = True):
    kind = nn.Conv2d if stride == 1 else AlignedConv2d
    conv = kind(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias).requires_grad_(False)
    nn.init.normal_(conv.weight, std=(inputs // groups * kernel**2) ** -0.5)
    return conv


def by_torch(x: Tensor, depthwise, project, expand, last, residual: bool, clamps) -> Tensor:
    y = x if expand is None else expand(x).clamp(*RELU6)
    y = project(depthwise(y).clamp(*clamps[0])).clamp(*clamps[1])
    y = y if last is None else last(y)
    return y + x if residual else y


@needs_c
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(sides, sides),
    widths=st.tuples(channels, channels, channels, channels),
    stride=st.sampled_from([1, 2]),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    threads=st.integers(1, 3),
    clamps=st.sampled_from([(RELU6, NOTHING), (NOTHING, RELU)]),
)
def test_agrees_with_torch(batch, size, widths, stride, parts, threads, clamps) -> None:
    torch.manual_seed(0)
    expands, follows, residual, bias = parts
    inputs, hidden, outputs, final = widths
    hidden = hidden if expands else inputs
    residual = residual and stride == 1
    if residual:
        outputs, final = inputs, inputs
    x = torch.randn(batch, inputs, *size)
    expand = convolution(inputs, hidden, bias=bias) if expands else None
    depthwise = convolution(hidden, hidden, 3, stride, hidden, bias=bias)
    project = convolution(hidden, outputs, bias=bias)
    last = convolution(outputs, final) if follows else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = separable(x, depthwise, project, expand=expand, last=last, residual=residual, clamps=clamps)
    finally:
        torch.set_num_threads(before)
    expected = by_torch(x, depthwise, project, expand, last, residual, clamps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_c
def test_writes_scaled_into_a_slice_and_nowhere_else() -> None:
    torch.manual_seed(0)
    x, depthwise = torch.randn(2, 5, 6, 7), convolution(5, 5, 3, groups=5)
    project, last = convolution(5, 9), convolution(9, 4)
    whole = torch.full((2, 6, 7, 10), 7.0)
    separable(x, depthwise, project, last=last, clamps=(NOTHING, RELU), scale=0.5, out=whole[..., 3:7])
    expected = by_torch(x, depthwise, project, None, last, False, (NOTHING, RELU)) * 0.5
    torch.testing.assert_close(whole[..., 3:7].permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)
    assert (whole[..., :3] == 7).all()
    assert (whole[..., 7:] == 7).all()


@needs_c
def test_nan_stays_where_the_windows_see_it() -> None:
    """A broken image must not pass for an empty one."""
    x = torch.zeros(1, 4, 9, 9)
    x[0, :, 4, 4] = float("nan")
    found = separable(x, convolution(4, 4, 3, groups=4), convolution(4, 3), clamps=(NOTHING, NOTHING))
    assert found[0, :, 3:6, 3:6].isnan().all()
    assert not found[0, :, :3].isnan().any()


def test_stands_aside_where_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, depthwise, project = torch.randn(1, 4, 8, 8), convolution(4, 4, 3, groups=4), convolution(4, 4)
    assert is_supported(x, depthwise, project) == (cpu.load() is not None)
    assert not is_supported(x.double(), depthwise.double(), project.double())
    depthwise.float(), project.float()
    assert not is_supported(x.to("meta"), depthwise, project)
    assert not is_supported(x.requires_grad_(), depthwise, project)
    x.requires_grad_(False)
    wide = convolution(4, 2**17), convolution(2**17, 4)
    assert not is_supported(x, wide[0], depthwise, wide[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_supported(x, depthwise, project)
    monkeypatch.setenv("HPETR_KERNEL", "reference")
    assert not is_supported(x, depthwise, project)


@needs_c
def test_movenet_is_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: what a frozen backbone gives in training and any in inference, and as with gradients."""
    torch.manual_seed(0)
    network = MoveNetBackbone(MoveNetConfig(out_features=["heads4", "half_heads8", "top"])).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    pixels = torch.randn(2, 3, 75, 101)
    calls = []
    monkeypatch.setattr(F, "relu_", lambda x: (calls.append(x.shape), x.clamp_(min=0))[1])
    with_gradients = network(pixels).feature_maps
    assert calls
    calls.clear()
    network.requires_grad_(False)
    found = network(pixels).feature_maps
    assert not calls
    for level, expected in zip(found, with_gradients, strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))
