"""Calibration of keypoint scores: a reliability plot and the expected calibration error.

    hpetr eval CHECKPOINT annotations.json --output eval.json
    python benchmarks/quality/keypoint_calibration.py eval.json annotations.json [--figure calibration.svg]

Poses are matched to people as in COCO's protocol: best score first, each to the free person of the highest OKS, at
least one half. A keypoint of a matched pose is right if its own similarity is at least one half. Keypoints without a
label count as wrong: in COCO they were not visible to the annotator. For each tenth of the scores, the script prints
the mean score and the share of right keypoints. The error is the mean difference of the two, weighted by the number of
keypoints (Guo et al. 2017, arXiv 1706.04599).

With `--calibrate CHECKPOINT --output FOLDER`, a factor and a shift of the scores' logits are fitted to these keypoints
(Platt 1999), and a copy of the checkpoint is written whose last layer includes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
from hpetr.data.dataset import open_dataset

BINS = 10


def similarity(pose: np.ndarray, person: dict, sigmas: np.ndarray) -> np.ndarray:
    """Return the similarity (K,) of each keypoint of a pose (K, 3) to a person's, labelled or not."""
    truth = np.array(person["keypoints"], dtype=float).reshape(-1, 3)
    squared = ((pose[:, :2] - truth[:, :2]) ** 2).sum(1)
    return np.exp(-squared / (2 * person["area"] * (2 * sigmas) ** 2))


def judged_joints(
    poses: list[dict], people: list[dict], sigmas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, right and labelled, (m, K) each, of the keypoints of all matched poses."""
    free = defaultdict(list)
    for person in people:
        if person["num_keypoints"] and not person.get("iscrowd"):
            free[person["image_id"]].append(person)
    scores, right, labelled = [], [], []
    for pose in sorted(poses, key=lambda pose: -pose["score"]):
        joints = np.array(pose["keypoints"], dtype=float).reshape(-1, 3)
        candidates = []
        for person in free[pose["image_id"]]:
            visible = np.array(person["keypoints"]).reshape(-1, 3)[:, 2] > 0
            near = similarity(joints, person, sigmas)
            candidates.append((near[visible].mean(), near, visible, person))
        if not candidates:
            continue
        oks, near, visible, person = max(candidates, key=lambda candidate: candidate[0])
        if oks >= 0.5:
            free[pose["image_id"]].remove(person)
            scores.append(joints[:, 2])
            right.append((near >= 0.5) & visible)
            labelled.append(visible)
    return np.array(scores), np.array(right), np.array(labelled)


def calibration(scores: np.ndarray, right: np.ndarray) -> tuple[float, list[tuple[float, float, int]]]:
    """Return the expected calibration error, and mean score, share of right keypoints, size of non-empty bins."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows = [
        (float(scores[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for inside in (place == i for i in range(BINS))
        if inside.any()
    ]
    return sum(abs(score - share) * n for score, share, n in rows) / len(scores), rows


def fit(scores: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Return the factor and shift of the scores' logits of maximum likelihood, by Newton's method."""
    scores = scores.clip(1e-6, 1 - 1e-6)
    inputs = np.stack([np.log(scores / (1 - scores)), np.ones_like(scores)], 1)  # (n, 2)
    values = np.array([1.0, 0.0])
    for _ in range(30):
        probability = 1 / (1 + np.exp(-inputs @ values))
        curvature = inputs.T @ (inputs * (probability * (1 - probability))[:, None])
        values += np.linalg.solve(curvature, inputs.T @ (right - probability))
    return float(values[0]), float(values[1])


def write_calibrated(checkpoint: Path, factor: float, shift: float, output: Path) -> None:
    model, processor = load_checkpoint(checkpoint, "cpu")
    if model.joint_decoder.score_head is None:
        sys.exit(f"error: {checkpoint} has no keypoint scores")
    last = model.joint_decoder.score_head[-1]
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor).add_(shift)
    save_checkpoint(model, processor, output)


def draw(rows: list[tuple[float, float, int]], error: float, path: Path) -> None:
    matplotlib.rcParams.update({"svg.hashsalt": "hpetr", "svg.fonttype": "none"})
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="score of a keypoint", ylabel="share of right keypoints", aspect="equal")
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    mean, share, count = zip(*rows, strict=True)
    axes.plot(mean, share, marker="o", color="#1f6feb")
    for x, y, n in rows:
        axes.annotate(f"{n:,}", (x, y), textcoords="offset points", xytext=(6, -10), fontsize=7, color="0.35")
    axes.set(xlim=(0, 1), ylim=(0, 1), title=f"{sum(count):,} keypoints, expected calibration error {error:.3f}")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("poses", type=Path, help="what `hpetr eval --output` wrote")
    parser.add_argument("annotations", type=Path, help="the same data")
    parser.add_argument("--figure", type=Path, help="SVG to write")
    parser.add_argument("--calibrate", type=Path, help="checkpoint that gave the poses")
    parser.add_argument("--output", type=Path, help="where its calibrated copy goes")
    args = parser.parse_args()
    if (args.calibrate is None) != (args.output is None):
        parser.error("expected --calibrate and --output together")
    poses = json.loads(args.poses.read_text(encoding="utf-8"))
    people = json.loads(args.annotations.read_text(encoding="utf-8"))["annotations"]
    scores, right, labelled = judged_joints(poses, people, np.array(open_dataset(args.annotations).skeleton.sigmas))
    error, rows = calibration(scores.ravel(), right.ravel())
    print(f"{len(scores)} poses matched to people, {scores.size:,} keypoints, {labelled.mean():.0%} of them labelled")
    print(f"{'mean score':>12}{'right':>8}{'keypoints':>11}")
    for score, share, count in rows:
        print(f"{score:>12.3f}{share:>8.3f}{count:>9,}")
    print(f"expected calibration error: {error:.3f}; of labelled keypoints alone: ", end="")
    print(f"{calibration(scores[labelled], right[labelled])[0]:.3f}")
    if args.figure is not None:
        draw(rows, error, args.figure)
    if args.calibrate is not None:
        factor, shift = fit(scores.ravel(), right.ravel())
        write_calibrated(args.calibrate, factor, shift, args.output)
        print(f"{args.output}: logits times {factor:.3f} plus {shift:.3f}")


if __name__ == "__main__":
    main()
