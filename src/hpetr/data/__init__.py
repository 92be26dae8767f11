"""Images and poses: reading, checking, augmenting and batching them."""

from hpetr.data.annotations import ImageRecord, PoseAnnotations, load_annotations
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
from hpetr.data.collate import PoseCollator
from hpetr.data.dataset import CocoPoseDataset, DatasetReport, PoseDataset, YoloPoseDataset, open_dataset
from hpetr.data.sample import Sample
from hpetr.images.read import load_image
from hpetr.model.image_processor import HPetrImageProcessor

__all__ = [
    "CocoPoseDataset",
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
    "YoloPoseDataset",
    "load_annotations",
    "load_image",
    "open_dataset",
]
