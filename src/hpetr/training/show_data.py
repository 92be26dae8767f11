"""One image of what the network is shown: augmented training images with their labels, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hpetr.data.collate import PoseCollator
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.images.files import write_bytes
from hpetr.images.read import JPEG_SUFFIXES, encode_image
from hpetr.poses.skeleton import Skeleton
from hpetr.training.data import EpochSampler, TrainingSet
from hpetr.training.recipe import Recipe
from hpetr.training.train import open_training

CELL = 400  # pixels: side of the square that an image of the batch is fitted into
CAPTION = 22  # pixels: height of the line below it
GAP = 6
SUFFIXES = JPEG_SUFFIXES | {".png"}

# RGB. Limbs of one side have one color, so that a flip that forgot to swap the sides is seen.
LEFT, RIGHT, MIDDLE = (30, 220, 255), (255, 90, 60), (255, 235, 80)
BOX, IGNORED, RIM = (120, 255, 120), (255, 90, 255), (20, 20, 20)
PADDING, PAPER, INK = (128, 128, 128), (250, 250, 250), (30, 30, 30)


def write_grid(recipe: Recipe, output: str | Path, images: int = 16, seed: int = 0) -> Path:
    """Write the images that a run of the recipe shows its network, with their labels.

    They are augmented, resized and padded (grey) together as in training. Left limbs are blue, right ones red, those
    between yellow; labelled keypoints are discs, or rings where they are labelled as not visible; boxes are green, and
    dashed magenta ones hold people without labels, which the loss ignores. Below stand the file's name, width x height
    after augmentation and the number of people.

    Args:
        recipe: as for training.
        output: the image to write, `.jpg` or `.png`.
        images: how many, from the beginning of the epoch.
        seed: the epoch of the run that is shown; another one draws other images and other augmentation.

    Returns:
        The output's path.

    Raises:
        InputError: bad recipe, data, number or suffix, or the output cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() not in SUFFIXES:
        raise InputError(f"{output}: expected a name that ends in {', '.join(sorted(SUFFIXES))}")
    if images < 1 or seed < 0:
        raise InputError(f"images is {images} and seed {seed}, expected at least 1 image and a seed of at least 0")
    data, _, skeleton = open_training(recipe)
    collator = PoseCollator.from_processor(recipe.processor.build())
    samples = islice(_samples(data, recipe, seed), images)
    size = recipe.train.batch_size or recipe.train.total_batch_size
    cells: list[np.ndarray] = []
    while together := list(islice(samples, size)):
        cells += _draw_batch(together, collator, skeleton)
    write_bytes(output, encode_image(_grid(cells), output.suffix))
    return output


def _samples(data: TrainingSet, recipe: Recipe, epoch: int) -> Iterator[Sample]:
    """The samples of this and the following epochs in the order of training."""
    settings = recipe.train
    sampler = EpochSampler(data, settings.total_batch_size, settings.seed, bucketing=settings.bucketing)
    for number in count(epoch):
        sampler.set_epoch(number)
        for draw in sampler:
            yield data[draw]


def _draw_batch(samples: list[Sample], collator: PoseCollator, skeleton: Skeleton) -> list[np.ndarray]:
    """Cells of B samples that go through the network together, from their batch."""
    batch = collator(samples)
    cells = []
    for values, mask, labels, sample in zip(
        batch["pixel_values"], batch["pixel_mask"], batch["labels"], samples, strict=True
    ):
        image = values.permute(1, 2, 0).numpy().copy()  # (H, W, 3)
        image[~mask.numpy()] = PADDING
        height, width = sample.image.shape[:2]
        people = len(labels["keypoints"])
        caption = f"{width}x{height}, {people} {'person' if people == 1 else 'people'}"
        cells.append(_cell(image, {k: v.numpy() for k, v in labels.items()}, skeleton, sample.path.name, caption))
    return cells


def _cell(image: np.ndarray, labels: dict[str, np.ndarray], skeleton: Skeleton, name: str, caption: str) -> np.ndarray:
    """(CELL + CAPTION, CELL, 3) uint8: a padded image (H, W, 3), fitted, with labels and caption."""
    scale = CELL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    # Labels are drawn after scaling: lines are equally thick on every image.
    scene = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for box in labels["ignore_boxes"] * scale:
        _dashed(scene, box)
    for box in labels["boxes"] * scale:
        (left, top), (right, bottom) = _point(box[:2]), _point(box[2:])
        cv2.rectangle(scene, (left, top), (right, bottom), BOX, 1)
    for person in labels["keypoints"]:
        _draw_person(scene, person[:, :2] * scale, person[:, 2], skeleton)
    cell = np.full((CELL + CAPTION, CELL, 3), PAPER, dtype=np.uint8)
    cell[:height, :width] = scene
    room = 56 - len(caption) - 2  # characters of a line
    text = f"{name if len(name) <= room else '..' + name[-(room - 2) :]}  {caption}"
    text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no others
    cv2.putText(cell, text, (3, CELL + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, INK, 1, cv2.LINE_AA)
    return cell


def _draw_person(scene: np.ndarray, xy: np.ndarray, visibility: np.ndarray, skeleton: Skeleton) -> None:
    """Limbs between labelled keypoints, and these: xy (K, 2) pixels of the scene, visibility (K,)."""
    colors = [MIDDLE] * skeleton.num_keypoints
    for left, right in skeleton.flip_pairs:
        colors[left], colors[right] = LEFT, RIGHT
    limbs = [(a, b) for a, b in skeleton.edges if visibility[a] and visibility[b]]
    for rim in (True, False):  # a dark pass below keeps the colors readable on every background
        for first, second in limbs:
            color = colors[first] if colors[first] == colors[second] else MIDDLE
            ends = _point(xy[first]), _point(xy[second])
            cv2.line(scene, *ends, RIM if rim else color, 4 if rim else 2, cv2.LINE_AA)
    for color, place, visible in zip(colors, xy, visibility, strict=True):
        if visible:
            cv2.circle(scene, _point(place), 4, RIM, cv2.FILLED, cv2.LINE_AA)
            cv2.circle(scene, _point(place), 3, color, cv2.FILLED if visible > 1 else 1, cv2.LINE_AA)


def _dashed(scene: np.ndarray, box: np.ndarray, dash: int = 6) -> None:
    """The outline of a box (4,) xyxy, with gaps."""
    (left, top), (right, bottom) = _point(box[:2]), _point(box[2:])
    for x in range(left, right, 2 * dash):
        for y in (top, bottom):
            cv2.line(scene, (x, y), (min(x + dash, right), y), IGNORED, 2)
    for y in range(top, bottom, 2 * dash):
        for x in (left, right):
            cv2.line(scene, (x, y), (x, min(y + dash, bottom)), IGNORED, 2)


def _point(xy: Any) -> tuple[int, int]:
    """The pixel that holds a place, whose coordinates count from the image's edge."""
    return int(xy[0]), int(xy[1])


def _grid(cells: list[np.ndarray]) -> np.ndarray:
    """Cells (h, w, 3) of one size in rows of about as many as there are rows."""
    columns = int(np.ceil(np.sqrt(len(cells))))
    rows = -(-len(cells) // columns)
    height, width = cells[0].shape[:2]
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), PAPER, dtype=np.uint8)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        sheet[top : top + height, left : left + width] = cell
    return sheet
