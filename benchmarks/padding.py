"""Share of padding in training batches, with and without bucketing.

    python benchmarks/padding.py [--annotations JSON|YAML] [--images DIR]

It prints the share of pixels outside the images over one epoch, for the published augmentation and h-petr-nano's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hpetr.training.data import Draw, EpochSampler
from hpetr.training.recipe import load_recipe
from hpetr.training.train import open_training

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, default=ROOT / "examples" / "tiny-coco" / "annotations.json")
    parser.add_argument("--images", type=Path)
    args = parser.parse_args()
    source = f"annotations: {args.annotations}" + (f", images: {args.images}" if args.images else "")
    print(f"{'recipe':14}{'batch':>6}{'at random':>12}{'bucketing':>12}")
    for recipe in ("petr-r50", "h-petr-nano"):
        settings = [f"data.train=[{{{source}}}]", "data.val=null", "augment.photometric=false"]
        data, _, _ = open_training(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", settings))
        sizes: dict[Draw, tuple[int, int]] = {}
        for batch in (2, 8):
            shares = []
            for bucketing in (False, True):
                for draw in EpochSampler(data, batch, 0, bucketing=bucketing):
                    if draw not in sizes:
                        height, width = data[draw].image.shape[:2]
                        sizes[draw] = height, width
                draws = list(EpochSampler(data, batch, 0, bucketing=bucketing))
                steps = np.array([sizes[draw] for draw in draws]).reshape(-1, batch, 2)  # (steps, B, height and width)
                shares.append(1 - steps.prod(-1).sum() / (batch * steps.max(1).prod(-1)).sum())
            print(f"{recipe:14}{batch:>6}" + "".join(f"{share:>12.1%}" for share in shares))


if __name__ == "__main__":
    main()
