"""Images per second of data loading (decoding, augmentation, batching), compared with a plain Pillow loop.

    python benchmarks/data_loading.py [--annotations examples/tiny-coco/annotations.json] [--images FOLDER]

The Pillow loop opens each image, converts it to RGB, resizes it and makes a float array of it, in one process, without
labels, color changes, rotation or batches. The library runs its whole training pipeline, with and without worker
processes. `CPU ms` is the processor time per image over all processes, `busy` the share of the machine's processors in
use. Both are of the whole epoch, including the start of the workers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import PoseDataset, open_dataset
from hpetr.images.pixels import keep_ratio_size
from hpetr.training.data import EpochSampler, TrainingSet, build_transform
from hpetr.training.recipe import AugmentRecipe, DataSource, ProcessorRecipe

EXAMPLES = Path(__file__).parents[1] / "examples" / "tiny-coco" / "annotations.json"
SMALL = AugmentRecipe.model_validate({"short_sides": {"from": 160, "to": 256}, "long_side": 256})
PUBLISHED = AugmentRecipe.model_validate(
    {
        "short_sides": {"from": 400, "to": 1400},
        "long_side": 1400,
        "crop_short_sides": [400, 500, 600],
        "rotation": 30,
        "photometric": True,
    }
)


def pillow_loop(dataset: PoseDataset, count: int, short: tuple[int, int], long: int) -> Iterable[np.ndarray]:
    """Yield plain arrays (h, w, 3) float32 of `count` images, short sides drawn from `short`, both included."""
    rng = np.random.default_rng(0)
    for index in range(count):
        with Image.open(dataset.image_paths[index % len(dataset)]) as image:
            height, width = keep_ratio_size(image.height, image.width, int(rng.integers(short[0], short[1] + 1)), long)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        yield np.asarray(resized, dtype=np.float32) / 255


def library(dataset: PoseDataset, count: int, augment: AugmentRecipe, batch: int, workers: int) -> DataLoader:
    """Return the loader of a training run: `count` images, or a few more that fill the last batch."""
    transform = build_transform(augment, ProcessorRecipe(), dataset.skeleton)
    source = DataSource(annotations=dataset.path, repeat=-(-count // len(dataset)))
    data = TrainingSet([dataset], [source], transform, seed=0)
    sampler = EpochSampler(data, batch, seed=0, bucketing=True)
    return DataLoader(data, batch, sampler=sampler, collate_fn=PoseCollator(), num_workers=workers)


def measure(name: str, make: Callable[[], Iterable], images: Callable[[object], int], baseline: float) -> float:
    """Print one line of the table and return the images per second."""
    before, start = os.times(), time.perf_counter()
    count = sum(images(item) for item in make())
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(after[:4]) - sum(before[:4])  # user and system time, of this process and of its finished children
    rate = count / wall
    times = f"{rate / baseline:6.2f}x" if baseline else f"{'':7}"
    print(f"  {name:24}{rate:>10.1f}{times:>9}{1e3 * cpu / count:>9.2f}{cpu / wall / (os.cpu_count() or 1):>8.0%}")
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, default=EXAMPLES, help="COCO JSON or YOLO-pose YAML")
    parser.add_argument("--images", type=Path, help="folder of the images (JSON only)")
    parser.add_argument("--pictures", type=int, default=240, help="for the published sizes; small ones four times that")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    cv2.setNumThreads(0)  # as in training
    torch.set_num_threads(1)
    dataset = open_dataset(args.annotations, args.images)
    print(f"{len(dataset)} images of {args.annotations}, {os.cpu_count()} processors, batches of {args.batch}")
    jobs = (
        ("short side 160..256, flip", SMALL, (160, 256), 256, 4 * args.images),
        ("published: 400..1400, colors, rotation, flip, crop", PUBLISHED, (400, 1400), 1400, args.images),
    )
    for title, augment, short, long, count in jobs:
        print(f"\n{title}\n  {'':24}{'images/s':>10}{'':9}{'CPU ms':>9}{'busy':>8}")
        sides = (dataset, count, short, long)
        baseline = measure("Pillow loop", lambda sides=sides: pillow_loop(*sides), lambda array: 1, 0.0)
        for workers in (0, 1, 2):
            settings = (dataset, count, augment, args.batch, workers)
            measure(
                f"hpetr, {workers} workers",
                lambda settings=settings: library(*settings),
                lambda batch: len(batch["pixel_values"]),
                baseline,
            )


if __name__ == "__main__":
    main()
