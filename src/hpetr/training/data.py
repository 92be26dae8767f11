"""The images of a training run, their order and their augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler

from hpetr.data.augment import (
    Compose,
    OneOf,
    PhotometricDistortion,
    RandomAffine,
    RandomCropResize,
    RandomHorizontalFlip,
    RandomResize,
    Transform,
    mosaic,
)
from hpetr.data.dataset import PoseDataset, first_that_flips, open_dataset
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.poses.skeleton import Skeleton
from hpetr.training.recipe import AugmentRecipe, DataSource, ProcessorRecipe, SideRange

CROP_LONG_SIDE = 4200  # limit of the long side before a crop, as published
BUCKET_STEPS = 32  # optimizer steps whose images are sorted by shape together


def open_data(source: DataSource) -> PoseDataset:
    """Open the data set that a recipe's source names."""
    options = source.model_dump(include={"split", "limit", "area_of_box"})
    return open_dataset(source.annotations, source.images, **options)


def common_skeleton(datasets: Sequence[PoseDataset], *, sigmas_given: bool) -> Skeleton:
    """Return the skeleton of all data sets, with the flip pairs of the first that gives them.

    Args:
        sigmas_given: the recipe replaces the sigmas of the data, which then may differ.

    Raises:
        InputError: keypoints, flip pairs, sigmas or categories differ.
    """
    first = datasets[first_that_flips([dataset.skeleton for dataset in datasets])]
    for dataset in datasets:
        difference = dataset.skeleton.difference(first.skeleton, sigmas=not sigmas_given)
        if difference is not None:
            raise InputError(f"{dataset.path}: its keypoints differ from those of {first.path} ({difference})")
        if dataset.class_names != first.class_names:
            raise InputError(
                f"{dataset.path}: its categories are {dataset.class_names}, "
                f"expected {first.class_names} as in {first.path}"
            )
    return first.skeleton


class Draw(NamedTuple):
    """An image's turn: its place in the list of images, and the epoch, which seeds its random numbers."""

    epoch: int
    place: int


class TrainingSet(Dataset[Sample]):
    """Several data sets, filtered, repeated and augmented.

    The random numbers of an image follow from seed, epoch and place alone: neither the number of workers and
    processes nor a restart changes the network's input.

    Args:
        datasets: the images.
        sources: the recipe's entry of each data set.
        transform: the augmentation of an image.
        mosaics: share of images that are joined with three others in a mosaic.
        fill: RGB in 0..255 between the images of a mosaic.
    """

    def __init__(
        self,
        datasets: list[PoseDataset],
        sources: list[DataSource],
        transform: Transform,
        seed: int,
        mosaics: float = 0.0,
        fill: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ):
        self.datasets, self.transform, self.seed = datasets, transform, seed
        self.mosaics, self.fill = mosaics, fill
        self.absent = [source.unlabelled == "absent" for source in sources]
        self.places: list[tuple[int, int]] = []  # data set and image
        for number, (data, source) in enumerate(zip(datasets, sources, strict=True)):
            chosen = np.flatnonzero(data.has_people) if source.only_with_people else range(len(data))
            self.places += [(number, int(image)) for image in chosen] * source.repeat

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, draw: Draw) -> Sample:
        rng = np.random.default_rng([self.seed, draw.epoch, draw.place])
        places = [draw.place]
        if self.mosaics and rng.random() < self.mosaics:
            places += rng.integers(len(self), size=3).tolist()
        samples = [self.sample(*self.places[place]) for place in places]
        return self.transform(samples[0] if len(samples) == 1 else mosaic(samples, self.fill), rng)

    def sample(self, dataset: int, index: int) -> Sample:
        """Return an image before its augmentation."""
        sample = self.datasets[dataset][index]
        if not self.absent[dataset]:
            return sample
        keypoints = sample.keypoints.copy()
        keypoints[keypoints[..., 2] == 0, 2] = -1
        return replace(sample, keypoints=keypoints)

    def shapes(self) -> np.ndarray:
        """Return width / height (N,) of every image."""
        ratios = [data.image_sizes[:, 0] / data.image_sizes[:, 1] for data in self.datasets]
        return np.array([ratios[dataset][place] for dataset, place in self.places])


class EpochSampler(Sampler[Draw]):
    """The order of an epoch's images, which follows from seed and epoch alone.

    The epoch is filled up to whole steps with images from its beginning, as the official code does: every step then
    has the same number of images, however many processes share it.

    Args:
        data: the images to sample.
        total_batch: images of an optimizer step.
        bucketing: images of similar shape go into one step. `BUCKET_STEPS` steps at a time are sorted by width /
            height, cut into steps and shuffled, so images still meet others in every epoch.
    """

    def __init__(self, data: TrainingSet, total_batch: int, seed: int, *, bucketing: bool):
        self.size, self.total_batch, self.seed = len(data), total_batch, seed
        self.shapes = data.shapes() if bucketing else None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.total_batch) * self.total_batch

    def __iter__(self) -> Iterator[Draw]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(rng.permutation(self.size), len(self))
        if self.shapes is not None:
            steps: list[np.ndarray] = []
            for start in range(0, len(order), BUCKET_STEPS * self.total_batch):
                bucket = order[start : start + BUCKET_STEPS * self.total_batch]
                bucket = bucket[self.shapes[bucket].argsort(kind="stable")]
                steps += np.split(bucket, len(bucket) // self.total_batch)
            order = np.concatenate([steps[step] for step in rng.permutation(len(steps))])
        return (Draw(self.epoch, int(place)) for place in order)


def mean_color(processor: ProcessorRecipe) -> tuple[float, float, float]:
    """Return the RGB in 0..255 that normalizes to 0."""
    red, green, blue = (255 * mean for mean in processor.image_mean)
    return red, green, blue


def build_transform(recipe: AugmentRecipe, processor: ProcessorRecipe, skeleton: Skeleton) -> Transform:
    """Compose the published order: colors, rotation and shear, flip, then one of plain resize and crop with resize."""
    steps: list[Transform] = []
    if recipe.photometric:
        steps.append(PhotometricDistortion())
    if recipe.rotation or recipe.shear:
        fill = mean_color(processor)
        steps.append(RandomAffine(rotation=recipe.rotation, shear=recipe.shear, fill=fill))
    if recipe.flip and skeleton.can_flip:
        steps.append(RandomHorizontalFlip(recipe.flip, skeleton.flip_index))
    sides = recipe.short_sides
    short_sides = range(sides.first, sides.last + 1) if isinstance(sides, SideRange) else sides
    resize = RandomResize(short_sides, recipe.long_side)
    if not recipe.crop_short_sides:
        return Compose([*steps, resize])
    height, width = recipe.crop
    first = RandomResize(recipe.crop_short_sides, CROP_LONG_SIDE)
    return Compose([*steps, OneOf([resize, RandomCropResize(first, resize, (height, height), (width, width))])])
