"""Time of a checkpoint in torch and of its exported files, in one run.

    python benchmarks/runtime_latency.py [checkpoint-folder model.onnx model.xml ...] [--image FILE] [--threads 2]

Without arguments it exports the bundled model to ONNX and OpenVINO first. One photograph is decoded once; resize,
network and post-processing are timed, float32, batch 1. The models take turns, so that other load on the machine
affects all of them. The table also has the largest differences from torch in scores, and in keypoints in pixels, of
poses above the model's threshold.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hpetr import PosePredictor
from hpetr.checkpoints.folder import BUNDLED, load_checkpoint
from hpetr.export.write import export_model
from hpetr.images.read import load_image
from hpetr.poses.predictor import Predictor
from hpetr.runtime import ExportedPredictor

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=BUNDLED)
    parser.add_argument("models", nargs="*", help="files that `hpetr export` made of it")
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "000000000785.jpg")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, args.models or export(args.checkpoint, Path(folder)))


def export(checkpoint: str, folder: Path) -> list[str]:
    """Export the bundled model and return its ONNX and OpenVINO files."""
    model, processor = load_checkpoint(checkpoint, "cpu")
    files = [folder / "model.onnx", folder / "model.xml"]
    for file, form in zip(files, ("onnx", "openvino"), strict=True):
        export_model(model, processor, file, form)
    return [str(file) for file in files]


def compare(args: argparse.Namespace, models: list[str]) -> None:
    torch.set_num_threads(args.threads)
    image = load_image(args.image)
    predictors: dict[str, Predictor] = {"torch": PosePredictor(args.checkpoint, "cpu")}
    for model in models:
        predictor = ExportedPredictor(model, threads=args.threads, device="cpu")
        predictors[f"{predictor.device_name.partition(',')[0]}, {Path(model).name}"] = predictor
    results = {name: predictor(image) for name, predictor in predictors.items()}
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(args.repeats):
        for name, predictor in predictors.items():
            start = time.perf_counter()
            predictor(image)
            times[name].append((time.perf_counter() - start) * 1e3)
    height, width = image.shape[:2]
    print(f"{height} x {width} image, {args.threads} threads, float32")
    print(f"{'':32}{'median ms':>11}{'least ms':>10}{'score':>10}{'pixels':>10}")
    ours = results["torch"]
    for name, taken in times.items():
        score = np.abs(ours.scores - results[name].scores).max(initial=0)
        pixels = np.abs(ours.keypoints - results[name].keypoints).max(initial=0)
        print(f"{name:32}{statistics.median(taken):>11.1f}{min(taken):>10.1f}{score:>10.1e}{pixels:>10.1e}")


if __name__ == "__main__":
    main()
