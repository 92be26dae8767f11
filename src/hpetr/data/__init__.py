"""Labelled images: read, check, augment and batch them."""

from hpetr.data.annotations import ImageRecord, PoseAnnotations
from hpetr.data.augment import (
    Compose,
    KeepRatioResize,
    OneOf,
    PhotometricDistortion,
    RandomAffine,
    RandomCropResize,
    RandomHorizontalFlip,
    RandomResize,
    Transform,
)
from hpetr.data.coco import load_annotations
from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import DatasetReport, PoseDataset, open_dataset
from hpetr.data.sample import Sample
from hpetr.images.read import load_image
from hpetr.model.image_processor import HPetrImageProcessor

__all__ = [
    "Compose",
    "DatasetReport",
    "HPetrImageProcessor",
    "ImageRecord",
    "KeepRatioResize",
    "OneOf",
    "PhotometricDistortion",
    "PoseAnnotations",
    "PoseCollator",
    "PoseDataset",
    "RandomAffine",
    "RandomCropResize",
    "RandomHorizontalFlip",
    "RandomResize",
    "Sample",
    "Transform",
    "load_annotations",
    "load_image",
    "open_dataset",
]
