"""The photographs of the start page and of the bundled model's card, with the poses that h-petr-nano finds in them.

    python docs/figures/make_photo_figures.py [--output docs/figures]

Writes hero.jpg and nano-failures.jpg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from hpetr import PosePredictor

ROOT = Path(__file__).parents[2]
# COCO ids of images in examples/, row by row.
FIGURES = {
    "hero.jpg": [[239537, 14439]],
    "nano-failures.jpg": [[14439, 183709], [329323, 361919]],
}
HEIGHT = 360


def draw_image(predictor: PosePredictor, number: int) -> np.ndarray:
    """Return the image (HEIGHT, W, 3) with its poses."""
    drawn = predictor(ROOT / "examples" / f"{number:012d}.jpg").draw()
    width = round(drawn.shape[1] * HEIGHT / drawn.shape[0])
    return cv2.resize(drawn, (width, HEIGHT), interpolation=cv2.INTER_AREA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    predictor = PosePredictor(device="cpu")
    for name, layout in FIGURES.items():
        rows = [np.hstack([draw_image(predictor, number) for number in row]) for row in layout]
        widest = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        path = args.output / name
        cv2.imwrite(str(path), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
