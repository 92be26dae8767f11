"""The image of the bundled model's failures in its card: four of the demo's photographs with what it finds in them.

python docs/figures/make_failure_figure.py [--output docs/figures/nano-failures.jpg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from hpetr import PosePredictor
from hpetr.images.read import load_image
from hpetr.poses.draw import draw_poses

ROOT = Path(__file__).parents[2]
IMAGES = (14439, 183709, 329323, 361919)
HEIGHT = 360


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures" / "nano-failures.jpg")
    args = parser.parse_args()
    predictor = PosePredictor(device="cpu")
    drawn = []
    for number in IMAGES:
        image = load_image(ROOT / "examples" / f"{number:012d}.jpg")
        poses = draw_poses(image, predictor(image))
        width = round(poses.shape[1] * HEIGHT / poses.shape[0])
        drawn.append(cv2.resize(poses, (width, HEIGHT), interpolation=cv2.INTER_AREA))
    rows = [np.hstack(drawn[:2]), np.hstack(drawn[2:])]
    widest = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, widest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    cv2.imwrite(str(args.output), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])


if __name__ == "__main__":
    main()
