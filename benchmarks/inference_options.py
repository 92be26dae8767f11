"""Time of the network in float32, in bfloat16 and compiled, and the differences of its results.

    python benchmarks/inference_options.py [CHECKPOINT or PRESET] [--size 288x384] [--threads 2] [--device cpu]
        [--repeats 10] [--compile]

The options have the same weights and take turns, so that other load on the machine affects
all of them. `--compile` adds torch.compile, whose first run takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.checkpoints.folder import load_checkpoint
from hpetr.inference.precision import autocast
from hpetr.model.hpetr import HPetrOutput
from hpetr.model.presets import PRESETS


def load(target: str | None, device: str) -> HPetrForPoseEstimation:
    if target in PRESETS:
        torch.manual_seed(0)
        return HPetrForPoseEstimation(HPetrConfig.preset(target)).eval().to(device)
    return load_checkpoint(target, device)[0]


def timed(model: HPetrForPoseEstimation, precision: str, pixels: torch.Tensor) -> tuple[float, HPetrOutput]:
    start = time.perf_counter()
    with autocast(model.device, precision):
        output = model(pixels)
    output.scores.cpu()  # waits for a GPU
    return time.perf_counter() - start, output


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="checkpoint folder or preset; default: the bundled checkpoint")
    parser.add_argument("--size", default="288x384", help="height x width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    height, width = (int(side) for side in args.size.split("x"))
    pixels = torch.randn(1, 3, height, width, device=args.device)
    model = load(args.target, args.device)
    models = {"float32": (model, "float32"), "bfloat16": (model, "bfloat16")}
    if args.compile:
        compiled = copy.deepcopy(model)
        compiled.compile(dynamic=True)
        models["compiled"] = (compiled, "float32")
    first = {name: timed(*each, pixels) for name, each in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, each in models.items():
            seconds[name].append(timed(*each, pixels)[0])
    reference = first["float32"][1]
    plain = statistics.median(seconds["float32"])
    print(f"{args.target or 'bundled checkpoint'}, {args.size}, {args.device}, {args.threads} threads")
    print(f"{'':10}{'median ms':>11}{'least ms':>10}{'times faster':>14}{'first run s':>13}{'best score moves':>18}")
    for name, values in seconds.items():
        median = statistics.median(values)
        moved = (first[name][1].scores[0, 0] - reference.scores[0, 0]).abs().item()
        print(
            f"{name:10}{1e3 * median:>11.1f}{1e3 * min(values):>10.1f}{plain / median:>14.2f}{first[name][0]:>13.1f}"
            f"{moved:>18.1e}"
        )


if __name__ == "__main__":
    main()
