"""One image of the network's input: augmented training images with their labels, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import cv2
import numpy as np

from hpetr.data.collate import PoseCollator
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.images.files import check_output, write_bytes
from hpetr.images.read import encode_image
from hpetr.poses.draw import MIDDLE, draw_person
from hpetr.poses.skeleton import Skeleton
from hpetr.training.data import EpochSampler, TrainingSet
from hpetr.training.recipe import Recipe
from hpetr.training.train import open_training

CELL = 400  # pixels: side of the square that an image of the batch is fitted into
CAPTION = 22  # pixels: height of the line below it
GAP = 6
SUFFIXES = (".jpg", ".jpeg", ".png")

# RGB. Limbs of one side have one color, so that a flip that forgot to swap the sides is seen.
LEFT, RIGHT = (30, 220, 255), (255, 90, 60)
BOX, IGNORED = (120, 255, 120), (255, 90, 255)
PADDING, PAPER, INK = (128, 128, 128), (250, 250, 250), (30, 30, 30)


def write_grid(recipe: Recipe, output: str | Path, images: int = 16, seed: int = 0) -> Path:
    """Write the images that a run of the recipe shows its network, with their labels.

    They are augmented, resized and padded (gray) together as in training. Left limbs are blue, right ones red, those
    between yellow; labelled keypoints are discs, or rings if they are labelled as not visible; boxes are green, and
    dashed magenta ones hold people without labels, which the loss ignores. The caption is the file's name, width x
    height after augmentation and the number of people.

    Args:
        recipe: as for training.
        output: the image to write, `.jpg` or `.png`.
        images: number of images, from the beginning of the epoch.
        seed: the epoch shown; another one draws other images and other augmentation.

    Returns:
        The output's path.

    Raises:
        InputError: bad recipe, data, number or suffix, or the output is an image of the data or cannot be written.
    """
    if images < 1 or seed < 0:
        raise InputError(f"images is {images} and seed {seed}, expected at least 1 image and a seed of at least 0")
    data, val, skeleton = open_training(recipe)
    datasets = data.datasets if val is None else [*data.datasets, val]
    output = check_output(output, (path for dataset in datasets for path in dataset.image_paths), SUFFIXES)
    collator = PoseCollator.from_processor(recipe.processor.build())
    samples = islice(_samples(data, recipe, seed), images)
    size = recipe.train.batch_size or recipe.train.total_batch_size
    cells: list[np.ndarray] = []
    while together := list(islice(samples, size)):
        cells += _draw_batch(together, collator, skeleton)
    write_bytes(output, encode_image(_grid(cells), output.suffix))
    return output


def _samples(data: TrainingSet, recipe: Recipe, epoch: int) -> Iterator[Sample]:
    """Yield the samples of this and the following epochs in the order of training."""
    settings = recipe.train
    sampler = EpochSampler(data, settings.total_batch_size, settings.seed, bucketing=settings.bucketing)
    for number in count(epoch):
        sampler.set_epoch(number)
        for draw in sampler:
            yield data[draw]


def _draw_batch(samples: list[Sample], collator: PoseCollator, skeleton: Skeleton) -> list[np.ndarray]:
    """Return the cells of B samples that go through the network together, from their batch."""
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
    """Return (CELL + CAPTION, CELL, 3) uint8: a padded image (H, W, 3), fitted, with labels and caption."""
    scale = CELL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    # Labels are drawn after scaling: lines are equally thick on every image.
    scene = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    for box in labels["ignore_boxes"] * scale:
        _draw_dashed(scene, box)
    for box in labels["boxes"] * scale:
        cv2.rectangle(scene, box[:2].astype(int).tolist(), box[2:].astype(int).tolist(), BOX, 1)
    colors = [MIDDLE] * skeleton.num_keypoints
    for left, right in skeleton.flip_pairs or ():
        colors[left], colors[right] = LEFT, RIGHT
    for person in labels["keypoints"]:
        shown, hollow = person[:, 2] > 0, person[:, 2] == 1
        draw_person(scene, person[:, :2] * scale, shown, skeleton.edges, colors, 2, radius=3, hollow=hollow)
    cell = np.full((CELL + CAPTION, CELL, 3), PAPER, dtype=np.uint8)
    cell[:height, :width] = scene
    room = 56 - len(caption) - 2  # characters of a line
    text = f"{name if len(name) <= room else '..' + name[-(room - 2) :]}  {caption}"
    text = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no others
    cv2.putText(cell, text, (3, CELL + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, INK, 1, cv2.LINE_AA)
    return cell


def _draw_dashed(scene: np.ndarray, box: np.ndarray, dash: int = 6) -> None:
    """Draw the outline of a box (4,) xyxy with gaps."""
    left, top, right, bottom = box.astype(int).tolist()
    for x in range(left, right, 2 * dash):
        for y in (top, bottom):
            cv2.line(scene, (x, y), (min(x + dash, right), y), IGNORED, 2)
    for y in range(top, bottom, 2 * dash):
        for x in (left, right):
            cv2.line(scene, (x, y), (x, min(y + dash, bottom)), IGNORED, 2)


def _grid(cells: list[np.ndarray]) -> np.ndarray:
    """Arrange cells (h, w, 3) of one size in about as many rows as columns, with gaps around them."""
    columns = int(np.ceil(np.sqrt(len(cells))))
    rows = -(-len(cells) // columns)
    padded = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=PAPER[0]) for cell in cells]
    padded += [np.full_like(padded[0], PAPER)] * (rows * columns - len(cells))
    sheet = np.vstack([np.hstack(padded[row * columns : (row + 1) * columns]) for row in range(rows)])
    return np.pad(sheet, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=PAPER[0])
