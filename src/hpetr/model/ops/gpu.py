"""Deformable sampling in Triton: two kernels, compiled at first use, and two torch operators.

The operators work with autograd, `torch.compile` and inference mode. They rely on `hpetr.model.ops.deformable_sampling`
to have checked shapes, dtypes and devices. The package `triton` comes with the GPU builds of torch; `hpetr.model.ops`
imports this module when a tensor on a GPU needs it.

A program takes one head of a block of consecutive queries. Their points mostly lie near each other, so that shared
pixels are read from the multiprocessor's cache.
"""

import logging
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hpetr.errors import first_line
from hpetr.model.ops.operators import complete_operators

logger = logging.getLogger("hpetr")

# Elements (queries x head width) of a program, forward and backward, and its warps. With 4 or 8 elements a thread,
# float32 and bfloat16 rows are read 16 bytes at a time.
_FORWARD_TILE, _BACKWARD_TILE, _WARPS = 1024, 512, 4


@triton.jit
def _pixel(location, side):
    """Return whole part and fraction of location * side - 0.5, exact at pixel borders.

    In plain float32, a location within 1e-5 of a border on a map 200 wide falls on its wrong side and has a wrong
    gradient. The upper 12 bits of the location times a side below 4096 are exact, and so is the remainder.
    """
    upper = (location.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    rest = (location - upper) * side
    position = upper * side - 0.5
    whole = tl.floor(position)
    fraction = position - whole
    carry = tl.floor(fraction + rest)
    rest += fraction - carry
    # The sum may have been rounded up to the border.
    short = tl.where(rest < 0.0, 1.0, 0.0)
    return whole + (carry - short), rest + short


@triton.jit
def _locate(x_location, y_location, width, height):
    """Return the top left pixel (x, y), the fractions to its right and below, and which corners are on the map.

    Corners: top left, top right, bottom left, bottom right. NaN and infinite locations are outside, at pixel (0, 0).
    """
    x, right = _pixel(x_location, width)
    y, below = _pixel(y_location, height)
    inside = (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)  # false for NaN
    x, right = tl.where(inside, x, 0.0), tl.where(inside, right, 0.0)
    y, below = tl.where(inside, y, 0.0), tl.where(inside, below, 0.0)
    x0, x1, y0, y1 = inside & (x >= 0.0), inside & (x + 1.0 < width), y >= 0.0, y + 1.0 < height
    return x.to(tl.int32), y.to(tl.int32), right, below, x0 & y0, x1 & y0, x0 & y1, x1 & y1


@triton.jit
def _block(tokens, queries, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the program's rows (BLOCK,) of queries and heads, which of them exist, and the head's start in value."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK)
    head, task = program % HEADS, program // HEADS
    batch, begin = (task // blocks).to(tl.int64), (task % blocks) * BLOCK
    query = begin + tl.arange(0, BLOCK)
    return (batch * queries + query) * HEADS + head, query < queries, batch * tokens * HEADS + head


# Not specialized: tokens and queries change from image to image, and each multiple of 16 would be compiled again.
@triton.jit(do_not_specialize=["tokens", "queries"])
def _forward_kernel(
    value_pointer,
    locations_pointer,
    weights_pointer,
    output_pointer,
    sides,
    tokens,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """`sides`: height and width of every level. CHANNELS: WIDTH, rounded up to a power of two."""
    rows, exists, head = _block(tokens, queries, HEADS, BLOCK)
    channels = tl.arange(0, CHANNELS)[None, :]
    in_width = channels < WIDTH
    location_pointers = locations_pointer + rows[:, None] * (LEVELS * POINTS * 2) + tl.arange(0, 2)[None, :]
    weights_pointer += rows * (LEVELS * POINTS)
    values = value_pointer + head * WIDTH + channels  # (1, CHANNELS), of the level's first token
    sums = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for level in tl.static_range(LEVELS):
        height, width = sides[2 * level], sides[2 * level + 1]
        down = tl.cast(width, tl.int32)
        for point in range(level * POINTS, (level + 1) * POINTS):
            # Rows past the last query lie outside.
            x, y = tl.split(tl.load(location_pointers + 2 * point, mask=exists[:, None], other=-9.0).to(tl.float32))
            weight = tl.load(weights_pointer + point, mask=exists, other=0.0).to(tl.float32)
            x, y, right, below, in00, in01, in10, in11 = _locate(x, y, width, height)
            token = (y * down + x).to(INDEX)[:, None]
            row00 = values + token * (HEADS * WIDTH)
            row10 = values + (token + down) * (HEADS * WIDTH)
            value00 = tl.load(row00, mask=in00[:, None] & in_width, other=0.0).to(tl.float32)
            value01 = tl.load(row00 + HEADS * WIDTH, mask=in01[:, None] & in_width, other=0.0).to(tl.float32)
            value10 = tl.load(row10, mask=in10[:, None] & in_width, other=0.0).to(tl.float32)
            value11 = tl.load(row10 + HEADS * WIDTH, mask=in11[:, None] & in_width, other=0.0).to(tl.float32)
            top, bottom = weight * (1.0 - below), weight * below
            sums += (top * (1.0 - right))[:, None] * value00 + (top * right)[:, None] * value01
            sums += (bottom * (1.0 - right))[:, None] * value10 + (bottom * right)[:, None] * value11
        values += (tl.cast(height, tl.int32) * down).to(tl.int64) * (HEADS * WIDTH)
    output = output_pointer + rows[:, None] * WIDTH + channels
    tl.store(output, sums.to(output_pointer.dtype.element_ty), mask=exists[:, None] & in_width)


@triton.jit(do_not_specialize=["tokens", "queries"])
def _backward_kernel(
    grad_output_pointer,
    value_pointer,
    locations_pointer,
    weights_pointer,
    grad_value_pointer,
    grad_locations_pointer,
    grad_weights_pointer,
    sides,
    tokens,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """See `_forward_kernel`; `grad_value_pointer` is float32 and zero on entry: programs add to the same tokens."""
    rows, exists, head = _block(tokens, queries, HEADS, BLOCK)
    channels = tl.arange(0, CHANNELS)[None, :]
    in_width = channels < WIDTH
    grad_output_pointers = grad_output_pointer + rows[:, None] * WIDTH + channels
    grad = tl.load(grad_output_pointers, mask=exists[:, None] & in_width, other=0.0).to(tl.float32)
    location_pointers = locations_pointer + rows[:, None] * (LEVELS * POINTS * 2) + tl.arange(0, 2)[None, :]
    grad_location_pointers = grad_locations_pointer + rows[:, None] * (LEVELS * POINTS * 2) + tl.arange(0, 2)[None, :]
    weights_pointer += rows * (LEVELS * POINTS)
    grad_weights_pointer += rows * (LEVELS * POINTS)
    start = head * WIDTH
    for level in tl.static_range(LEVELS):
        height, width = sides[2 * level], sides[2 * level + 1]
        down = tl.cast(width, tl.int32)
        values, grad_values = value_pointer + start + channels, grad_value_pointer + start + channels
        for point in range(level * POINTS, (level + 1) * POINTS):
            x, y = tl.split(tl.load(location_pointers + 2 * point, mask=exists[:, None], other=-9.0).to(tl.float32))
            weight = tl.load(weights_pointer + point, mask=exists, other=0.0).to(tl.float32)
            x, y, right, below, in00, in01, in10, in11 = _locate(x, y, width, height)
            mask00, mask01 = in00[:, None] & in_width, in01[:, None] & in_width
            mask10, mask11 = in10[:, None] & in_width, in11[:, None] & in_width
            token = (y * down + x).to(INDEX)[:, None]
            row00, row10 = token * (HEADS * WIDTH), (token + down) * (HEADS * WIDTH)
            row01, row11 = row00 + HEADS * WIDTH, row10 + HEADS * WIDTH
            value00 = tl.load(values + row00, mask=mask00, other=0.0).to(tl.float32)
            value01 = tl.load(values + row01, mask=mask01, other=0.0).to(tl.float32)
            value10 = tl.load(values + row10, mask=mask10, other=0.0).to(tl.float32)
            value11 = tl.load(values + row11, mask=mask11, other=0.0).to(tl.float32)
            top, bottom = weight * (1.0 - below), weight * below
            tl.atomic_add(grad_values + row00, (top * (1.0 - right))[:, None] * grad, mask=mask00, sem="relaxed")
            tl.atomic_add(grad_values + row01, (top * right)[:, None] * grad, mask=mask01, sem="relaxed")
            tl.atomic_add(grad_values + row10, (bottom * (1.0 - right))[:, None] * grad, mask=mask10, sem="relaxed")
            tl.atomic_add(grad_values + row11, (bottom * right)[:, None] * grad, mask=mask11, sem="relaxed")
            right, below = right[:, None], below[:, None]
            upper = value00 + right * (value01 - value00)
            lower = value10 + right * (value11 - value10)
            slope_x = (1.0 - below) * (value01 - value00) + below * (value11 - value10)
            grad_weight = tl.sum(grad * (upper + below * (lower - upper)), 1)
            grad_x = weight * width * tl.sum(grad * slope_x, 1)
            grad_y = weight * height * tl.sum(grad * (lower - upper), 1)
            tl.store(grad_weights_pointer + point, grad_weight, mask=exists)  # casts
            grad_location = tl.join(grad_x, grad_y)
            tl.store(grad_location_pointers + 2 * point, grad_location, mask=exists[:, None])
        start += (tl.cast(height, tl.int32) * down).to(tl.int64) * (HEADS * WIDTH)


def _launch(kernel, tile: int, value: Tensor, weights: Tensor, sides: Sequence[int], *tensors: Tensor) -> None:
    """Run a kernel on blocks of `tile` elements; `tensors` are all its pointers, contiguous, in order."""
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points = weights.shape
    channels = triton.next_power_of_2(width)
    block = max(tile // channels, 1)
    index = tl.int32 if tokens * heads * width < 2**31 else tl.int64
    # float32: integers in a tuple are compiled in, once for each pattern of ones and multiples of 16.
    sizes = (tuple(float(side) for side in sides), tokens, queries)
    constants = (heads, width, levels, points, block, channels, index)
    with torch.cuda.device_of(value):  # Triton launches on the current device
        grid = (batch * heads * triton.cdiv(queries, block),)
        kernel[grid](*tensors, *sizes, *constants, num_warps=_WARPS)


def _refuse_if_deterministic() -> None:
    """Raise or warn, like torch's own operators, if deterministic algorithms are wanted."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = "the gradient of deformable sampling's value is not deterministic on a GPU (HPETR_KERNEL=triton)"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"{message}, but torch.use_deterministic_algorithms(True) was called")
    warnings.warn(message, stacklevel=2)


@torch.library.custom_op("hpetr::deformable_sampling_triton", mutates_args=())
def _forward(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    output = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])  # (B, Q, M*D)
    if output.numel():
        tensors = (value, locations, weights, output)
        _launch(_forward_kernel, _FORWARD_TILE, value, weights, sides, *tensors)
    return output


@torch.library.custom_op("hpetr::deformable_sampling_triton_backward", mutates_args=())
def _backward(
    grad_output: Tensor, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_if_deterministic()
    inputs = [x.contiguous() for x in (grad_output, value, locations, weights)]
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations, grad_weights = torch.empty_like(inputs[2]), torch.empty_like(inputs[3])
    if grad_output.numel():
        tensors = (*inputs, grad_value, grad_locations, grad_weights)
        _launch(_backward_kernel, _BACKWARD_TILE, value, weights, sides, *tensors)
    return grad_value.to(value.dtype), grad_locations, grad_weights


complete_operators(_forward, _backward)


def is_available(device: torch.device) -> bool:
    """Run the kernel once and return whether it works on a device; the log has the reason if it does not.

    Triton needs a GPU that it knows, and a C compiler and Python's headers for the code that launches kernels.
    """
    try:
        point = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
        one = torch.ones(1, 1, 1, 1, device=device)
        if _forward(one, [1, 1], point, one[..., None]).item() == 1.0:
            return True
        reason = "it gives a wrong result"
    except Exception as error:  # Triton, its compilers and the driver raise all kinds
        reason = first_line(error)
    logger.warning("deformable sampling uses slow plain torch on %s, as Triton does not work here: %s", device, reason)
    return False
