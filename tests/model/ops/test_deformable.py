"""Deformable sampling: the C kernel against the torch reference, and how it is built, chosen and guarded."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpetr.errors import InputError
from hpetr.model.ops import cpu, deformable_sampling, kernel_name
from hpetr.model.ops.reference import deformable_sampling_reference

needs_c = pytest.mark.skipif(cpu.load() is None, reason="no C compiler")


def make_inputs(batch, queries, heads, width, shapes, points, dtype=torch.float64, seed=0):
    """Random arguments; a fifth of the locations lie outside the maps."""
    generator = torch.Generator().manual_seed(seed)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float32)
    locations = torch.rand(batch, queries, heads, levels, points, 2, generator=generator) * 1.25 - 0.125
    weights = torch.rand(batch, queries, heads, levels, points, generator=generator).flatten(-2).softmax(-1)
    weights = weights.view(batch, queries, heads, levels, points)
    return value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)


def run(function, value, shapes, locations, weights, grad_output):
    """Output and the three gradients, in float64."""
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    output = function(leaves[0], shapes, leaves[1], leaves[2])
    grads = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
    return [x.detach().double() for x in (output, *grads)]


def relative_errors(results, expected):
    """Largest error of each tensor in units of its largest magnitude."""
    return [float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in zip(results, expected, strict=True)]


def assert_agrees(inputs, dtype, tolerance):
    """The kernel in `dtype` against the float64 reference on the very same numbers, forward and backward."""
    value, shapes, locations, weights = inputs
    rounded = [x.to(dtype) for x in (value, locations, weights)]
    torch.manual_seed(0)
    grad_output = torch.randn(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]).to(dtype)
    exact = [x.double() for x in rounded]
    expected = run(deformable_sampling_reference, exact[0], shapes, exact[1], exact[2], grad_output)
    results = run(deformable_sampling, rounded[0], shapes, rounded[1], rounded[2], grad_output)
    errors = relative_errors(results, expected)
    assert max(errors) <= tolerance, errors


shapes_strategy = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@needs_c
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 70),
    shapes=shapes_strategy,
    points=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_reference(batch, queries, heads, width, shapes, points, seed):
    inputs = make_inputs(batch, queries, heads, width, shapes, points, seed=seed)
    assert_agrees(inputs, torch.float64, 1e-12)
    assert_agrees(inputs, torch.float32, 1e-6)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_pixel_coordinates_take_the_reference_side(dtype):
    # all sides are powers of two, so the positions are exact: every pixel center, border and corner, and beyond
    shapes = [(8, 4), (2, 2), (1, 1)]
    steps = torch.arange(-4, 21) / 16
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(1, -1, 1, 1, 1, 2)
    value, _, _, weights = make_inputs(1, grid.shape[1], 2, 16, shapes, 1)
    locations = grid.expand(1, grid.shape[1], 2, 3, 1, 2)
    assert_agrees((value, shapes, locations, weights), dtype, 1e-12 if dtype == torch.float64 else 1e-6)


@needs_c
@pytest.mark.parametrize(
    ("heads", "width", "shapes"),
    [(8, 32, [(100, 167), (50, 84), (25, 42), (13, 21)]), (2, 8, [(1, 1), (2, 1)])],
    ids=["maps", "pixels"],
)
def test_many_queries_have_no_gradient_outlier(heads, width, shapes):
    # tens of thousands of points meet on one token: naive float32 sums lose digits here, and a floor() that is off by
    # one would be an outlier of order 1. The bound is 1e-6 of each tensor's largest magnitude.
    assert_agrees(make_inputs(1, 22_000, heads, width, shapes, 4), torch.float32, 1e-6)


@needs_c
def test_points_outside_give_nothing():
    value, shapes, locations, weights = make_inputs(2, 5, 2, 8, [(3, 4)], 2)
    grad_output = torch.ones(2, 5, 16)
    for result in run(deformable_sampling, value, shapes, locations + 5, weights, grad_output):
        assert not result.any()


@needs_c
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38, -1e38])
def test_locations_that_are_not_numbers_are_outside(bad):
    value, shapes, locations, weights = make_inputs(1, 6, 2, 16, [(3, 4), (2, 2)], 3, torch.float32)
    outside = locations.clone()
    locations[:, ::2, :, 0, 1, 0] = bad
    outside[:, ::2, :, 0, 1, 0] = 9.0
    grad_output = torch.ones(1, 6, 32)
    results = run(deformable_sampling, value, shapes, locations, weights, grad_output)
    expected = run(deformable_sampling, value, shapes, outside, weights, grad_output)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


@needs_c
def test_a_nan_token_reaches_only_the_points_that_touch_it():
    value, shapes, locations, weights = make_inputs(1, 50, 1, 8, [(4, 4)], 1, torch.float32)
    value[0, 0] = float("nan")
    expected = deformable_sampling_reference(value, shapes, locations, weights)
    assert torch.equal(deformable_sampling(value, shapes, locations, weights).isnan(), expected.isnan())
    assert 0 < int(expected.isnan().any(-1).sum()) < 50


@needs_c
def test_gradcheck():
    value, shapes, locations, weights = make_inputs(2, 3, 2, 5, [(4, 5), (1, 1), (3, 2)], 3)
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: deformable_sampling(v, shapes, x, w), leaves)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype):
    value, shapes, locations, weights = make_inputs(1, 3, 2, 8, [(4, 5), (2, 2)], 2, torch.float32)
    sides = [side for shape in shapes for side in shape]
    leaves = [x.requires_grad_() for x in (value.to(dtype), locations, weights)]
    operators = torch.ops.hpetr
    arguments = (leaves[0], sides, leaves[1], leaves[2])
    torch.library.opcheck(operators.deformable_sampling.default, arguments)
    detached = (torch.randn(1, 3, 16, dtype=dtype), *(x.detach() if torch.is_tensor(x) else x for x in arguments))
    torch.library.opcheck(operators.deformable_sampling_backward.default, detached)


@needs_c
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("same", [False, True], ids=["float32-locations", "half-locations"])
def test_half_precision_rounds_once(dtype, unit, same):
    # float32 sums of exactly converted inputs: all that is lost is the rounding of the results
    value, shapes, locations, weights = make_inputs(2, 40, 2, 21, [(5, 7), (3, 3)], 4, dtype)
    location_dtype = dtype if same else torch.float32
    locations, weights = locations.to(location_dtype), weights.to(location_dtype)
    output = deformable_sampling(value, shapes, locations, weights)
    exact = [value.double(), locations.double(), weights.double()]
    expected = deformable_sampling_reference(exact[0], shapes, exact[1], exact[2])
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=unit, atol=1e-6)
    torch.manual_seed(0)
    grad_output = torch.randn(2, 40, 42).to(dtype)
    results = run(deformable_sampling, value, shapes, locations, weights, grad_output)
    wanted = run(deformable_sampling_reference, exact[0], shapes, exact[1], exact[2], grad_output)
    errors = relative_errors(results, wanted)
    assert max(errors[:2]) <= unit
    assert max(errors[2:]) <= (unit if same else 1e-6)


@needs_c
def test_autocast_trains_like_float32():
    # what autocast on the CPU gives the kernel: bfloat16 value and weights beside float32 locations
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Linear(16, 16)
            self.offsets = torch.nn.Linear(16, 2 * 2 * 3 * 2)
            self.weights = torch.nn.Linear(16, 2 * 2 * 3)

        def forward(self, x):
            batch, tokens, _ = x.shape
            shape = (batch, tokens, 2, 2, 3)
            weights = self.weights(x).view(batch, tokens, 2, 6).softmax(-1).view(shape)
            locations = torch.full(shape[:1] + (1,) * 5, 0.5) + 0.1 * self.offsets(x).view(*shape, 2)
            value = self.value(x).unflatten(-1, (2, 8))
            return value.dtype, deformable_sampling(value, [(3, 4), (2, 2)], locations, weights)

    torch.manual_seed(0)
    module, x = Module(), torch.randn(2, 16, 16)
    gradients = {}
    for enabled in (False, True):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value_dtype, output = module(x)
        assert output.dtype == value_dtype == (torch.bfloat16 if enabled else torch.float32)
        output.float().square().sum().backward()
        gradients[enabled] = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert gradients[True].isfinite().all()
    assert torch.nn.functional.cosine_similarity(gradients[True], gradients[False], 0) > 0.99


@needs_c
def test_batch_and_threads_do_not_change_a_bit():
    shapes = [(12, 9), (3, 3), (1, 1)]
    value, _, locations, weights = make_inputs(3, 700, 3, 24, shapes, 4, torch.float32)
    grad_output = torch.randn(3, 700, 72)
    together = run(deformable_sampling, value, shapes, locations, weights, grad_output)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for i in range(3):
                one = slice(i, i + 1)
                alone = run(deformable_sampling, value[one], shapes, locations[one], weights[one], grad_output[one])
                assert all(torch.equal(x[one], y) for x, y in zip(together, alone, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", ["reference", pytest.param("c", marks=needs_c)])
@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty_input_gives_empty_output(monkeypatch, kernel, batch, queries):
    monkeypatch.setenv("HPETR_KERNEL", kernel)
    value, shapes, locations, weights = make_inputs(batch, queries, 2, 8, [(3, 4)], 2)
    output, *grads = run(deformable_sampling, value, shapes, locations, weights, torch.ones(batch, queries, 16))
    assert output.shape == (batch, queries, 16)
    assert not any(grad.any() for grad in grads)


@needs_c
def test_strided_input():
    value, shapes, locations, weights = make_inputs(2, 5, 3, 8, [(4, 3), (2, 2)], 4)
    grad_output = torch.randn(1, 5, 1).expand(2, 5, 24).double()
    expected = run(deformable_sampling_reference, value, shapes, locations, weights, grad_output)

    def strided(v, shapes, x, w):
        v = v.transpose(1, 2).contiguous().transpose(1, 2)
        return deformable_sampling(v, shapes, x.flip(-1).flip(-1).transpose(3, 4).contiguous().transpose(3, 4), w)

    assert max(relative_errors(run(strided, value, shapes, locations, weights, grad_output), expected)) < 1e-12


@needs_c
def test_nothing_is_saved_without_grad():
    value, shapes, locations, weights = make_inputs(1, 5, 3, 8, [(4, 3)], 4)
    value.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = deformable_sampling(value, shapes, locations, weights)
        assert output.grad_fn is None
        assert not output.requires_grad
        assert output.is_inference() == (context is torch.inference_mode)


@needs_c
def test_differentiated_twice_is_refused():
    value, shapes, locations, weights = make_inputs(1, 5, 3, 8, [(4, 3)], 4)
    output = deformable_sampling(value.requires_grad_(), shapes, locations, weights)
    (grad,) = torch.autograd.grad(output.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="deformable_sampling_backward"):
        grad.sum().backward()


@needs_c
def test_more_than_2_to_the_31_elements():
    # 4.3 GB of address space; the system gives memory only to the few rows that are written
    tokens, heads, width = 2**23 + 8, 8, 32
    try:
        value = torch.empty(1, tokens, heads, width, dtype=torch.bfloat16)
    except RuntimeError as error:  # a machine without overcommitment
        pytest.skip(str(error))
    assert value.numel() > 2**31
    side = tokens // 8
    value[0, -1] = torch.arange(heads, dtype=torch.bfloat16)[:, None]
    # just inside the right edge of the lowest row: half of the last token and half of nothing
    locations = torch.tensor([1.0, 7.5 / 8]).expand(1, 2, heads, 1, 1, 2)
    output = deformable_sampling(value, [(8, side)], locations, torch.ones(1, 2, heads, 1, 1))
    torch.testing.assert_close(output.view(2, heads, width)[1, :, 5].float(), torch.arange(heads) / 2)


@needs_c
def test_compiles_whole_and_exports_as_reference():
    class Module(torch.nn.Module):
        def forward(self, v, x, w):
            return deformable_sampling(v, [(4, 5), (2, 2)], x, w)

    value, _, locations, weights = make_inputs(1, 3, 2, 8, [(4, 5), (2, 2)], 2)
    module = Module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (value, locations, weights)]
    output = compiled(*leaves)
    torch.testing.assert_close(output, module(value, locations, weights))
    output.square().sum().backward()
    assert all(leaf.grad.any() for leaf in leaves)
    operators = {str(node.target) for node in torch.export.export(module, (value, locations, weights)).graph.nodes}
    assert any("grid_sampler" in name for name in operators)
    assert not any("hpetr" in name for name in operators)


# ------------------------------------------------------------------------------------------------ choice and checks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial_shapes": [(4, 4)]}, "do not add up to value's 12 tokens"),
        ({"spatial_shapes": [(3, 4), (0, 5)]}, "positive sizes"),
        ({"spatial_shapes": [(-3, -4)]}, "positive sizes"),
        ({"spatial_shapes": [(1, 2**24)]}, "below 2\\^24"),
        ({"spatial_shapes": []}, "do not add up"),
        (
            {"spatial_shapes": [(2**16, 2**15)], "value": torch.empty(1, 1, 1, 1).expand(1, 2**31, 2, 8)},
            "fewer than 2\\^31 tokens",
        ),
        ({"value": torch.rand(1, 12, 2, 0)}, "must not be 0"),
        (
            {"sampling_locations": torch.rand(1, 5, 2, 1, 0, 2), "attention_weights": torch.rand(1, 5, 2, 1, 0)},
            "not be 0",
        ),
        ({"value": torch.rand(1, 12, 2, 8).to_sparse()}, "dense"),
        ({"value": torch.rand(1, 12, 2, 8).to_mkldnn()}, "dense"),
        ({"value": torch.ones(1, 12, 2, 8, dtype=torch.int32)}, "dtype"),
        ({"value": torch.ones(1, 12, 2, 8, dtype=torch.complex64)}, "dtype"),
        ({"spatial_shapes": [(3, 2), (3, 2)]}, "sampling_locations"),
        ({"attention_weights": torch.rand(1, 5, 2, 1, 3)}, "attention_weights"),
        ({"value": torch.rand(1, 12, 16)}, "expected value"),
        ({"value": torch.rand(1, 12, 2, 8).double()}, "dtype"),
        ({"sampling_locations": torch.rand(1, 5, 2, 1, 2, 2).half()}, "dtype"),
        ({"value": torch.rand(1, 12, 2, 8, device="meta")}, "devices"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    value, shapes, locations, weights = make_inputs(1, 5, 2, 8, [(3, 4)], 2, torch.float32)
    arguments = {
        "value": value,
        "spatial_shapes": shapes,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    with pytest.raises(ValueError, match=message):
        deformable_sampling(**(arguments | change))


def test_kernel_setting(monkeypatch):
    monkeypatch.setenv("HPETR_KERNEL", "reference")
    assert kernel_name("cpu", torch.float32) == "reference"
    monkeypatch.setenv("HPETR_KERNEL", "c")
    with pytest.raises(InputError, match="HPETR_KERNEL=c: expected a CPU tensor"):
        kernel_name("cuda", torch.float32)
    monkeypatch.setenv("HPETR_KERNEL", "triton")
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float64)):
        with pytest.raises(InputError, match="HPETR_KERNEL=triton: expected a GPU tensor"):
            kernel_name(device, dtype)
    monkeypatch.setenv("HPETR_KERNEL", "fast")
    with pytest.raises(InputError, match="HPETR_KERNEL=fast"):
        kernel_name("cpu", torch.float32)
    monkeypatch.delenv("HPETR_KERNEL")
    assert kernel_name("cpu", torch.float8_e5m2) == "reference"
    assert kernel_name("meta", torch.float32) == "reference"


SCRIPT = """
import logging, torch
logging.basicConfig(format="LOG %(message)s")
from hpetr.model.ops import deformable_sampling, kernel_name
value = torch.arange(12.0).view(1, 12, 1, 1)
locations = torch.full((1, 2, 1, 1, 1, 2), 0.5)
for _ in range(2):
    output = deformable_sampling(value, [(3, 4)], locations, torch.ones(1, 2, 1, 1, 1))
print(kernel_name("cpu", torch.float32), output.flatten().tolist())
"""


def start(**environment):
    variables = {k: v for k, v in os.environ.items() if k not in ("CC", "HPETR_KERNEL")}
    variables |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip(), [line for line in errors.splitlines() if line.startswith("LOG")]


@needs_c
def test_two_processes_build_at_once(tmp_path):
    processes = [start(HPETR_CACHE=str(tmp_path)) for _ in range(2)]
    assert [finish(process) for process in processes] == [("c [5.5, 5.5]", [])] * 2
    assert len(list(tmp_path.iterdir())) == 1  # one library, no temporary left


def test_without_compiler_the_reference_runs_and_says_so_once(tmp_path):
    output, log = finish(start(HPETR_CACHE=str(tmp_path / "cache"), PATH=str(tmp_path)))
    assert output == "reference [5.5, 5.5]"
    assert len(log) == 1
    assert "no C compiler" in log[0]


@pytest.mark.parametrize(("compiler", "message"), [("false", "false failed"), ('"cc', "quotation")])
def test_compiler_that_fails_is_reported_once(tmp_path, compiler, message):
    output, log = finish(start(HPETR_CACHE=str(tmp_path), CC=compiler))
    assert output == "reference [5.5, 5.5]"
    assert len(log) == 1
    assert message in log[0]


@needs_c
def test_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    output, log = finish(start(HPETR_CACHE=str(tmp_path / "file" / "cache"), TMPDIR=str(tmp_path / "tmp")))
    assert (output, log) == ("c [5.5, 5.5]", [])
    assert not list((tmp_path / "tmp").iterdir())


@needs_c
def test_broken_library_in_the_cache_is_not_used(tmp_path):
    assert finish(start(HPETR_CACHE=str(tmp_path)))[0] == "c [5.5, 5.5]"
    (library,) = tmp_path.iterdir()
    library.write_bytes(b"")
    assert finish(start(HPETR_CACHE=str(tmp_path))) == ("c [5.5, 5.5]", [])
