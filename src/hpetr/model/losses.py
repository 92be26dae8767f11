"""The losses of PETR (section 3.4) and of hybrid matching (H-DETR, arXiv 2207.13080)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hpetr.model.config import HPetrConfig
from hpetr.model.decoders import Predictions, Proposals
from hpetr.model.matching import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    Matches,
    Targets,
    assign,
    object_keypoint_similarity,
    pose_cost,
)


def mean_over_processes(counts: Tensor) -> Tensor:
    """Counts that divide losses: averaged over processes and at least 1, so that DDP's mean of gradients is exact."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        counts = counts / dist.get_world_size()
    return counts.clamp(min=1)


def ignored_queries(predictions: Predictions, targets: Targets) -> Tensor:
    """(B, Q) true where the middle of a predicted pose lies in an ignore box of its picture."""
    middle = predictions.keypoints.detach().mean(-2) * targets.sizes[:, None]  # (B, Q, 2) pixels
    boxes = targets.ignore_boxes[:, None]  # (B, 1, m, 4)
    inside = (middle[:, :, None] >= boxes[..., :2]) & (middle[:, :, None] < boxes[..., 2:])  # (B, Q, m, 2)
    return inside.all(-1).any(-1)


def focal_sum(predictions: Predictions, matches: Matches, targets: Targets, *, binary: bool) -> Tensor:
    """Sigmoid focal loss over all queries, summed (Lin et al. 2017); unmatched queries in ignore boxes count nothing.

    Args:
        predictions: of one layer and group, logits (B, Q, C).
        binary: every matched query is class 0 (proposals).
    """
    logits = predictions.logits.float()
    truth = torch.zeros_like(logits)
    classes = targets.classes[matches.image, matches.target]
    truth[matches.image, matches.query, torch.zeros_like(classes) if binary else classes] = 1
    probability = logits.sigmoid()
    miss = probability * (1 - truth) + (1 - probability) * truth
    alpha = FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * alpha * miss**FOCAL_GAMMA
    if targets.ignore_boxes.shape[1]:
        counted = ~ignored_queries(predictions, targets) | truth.bool().any(-1)
        loss = loss * counted[..., None]
    return loss.sum()


def keypoint_sums(keypoints: Tensor, matches: Matches, targets: Targets, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over matched poses of L1 (normalised coordinates) and of -log OKS (pixels); keypoints (m, K, 2)."""
    visible = targets.visible[matches.image, matches.target]  # (m, K)
    difference = keypoints.float() - targets.keypoints[matches.image, matches.target]
    l1 = (difference.abs() * visible[..., None]).sum()
    squared = (difference * targets.sizes[matches.image][:, None]).square().sum(-1)  # (m, K) pixels^2
    oks = object_keypoint_similarity(squared, visible, targets.areas[matches.image, matches.target], sigmas)
    return l1, (-oks.clamp(min=1e-6).log() * visible.any(-1)).sum()


def match_counts(matches: list[Matches], targets: Targets) -> Tensor:
    """For each layer and group: matched queries and twice their labelled keypoints, over processes: (groups, 2)."""
    labelled = targets.visible.sum(-1)  # (B, n)
    counts = [torch.stack([labelled.new_tensor(len(m.query)), 2 * labelled[m.image, m.target].sum()]) for m in matches]
    return mean_over_processes(torch.stack(counts).float())


def decoder_losses(
    proposals: Proposals,
    layers: Predictions,
    groups: list[int],
    targets: Targets,
    config: HPetrConfig,
    sigmas: Tensor,
) -> tuple[dict[str, Tensor], list[Matches]]:
    """Losses of the proposals and of every pose-decoder layer, both query groups added.

    Args:
        layers: (layers, B, Q, ...), the one-to-one queries first.
        groups: sizes of the one-to-one and the one-to-many group; the second may be 0.
    Returns:
        The weighted terms, and the last layer's matches: one `Matches` a group, query indices into all Q.
    """
    depth = len(layers.logits)
    sizes = [size for size in groups if size]
    repeats = [1, config.one_to_many_k][: len(sizes)]
    layer_costs = pose_cost(layers, targets, config, sigmas).split(sizes, 2)  # a (layers, B, Q_g, n) each
    all_proposals = proposals.predictions()
    costs = [pose_cost(all_proposals, targets, config, sigmas)]
    costs += [group[i] for i in range(depth) for group in layer_costs]
    matches = assign(costs, targets.counts, [1] + repeats * depth)
    counts = match_counts(matches, targets)  # (1 + layers * groups, 2)

    matched = proposals.keypoints_at(matches[0].image, matches[0].query)
    ranked = Predictions(proposals.logits, all_proposals.keypoints)
    terms = {
        "proposal.class": config.loss_class * focal_sum(ranked, matches[0], targets, binary=True) / counts[0, 0],
        "proposal.l1": config.loss_l1 * keypoint_sums(matched, matches[0], targets, sigmas)[0] / counts[0, 1],
    }
    split_logits, split_keypoints = layers.logits.split(sizes, 2), layers.keypoints.split(sizes, 2)
    for i in range(depth):
        term = [layers.logits.new_zeros((), dtype=torch.float32) for _ in range(3)]
        for g in range(len(sizes)):
            index = 1 + i * len(sizes) + g
            group, pair = Predictions(split_logits[g][i], split_keypoints[g][i]), matches[index]
            l1, oks = keypoint_sums(group.keypoints[pair.image, pair.query], pair, targets, sigmas)
            term[0] = term[0] + focal_sum(group, pair, targets, binary=False) / counts[index, 0]
            term[1] = term[1] + l1 / counts[index, 1]
            term[2] = term[2] + oks / counts[index, 0]
        terms[f"decoder.{i}.class"] = config.loss_class * term[0]
        terms[f"decoder.{i}.l1"] = config.loss_l1 * term[1]
        terms[f"decoder.{i}.oks"] = config.loss_oks * term[2]
    last = [
        Matches(pair.image, pair.query + offset, pair.target)
        for pair, offset in zip(matches[-len(sizes) :], [0, groups[0]], strict=False)
    ]
    return terms, last


def join_matches(matches: list[Matches]) -> Matches:
    """The pairs of all groups, sorted by image."""
    image = torch.cat([m.image for m in matches])
    order = image.argsort(stable=True)
    query, target = (torch.cat([getattr(m, name) for m in matches])[order] for name in ("query", "target"))
    return Matches(image[order], query, target)


def joint_losses(
    poses: Tensor, slots: Tensor, matches: Matches, targets: Targets, config: HPetrConfig, sigmas: Tensor
) -> dict[str, Tensor]:
    """Losses of every joint-decoder layer over the matched poses of both groups.

    Args:
        poses: (layers, B, T, K, 2). slots: (m,) the place along T of each matched pose.
    """
    counts = match_counts([matches], targets)[0]
    terms = {}
    for i, layer in enumerate(poses):
        l1, oks = keypoint_sums(layer[matches.image, slots], matches, targets, sigmas)
        terms[f"joint.{i}.l1"] = config.loss_joint_l1 * l1 / counts[1]
        terms[f"joint.{i}.oks"] = config.loss_joint_oks * oks / counts[0]
    return terms


def gaussian_radius(width: Tensor, height: Tensor, min_overlap: float = 0.9) -> Tensor:
    """Largest shift of a box's corners that keeps an IoU of `min_overlap` in each of three cases (CornerNet)."""
    total, product = height + width, width * height
    c1 = product * (1 - min_overlap) / (1 + min_overlap)
    r1 = (total - (total**2 - 4 * c1).clamp(min=0).sqrt()) / 2
    c2 = (1 - min_overlap) * product
    r2 = (2 * total - (4 * total**2 - 16 * c2).clamp(min=0).sqrt()) / 8
    b3, c3 = -2 * min_overlap * total, (min_overlap - 1) * product
    r3 = (b3 + (b3**2 - 16 * min_overlap * c3).clamp(min=0).sqrt()) / (8 * min_overlap)
    return torch.stack([r1, r2, r3]).amin(0)


@torch.no_grad()
def heatmap_targets(targets: Targets, height: int, width: int, stride: int) -> Tensor:
    """(B, K, H, W) Gaussians with peak 1 at floor(keypoint / stride), the larger one where they overlap.

    The radius follows the person's box at that stride, floored and clamped to [0, 3]; sigma = (2 r + 1) / 6.
    """
    batch, _, joints = targets.visible.shape
    extent = (targets.boxes[..., 2:] - targets.boxes[..., :2]) / stride  # (B, n, 2)
    radius = gaussian_radius(extent[..., 0].ceil(), extent[..., 1].ceil()).floor().clamp(0, 3)  # (B, n)
    image, person, joint = targets.visible.nonzero(as_tuple=True)  # (v,) each
    pixels = targets.keypoints[image, person, joint] * targets.sizes[image]
    # Normalised and back may fall just short of a cell's border; 1e-4 px puts it back.
    centre = ((pixels + 1e-4) / stride).floor().long()  # (v, 2)
    reach = radius[image, person][:, None]  # (v, 1)
    steps = torch.arange(-3, 4, device=centre.device)
    dy, dx = (step.flatten() for step in torch.meshgrid(steps, steps, indexing="ij"))  # (49,)
    values = (-(dx**2 + dy**2) / (2 * ((2 * reach + 1) / 6) ** 2)).exp()  # (v, 49)
    x, y = centre[:, :1] + dx, centre[:, 1:] + dy
    inside = (dx.abs() <= reach) & (dy.abs() <= reach) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = ((image * joints + joint)[:, None] * height + y) * width + x
    flat = values.new_zeros(batch * joints * height * width)
    flat.scatter_reduce_(0, index[inside], values[inside], "amax")
    return flat.view(batch, joints, height, width)


def heatmap_loss(
    logits: Tensor, padding: Tensor | None, targets: Targets, stride: int, config: HPetrConfig
) -> dict[str, Tensor]:
    """Penalty-reduced focal loss (CornerNet, alpha 2, beta 4) of logits (B, K, H, W); padding (B, H, W) is left out."""
    height, width = logits.shape[-2:]
    truth = heatmap_targets(targets, height, width, stride)
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = truth == 1
    positive = -probability.log() * (1 - probability) ** 2 * peak
    negative = -(1 - probability).log() * probability**2 * (1 - truth) ** 4
    loss = positive + negative
    counted = torch.ones_like(loss, dtype=torch.bool) if padding is None else ~padding[:, None].expand_as(loss)
    if targets.ignore_boxes.shape[1]:
        counted = counted & ~ignored_cells(targets, height, width, stride)[:, None]
    peaks = mean_over_processes((peak & counted).sum().float())
    return {"heatmap": config.loss_heatmap * (loss * counted).sum() / peaks}


def ignored_cells(targets: Targets, height: int, width: int, stride: int) -> Tensor:
    """(B, H, W) true where a cell's centre lies in an ignore box."""
    device = targets.ignore_boxes.device
    x = ((torch.arange(width, device=device) + 0.5) * stride).view(1, 1, 1, -1)
    y = ((torch.arange(height, device=device) + 0.5) * stride).view(1, 1, -1, 1)
    left, top, right, bottom = (targets.ignore_boxes[..., i, None, None] for i in range(4))  # (B, m, 1, 1)
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1)
