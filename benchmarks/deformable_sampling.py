"""Time of deformable sampling and of its grid_sample reference in one run: in C on the CPU, in Triton on a GPU.

    python benchmarks/deformable_sampling.py [--threads 2] [--repeats 5] [--device cpu|cuda]

The settings are those of an encoder layer: 8 heads, 4 points, one query per token. "near" samples points around their
query (3 pixels standard deviation on each map), as a trained encoder does; "far" samples points anywhere. Times are the
least of the repeats; the two kernels take turns; backward excludes the forward pass.

On a GPU the script also measures float32 and bfloat16 values, batches of 1 and 8, the largest error relative to the
float64 reference (as a share of the largest value of output and gradients), and the share of the forward pass's
bandwidth limit: the time to move its tensors once at the bandwidth of a copy, measured in the same run, divided by its
time.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpetr.model.ops import deformable_sampling, kernel_name
from hpetr.model.ops.reference import deformable_sampling_reference

HEADS, POINTS = 8, 4
SETTINGS = {
    "800x1333, 4 levels, 8 x 32": ([(100, 167), (50, 84), (25, 42), (13, 21)], 32),
    "288x384, 3 levels, 8 x 16": ([(36, 48), (18, 24), (9, 12)], 16),
}
KERNELS = (deformable_sampling, deformable_sampling_reference)


def make_inputs(
    shapes: list[tuple[int, int]], width: int, near: bool, batch: int = 1, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (B, S, M, D), locations (B, S, M, L, P, 2) and weights (B, S, M, L, P), with gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(batch, tokens, HEADS, width, generator=generator)
    if near:
        axes = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
        centers = torch.cat([torch.cartesian_prod(y, x).flip(-1) for y, x in axes])  # (S, 2)
        sizes = torch.tensor([(w, h) for h, w in shapes])  # (L, 2)
        noise = 3 * torch.randn(batch, tokens, HEADS, levels, POINTS, 2, generator=generator)
        locations = centers[None, :, None, None, None] + noise / sizes[:, None]
    else:
        locations = torch.rand(batch, tokens, HEADS, levels, POINTS, 2, generator=generator)
    weights = torch.rand(batch, tokens, HEADS, levels * POINTS, generator=generator).softmax(-1)
    weights = weights.view(batch, tokens, HEADS, levels, POINTS)
    value, locations, weights = (x.to(device).requires_grad_() for x in (value, locations, weights))
    return value, locations, weights


def milliseconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def measure(
    leaves: tuple[Tensor, Tensor, Tensor], shapes: list[tuple[int, int]], repeats: int, device: str
) -> tuple[list[float], list[float]]:
    """Return the least forward and backward time in milliseconds, each as [kernel, reference]."""
    value, locations, weights = leaves
    outputs = [kernel(value, shapes, locations, weights) for kernel in KERNELS]
    grad_output = torch.randn_like(outputs[0])
    best = {(step, i): float("inf") for step in ("forward", "backward") for i in range(2)}
    for _ in range(repeats):
        for i, kernel in enumerate(KERNELS):
            # the minimum of the faster kernel would be noisier with equal counts
            for _ in range(10 if i == 0 else 1):
                with torch.no_grad():
                    forward = milliseconds(lambda k=kernel: k(value, shapes, locations, weights), device)
                backward = milliseconds(
                    lambda i=i: torch.autograd.grad(outputs[i], leaves, grad_output, retain_graph=True), device
                )
                best["forward", i] = min(best["forward", i], forward)
                best["backward", i] = min(best["backward", i], backward)
    return [best["forward", i] for i in range(2)], [best["backward", i] for i in range(2)]


def largest_error(leaves: tuple[Tensor, Tensor, Tensor], shapes: list[tuple[int, int]]) -> float:
    """Return the largest error of output and three gradients against float64, relative to the largest value of each."""
    value, locations, weights = leaves
    output = deformable_sampling(value, shapes, locations, weights)
    grad_output = torch.randn_like(output)
    results = [output, *torch.autograd.grad(output, leaves, grad_output)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = deformable_sampling_reference(exact[0], shapes, exact[1], exact[2])
    expected = [wanted, *torch.autograd.grad(wanted, exact, grad_output.double())]
    pairs = zip(results, expected, strict=True)
    return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in pairs)


def copy_bandwidth(device: str) -> float:
    """Return the bytes read and written per millisecond by a copy of 1 GiB (on the CPU, of 16 MiB)."""
    source = torch.zeros(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * source.numel() * source.element_size() / best


def compare_on_cpu(repeats: int) -> Iterator[str]:
    yield f"{'setting':30}{'points':8}{'step':10}{'C':>9}{'reference':>11}{'ratio':>8}"
    for name, (shapes, width) in SETTINGS.items():
        for near in (True, False):
            results = measure(make_inputs(shapes, width, near), shapes, repeats, "cpu")
            for step, (c, reference) in zip(("forward", "backward"), results, strict=True):
                points = "near" if near else "far"
                yield f"{name:30}{points:8}{step:10}{c:9.2f}{reference:11.1f}{reference / c:7.1f}x"


def compare_on_gpu(
    repeats: int, shapes: list[tuple[int, int]], width: int, batches: tuple[int, ...], device: str = "cuda"
) -> Iterator[str]:
    """Print the times of forward and of forward + backward."""
    bandwidth = copy_bandwidth(device)
    yield f"4 levels of 800x1333, 8 heads x {width}; a copy moves {bandwidth / 1e6:.0f} GB/s"
    yield f"{'batch':7}{'dtype':10}{'points':8}{'step':10}{'Triton':>9}{'reference':>11}{'ratio':>8}  limit    error"
    for batch in batches:
        for dtype in (torch.float32, torch.bfloat16):
            for near in (True, False):
                value, locations, weights = make_inputs(shapes, width, near, batch, device)
                leaves = (value.detach().to(dtype).requires_grad_(), locations, weights)
                forward, backward = measure(leaves, shapes, repeats, device)
                both = [x + y for x, y in zip(forward, backward, strict=True)]
                # at least: value, locations and weights read once, the output written once
                moved = sum(x.numel() * x.element_size() for x in (*leaves, leaves[0]))
                share = f"{moved / bandwidth / forward[0]:7.0%}"
                error = f"{largest_error(tuple(x[:1].detach().requires_grad_() for x in leaves), shapes):9.1e}"
                kind = f"{batch:<7}{str(dtype)[6:]:10}{'near' if near else 'far':8}"
                for step, (triton, reference), rest in (("forward", forward, share + error), ("both", both, "")):
                    yield f"{kind}{step:10}{triton:9.3f}{reference:11.2f}{reference / triton:7.1f}x{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the CPU, and the GPU if there is one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.device != "cuda":
        if kernel_name("cpu", torch.float32) != "c":
            parser.error("the C kernel is not available here")
        print(f"torch {torch.__version__}, {arguments.threads} threads; milliseconds, best of {arguments.repeats}")
        for line in compare_on_cpu(arguments.repeats):
            print(line, flush=True)
    if arguments.device == "cuda" or (arguments.device is None and torch.cuda.is_available()):
        if not torch.cuda.is_available() or kernel_name("cuda", torch.float32) != "triton":
            parser.error("the Triton kernel is not available here")
        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; milliseconds, best of {arguments.repeats}")
        for line in compare_on_gpu(arguments.repeats, *SETTINGS["800x1333, 4 levels, 8 x 32"], batches=(1, 8)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
