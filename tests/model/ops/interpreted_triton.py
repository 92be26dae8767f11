"""The Triton kernel against the float64 reference, in Triton's interpreter: no GPU needed.

`test_triton.py` runs this file in a process of its own, as `TRITON_INTERPRET=1` has to be set before anything imports
Triton. The interpreter takes some 10 ms for each point of a block of queries: the shapes are small.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpetr.model.ops import deformable_sampling, gpu, kernel_name
from hpetr.model.ops.reference import deformable_sampling_reference
from model.ops.test_deformable import make_inputs, relative_errors, run


def deformable_sampling_triton(value, shapes, locations, weights):
    sides = [side for shape in shapes for side in shape]
    return torch.ops.hpetr.deformable_sampling_triton(value, sides, locations, weights)


def errors(inputs, dtype=torch.float32, location_dtype=torch.float32):
    """Relative errors of output and three gradients against float64, on the very same numbers."""
    value, shapes, locations, weights = inputs
    rounded = [value.to(dtype), locations.to(location_dtype), weights.to(location_dtype)]
    grad_output = torch.randn(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).to(dtype)
    exact = [x.double() for x in rounded]
    expected = run(deformable_sampling_reference, exact[0], shapes, exact[1], exact[2], grad_output)
    return relative_errors(run(deformable_sampling_triton, rounded[0], shapes, *rounded[1:], grad_output), expected)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 9),
    heads=st.integers(1, 2),
    width=st.integers(1, 40),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=2),
    points=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_reference(batch, queries, heads, width, shapes, points, seed):
    assert max(errors(make_inputs(batch, queries, heads, width, shapes, points, torch.float32, seed))) <= 1e-5


@pytest.mark.parametrize(
    ("queries", "heads", "width", "shapes", "points"),
    [
        (40, 1, 32, [(9, 12)], 2),  # several blocks of queries, the last one not full
        (3, 2, 21, [(9, 12), (5, 6), (3, 3), (1, 1)], 4),
        (3, 1, 16, [(9, 12), (1, 1)], 17),
        (2, 1, 2000, [(2, 2)], 1),  # wider than a program's share of elements
    ],
    ids=["blocks", "levels", "points", "wide"],
)
def test_sizes_of_models(queries, heads, width, shapes, points):
    assert max(errors(make_inputs(1, queries, heads, width, shapes, points, torch.float32))) <= 1e-5


def test_exact_pixel_coordinates_take_the_reference_side():
    # every pixel center, border and corner of maps whose sides are powers of two, where positions are exact, and beyond
    steps = torch.arange(-2, 11) / 8
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, -1, 1, 1, 1, 2)
    value, shapes, _, weights = make_inputs(1, grid.shape[1], 1, 16, [(4, 2), (1, 1)], 1)
    assert max(errors((value, shapes, grid.expand(1, -1, 1, 2, 1, 2), weights))) <= 1e-5


def test_locations_beside_a_border_take_the_reference_side():
    # the float32 numbers nearest to the borders of a map 167 wide: positions in float32 would mostly be integers
    columns = ((torch.arange(167, dtype=torch.float64) + 0.5) / 167).float()
    x = torch.cat([columns, columns.nextafter(torch.tensor(2.0)), columns.nextafter(torch.tensor(-1.0))])
    locations = torch.stack([x, torch.full_like(x, 0.3)], -1).view(1, -1, 1, 1, 1, 2)
    value, shapes, _, weights = make_inputs(1, len(x), 1, 8, [(2, 167)], 1)
    assert max(errors((value, shapes, locations, weights))) <= 1e-5


# The interpreter truncates bfloat16 where a GPU rounds: a whole unit of the last place.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("same", [False, True], ids=["float32-locations", "half-locations"])
def test_half_precision_rounds_once(dtype, tolerance, same):
    inputs = make_inputs(2, 20, 1, 21, [(5, 7), (3, 3)], 2, torch.float32)
    results = errors(inputs, dtype, dtype if same else torch.float32)
    assert max(results[:2]) <= tolerance
    assert max(results[2:]) <= (tolerance if same else 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e38])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_locations_that_are_not_numbers_are_outside(bad):
    value, shapes, locations, weights = make_inputs(1, 6, 1, 16, [(3, 4), (2, 2)], 2, torch.float32)
    outside = locations.clone()
    locations[:, ::2, :, 0, 1, 0] = bad
    outside[:, ::2, :, 0, 1, 0] = 9.0
    grad_output = torch.ones(1, 6, 16)
    results = run(deformable_sampling_triton, value, shapes, locations, weights, grad_output)
    expected = run(deformable_sampling_triton, value, shapes, outside, weights, grad_output)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_nan_token_reaches_only_the_points_that_touch_it():
    value, shapes, locations, weights = make_inputs(1, 50, 1, 8, [(4, 4)], 1, torch.float32)
    value[0, 0] = float("nan")
    expected = deformable_sampling_reference(value, shapes, locations, weights)
    assert torch.equal(deformable_sampling_triton(value, shapes, locations, weights).isnan(), expected.isnan())
    assert 0 < int(expected.isnan().any(-1).sum()) < 50


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty_input_gives_empty_output(batch, queries):
    inputs = make_inputs(batch, queries, 2, 8, [(3, 4)], 2, torch.float32)
    output, *grads = run(deformable_sampling_triton, *inputs, torch.ones(batch, queries, 16))
    assert output.shape == (batch, queries, 16)
    assert not any(grad.any() for grad in grads)


def test_strided_input():
    value, shapes, locations, weights = make_inputs(2, 5, 2, 8, [(4, 3)], 2, torch.float32)
    grad_output = torch.randn(1, 5, 1).expand(2, 5, 16)
    expected = run(deformable_sampling_triton, value, shapes, locations, weights, grad_output.contiguous())
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (value, locations, weights)]
    results = run(deformable_sampling_triton, turned[0], shapes, *turned[1:], grad_output)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    value, shapes, locations, weights = make_inputs(1, 3, 1, 8, [(4, 5)], 1, torch.float32)
    sides = [side for shape in shapes for side in shape]
    leaves = [x.requires_grad_() for x in (value.to(dtype), locations, weights)]
    operators = torch.ops.hpetr
    arguments = (leaves[0], sides, leaves[1], leaves[2])
    torch.library.opcheck(operators.deformable_sampling_triton.default, arguments)
    detached = (torch.randn(1, 3, 8, dtype=dtype), *(x.detach() if torch.is_tensor(x) else x for x in arguments))
    torch.library.opcheck(operators.deformable_sampling_triton_backward.default, detached)


def test_chosen_by_the_setting_and_compiled_whole(monkeypatch):
    assert kernel_name("cpu", torch.float32) != "triton"  # the interpreter is for tests only
    monkeypatch.setenv("HPETR_KERNEL", "triton")
    assert kernel_name("cpu", torch.float32) == "triton"
    value, shapes, locations, weights = make_inputs(1, 3, 1, 8, [(4, 5)], 2, torch.float32)
    expected = deformable_sampling_reference(value, shapes, locations, weights)
    compiled = torch.compile(lambda v, x, w: deformable_sampling(v, shapes, x, w), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(value, locations, weights), expected)


def test_deterministic_algorithms_refuse_the_gradient():
    value, shapes, locations, weights = make_inputs(1, 2, 1, 4, [(2, 2)], 1, torch.float32)
    output = deformable_sampling_triton(value.requires_grad_(), shapes, locations, weights)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_failing_kernel_is_reported_and_not_used(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "_forward", lambda *_: torch.zeros(1))
    assert not gpu.is_available(torch.device("cpu"))
    assert "wrong result" in caplog.text
