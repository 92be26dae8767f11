"""Time of h-petr-nano for one photograph on the CPU, stage by stage.

    python benchmarks/nano_latency.py [--image examples/000000000785.jpg] [--threads 2] [--repeats 30]

It times decoding, resize, network and post-processing of the bundled checkpoint, float32, batch 1, as `hpetr predict`
runs them. The backbone is also timed alone, in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.images.read import load_image
from hpetr.inference.precision import keep_freed_memory
from hpetr.inference.torch_predictor import predict_batch

ROOT = Path(__file__).parents[1]


def median_ms(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median and the least time in milliseconds, after three runs to warm up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, default=ROOT / "examples" / "000000000785.jpg")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the command line does
    model, processor = load_checkpoint(None, "cpu")
    image = cv2.resize(load_image(args.image), (640, 480))
    encoded = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
    batch = processor(image)
    pixels = batch["pixel_values"]
    stages = {
        "decode JPEG": lambda: load_image(encoded),
        "resize and normalize": lambda: processor(image),
        "backbone alone": lambda: model.backbone.body(pixels),
        "network": lambda: model(**batch),
        "all": lambda: predict_batch(model, processor, [load_image(encoded)]),
    }
    print(f"480 x 640 image, network input {tuple(pixels.shape[-2:])}, {args.threads} threads, float32, milliseconds")
    print(f"{'':22}{'median':>8}{'least':>8}")
    with torch.inference_mode():
        for name, function in stages.items():
            median, least = median_ms(function, args.repeats)
            print(f"{name:22}{median:>8.1f}{least:>8.1f}")


if __name__ == "__main__":
    main()
