"""Time of MoveNet's network with its separable convolutions in C and with torch's convolutions.

    python benchmarks/separable_convolutions.py [--size 384x512] [--threads 2] [--repeats 20]

Float32, batch 1, random pixels, h-petr-nano's weights. Every repeat times each stage with both kernels in turn. The
factor is the quotient of the medians.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.inference.precision import keep_freed_memory
from hpetr.model.backbones.movenet import MoveNetBackbone


def side_by_side(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of `function` with each kernel."""
    times: dict[str, list[float]] = {"c": [], "reference": []}
    for repeat in range(repeats + 3):
        for kernel, spent in times.items():
            os.environ["HPETR_KERNEL"] = kernel
            start = time.perf_counter()
            function()
            if repeat >= 3:
                spent.append((time.perf_counter() - start) * 1e3)
    return {kernel: statistics.median(spent) for kernel, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="384x512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    body = load_checkpoint(None, "cpu")[0].backbone.body
    assert isinstance(body, MoveNetBackbone)
    pixels = torch.randn(1, 3, height, width)
    inputs: dict[str, tuple[Callable[..., object], Tensor]] = {}
    with torch.inference_mode():
        x = body.activation(body.stem(pixels.contiguous(memory_format=torch.channels_last)))
        for number, stage in enumerate(body.stages, 1):
            inputs[f"stage {number}"] = (stage, x)
            x = stage(x)
        inputs["heads"] = (
            body._heads,
            torch.randn(1, 24, height // 4, width // 4).to(memory_format=torch.channels_last),
        )
        inputs["whole network, both sizes"] = (body, pixels)
        print(f"{height} x {width} pixels, {args.threads} threads, median milliseconds")
        print(f"{'':28}{'torch':>8}{'C':>8}{'times faster':>14}")
        for name, (module, x) in inputs.items():
            found = side_by_side(functools.partial(module, x), args.repeats)
            torch_ms, c_ms = found["reference"], found["c"]
            print(f"{name:28}{torch_ms:8.2f}{c_ms:8.2f}{torch_ms / c_ms:14.2f}")


if __name__ == "__main__":
    main()
