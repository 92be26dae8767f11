"""Time of deformable sampling on the CPU: the C kernel beside the grid_sample reference, in one run.

    python benchmarks/deformable_sampling.py [--threads 2] [--repeats 5]

Two settings of an encoder layer, float32, one picture, 8 heads, 4 points, as many queries as tokens. "near": points
around their query (3 pixels standard deviation on each map), as a trained encoder samples; "far": points anywhere.
Times are the best of the repeats, the two kernels taking turns; backward excludes the forward pass.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hpetr.kernels import kernel_name
from hpetr.kernels.cpu import deformable_sampling_c
from hpetr.kernels.reference import deformable_sampling_reference

HEADS, POINTS = 8, 4
SETTINGS = {
    "800x1333, 4 levels, 8 x 32": ([(100, 167), (50, 84), (25, 42), (13, 21)], 32),
    "288x384, 3 levels, 8 x 16": ([(36, 48), (18, 24), (9, 12)], 16),
}


def make_inputs(shapes: list[tuple[int, int]], width: int, near: bool) -> tuple[Tensor, Tensor, Tensor]:
    """value (1, S, M, D), locations (1, S, M, L, P, 2) and weights (1, S, M, L, P), all needing gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(1, tokens, HEADS, width, generator=generator)
    if near:
        axes = [((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
        centres = torch.cat([torch.cartesian_prod(y, x).flip(-1) for y, x in axes])  # (S, 2)
        sizes = torch.tensor([(w, h) for h, w in shapes])  # (L, 2)
        noise = 3 * torch.randn(1, tokens, HEADS, levels, POINTS, 2, generator=generator)
        locations = centres[None, :, None, None, None] + noise / sizes[:, None]
    else:
        locations = torch.rand(1, tokens, HEADS, levels, POINTS, 2, generator=generator)
    weights = torch.rand(1, tokens, HEADS, levels * POINTS, generator=generator).softmax(-1)
    weights = weights.view(1, tokens, HEADS, levels, POINTS)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(shapes: list[tuple[int, int]], width: int, near: bool, repeats: int) -> tuple[list[float], list[float]]:
    """Best forward and backward time in milliseconds, each as [C, reference]."""
    leaves = make_inputs(shapes, width, near)
    value, locations, weights = leaves
    kernels = (deformable_sampling_c, deformable_sampling_reference)
    outputs = [kernel(value, shapes, locations, weights) for kernel in kernels]
    grad_output = torch.randn_like(outputs[0])
    best = {(step, i): float("inf") for step in ("forward", "backward") for i in range(2)}
    for _ in range(repeats):
        for i, kernel in enumerate(kernels):
            # the C kernel is so much faster that equal counts would leave it the noisier minimum
            for _ in range(10 if i == 0 else 1):
                with torch.no_grad():
                    forward = seconds(lambda k=kernel: k(value, shapes, locations, weights))
                backward = seconds(lambda i=i: torch.autograd.grad(outputs[i], leaves, grad_output, retain_graph=True))
                best["forward", i] = min(best["forward", i], forward * 1e3)
                best["backward", i] = min(best["backward", i], backward * 1e3)
    return [best["forward", i] for i in range(2)], [best["backward", i] for i in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if kernel_name("cpu", torch.float32) != "c":
        parser.error("the C kernel is not available here")
    print(f"torch {torch.__version__}, {arguments.threads} threads; milliseconds, best of {arguments.repeats}")
    print(f"{'setting':30}{'points':8}{'step':10}{'C':>9}{'reference':>11}{'ratio':>8}")
    for name, (shapes, width) in SETTINGS.items():
        for near in (True, False):
            results = measure(shapes, width, near, arguments.repeats)
            for step, (c, reference) in zip(("forward", "backward"), results, strict=True):
                points = "near" if near else "far"
                print(f"{name:30}{points:8}{step:10}{c:9.2f}{reference:11.1f}{reference / c:7.1f}x", flush=True)


if __name__ == "__main__":
    main()
