"""Time of a checkpoint in torch and of its ONNX file in ONNX Runtime, side by side in one run.

    python benchmarks/runtime_latency.py checkpoint-folder model.onnx [--picture FILE] [--threads 2] [--repeats 20]

One photograph, decoded once: resize, network and post-processing, float32, batch 1, in turn so that both see the same
machine. The largest differences of scores and keypoints stand below.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from hpetr import PosePredictor
from hpetr.data.images import load_image
from hpetr.runtime import ExportedPredictor

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("model", help="what `hpetr export` made of it")
    parser.add_argument("--picture", type=Path, default=ROOT / "examples" / "000000000785.jpg")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    picture = load_image(args.picture)
    predictors = {
        "torch": PosePredictor(args.checkpoint, "cpu", 0.0),
        "ONNX Runtime": ExportedPredictor(args.model, 0.0, threads=args.threads, device="cpu"),
    }
    results = {name: predictor(picture) for name, predictor in predictors.items()}
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(args.repeats):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor(picture)
            times[name].append((time.perf_counter() - start) * 1e3)
    height, width = picture.shape[:2]
    print(f"{height} x {width} picture, {args.threads} threads, float32, milliseconds")
    print(f"{'':14}{'median':>8}{'least':>8}")
    for name, taken in times.items():
        print(f"{name:14}{statistics.median(taken):>8.1f}{min(taken):>8.1f}")
    ours, theirs = results.values()
    print(f"largest difference of a score: {np.abs(ours.scores - theirs.scores).max():.1e}")
    print(f"largest difference of a coordinate: {np.abs(ours.keypoints - theirs.keypoints).max():.1e} pixels")


if __name__ == "__main__":
    main()
