"""Sigmas of OKS, estimated from people that were labelled several times."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpetr.data.annotations import PoseAnnotations
from hpetr.data.coco import load_annotations
from hpetr.errors import InputError, needs_extra

MIN_PAIRS = 10
MIN_IOU = 0.5


@dataclass(frozen=True)
class SigmaEstimate:
    """Sigmas of K keypoints; None for keypoints that cannot be estimated.

    Attributes:
        names: K keypoint names.
        sigmas: K numbers or None: fewer than 10 pairs, or every repeated label the same.
        pairs: K counts of repeated labels: a keypoint labelled m times counts m - 1.
        people: the number of people that were labelled at least twice.
    """

    names: tuple[str, ...]
    sigmas: tuple[float | None, ...]
    pairs: tuple[int, ...]
    people: int


def estimate_sigmas(files: Sequence[str | os.PathLike[str]]) -> SigmaEstimate:
    """Measure the spread of repeated labels, as COCO did for its own sigmas on 5,000 images that were labelled twice.

    COCO's keypoint evaluation (cocodataset.org, Keypoint Evaluation, 1.3) defines sigma_k^2 = E[d_k^2 / s^2] with s^2
    the person's area and sigma_k the standard deviation of a keypoint's labels; OKS then uses k_k = 2 sigma_k, which
    hpetr, like pycocotools, does itself. Here d_k is the distance of a label from the mean of the m labels of that
    keypoint of that person, and the sum of squares is divided by m - 1, not m: the mean is not the truth. For two
    labels that is half the squared distance between them. s^2 is the mean of the files' areas of the person.

    Args:
        files: two or more COCO keypoint JSONs of the same images (by `file_name`) and keypoint names. People of the
            first file are matched with those of each other one by the boxes of best IoU, at least 0.5, one to one.

    Raises:
        InputError: fewer than two files, files that do not fit together, no person that was labelled twice, or scipy is
            missing.
    """
    if len(files) < 2:
        raise InputError("sigmas: expected at least two COCO keypoint JSONs with labels of the same images")
    first, *others = (load_annotations(file) for file in files)
    names = tuple(first.categories[0]["keypoints"])
    for other in others:
        if tuple(other.categories[0]["keypoints"]) != names:
            raise InputError(f"{other.path}: its keypoint names are not those of {first.path}")
    count = len(first.ids)
    labels = [first.keypoints, *(np.zeros_like(first.keypoints) for _ in others)]
    areas = np.full((len(files), count), np.nan)
    areas[0] = first.areas
    for index, other in enumerate(others, start=1):
        mine, theirs = match_people(first, other)
        labels[index][mine] = other.keypoints[theirs]
        areas[index, mine] = other.areas[theirs]
    matched = ~np.isnan(areas[1:]).all(axis=0)
    if not matched.any():
        raise InputError(
            f"{first.path}: no person has a box of IoU {MIN_IOU} in the other files, expected repeated labels"
        )
    keypoints = np.stack(labels)[:, matched].astype(np.float64)  # (F, P, K, 3)
    area = np.nanmean(areas[:, matched], axis=0)  # (P,)
    labelled = keypoints[..., 2] > 0  # (F, P, K)
    times = labelled.sum(axis=0)  # (P, K)
    xy = keypoints[..., :2]
    mean = (xy * labelled[..., None]).sum(axis=0) / np.maximum(times, 1)[..., None]  # (P, K, 2)
    squares = (((xy - mean) ** 2).sum(-1) * labelled).sum(axis=0) / area[:, None]  # (P, K)
    pairs = np.maximum(times - 1, 0).sum(axis=0)  # (K,)
    sigmas = np.sqrt(squares.sum(axis=0) / np.maximum(pairs, 1))
    if not sigmas.any():
        raise InputError(f"{first.path}: every repeated label is the same, expected labels made independently")
    estimable = (pairs >= MIN_PAIRS) & (sigmas > 0)
    return SigmaEstimate(
        names,
        tuple(round(sigma, 4) if good else None for sigma, good in zip(sigmas.tolist(), estimable, strict=True)),
        tuple(pairs.tolist()),
        int(matched.sum()),
    )


def match_people(first: PoseAnnotations, other: PoseAnnotations) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of `first` and of `other`, one to one, that are the same person: see `estimate_sigmas`."""
    with needs_extra("train", "data sigmas"):
        from scipy.optimize import linear_sum_assignment

    candidates = _people_by_image(other)
    pairs: list[tuple[int, int]] = []
    for name, rows in _people_by_image(first).items():
        others = candidates[name]
        iou = box_iou(first.boxes[rows], other.boxes[others])
        iou[first.class_labels[rows][:, None] != other.class_labels[others]] = 0
        pairs += [
            (rows[i], others[j]) for i, j in zip(*linear_sum_assignment(-iou), strict=True) if iou[i, j] >= MIN_IOU
        ]
    mine, theirs = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return mine, theirs


def _people_by_image(loaded: PoseAnnotations) -> defaultdict[str, list[int]]:
    labelled = (loaded.keypoints[..., 2] > 0).any(axis=1)
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row in np.flatnonzero(labelled & ~loaded.is_crowd).tolist():
        rows[loaded.images[loaded.image_index[row]].file_name].append(row)
    return rows


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU (n, m) of boxes (n, 4) and (m, 4), x1, y1, x2, y2."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    far_corner = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (far_corner - corner).clip(0).prod(-1)  # (n, m)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return common / np.maximum(sizes[0][:, None] + sizes[1] - common, np.finfo(np.float32).tiny)
