"""The losses of PETR (section 3.4) and of hybrid matching (H-DETR, arXiv 2207.13080)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hpetr.model.config import HPetrConfig
from hpetr.model.groups import Hungarian, QueryGroup
from hpetr.model.host import to_device
from hpetr.model.matching import (
    FOCAL_ALPHA,
    FOCAL_GAMMA,
    Matches,
    PendingAssignments,
    Targets,
    at_least_float32,
    keypoint_similarity,
    object_keypoint_similarity,
    pose_cost,
)
from hpetr.model.proposals import Predictions, Proposals


def mean_over_processes(counts: Tensor) -> Tensor:
    """Average counts that divide losses over processes, so that DDP's mean of gradients is exact; at least 1."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
        counts = counts / dist.get_world_size()
    return counts.clamp(min=1)


@dataclass
class Matching:
    """All matched pairs of a training step.

    Attributes:
        proposals: of the proposals (1 part).
        layers: of layer i and query group g (part i * groups + g).
        joint: of the joint decoder (1 part), which refines the last layer's matches of all groups.
        most: largest number of matches of an image in the joint decoder, at least 1.
    """

    proposals: Matches
    layers: Matches
    joint: Matches
    most: int


def layer_costs(
    layers: Predictions, sizes: list[int], targets: Targets, config: HPetrConfig, sigmas: Tensor
) -> list[Tensor]:
    """Return the costs (B, Q_g, n) of every layer's groups, layer by layer, of predictions (layers, B, Q, ...)."""
    groups = pose_cost(layers, targets, config, sigmas).split(sizes, 2)
    return [group[layer] for layer in range(len(layers.logits)) for group in groups]


def count_from_first_group(pairs: list[np.ndarray], sizes: list[int]) -> None:
    """Let the queries of pairs (3, m) of every layer's groups count from the first query of all groups, in place."""
    for part, own in enumerate(pairs):
        own[1] += sum(sizes[: part % len(sizes)])


def start_matching(
    proposals: Predictions,
    layers: Predictions,
    groups: Sequence[QueryGroup],
    sizes: list[int],
    targets: Targets,
    config: HPetrConfig,
    sigmas: Tensor,
) -> PendingAssignments:
    """Start the assignment of the proposals and of every pose-decoder layer's groups.

    Args:
        proposals: of all tokens, (B, S, ...).
        layers: (layers, B, Q, ...), one group after the other.
        groups: the query groups.
        sizes: their numbers of queries.
        targets: people of the batch.
        config: weights of the cost.
        sigmas: (K,).
    """
    costs = [pose_cost(proposals, targets, config, sigmas), *layer_costs(layers, sizes, targets, config, sigmas)]
    rules = [group.assignment for group in groups] * len(layers.logits)
    return PendingAssignments(costs, targets.counts, [Hungarian(config.proposal_k), *rules])


def finish_matching(pending: PendingAssignments, sizes: list[int], device: torch.device) -> Matching:
    """Wait for the assignments, and send the pairs to the device in one copy."""
    proposal_pairs, *layer_pairs = pending.solve()  # (3, m) each: image, query, target
    count_from_first_group(layer_pairs, sizes)
    last = np.concatenate(layer_pairs[-len(sizes) :], 1)
    last = last[:, last[0].argsort(kind="stable")]
    per_image = np.bincount(last[0], minlength=len(pending.counts))
    slots = np.arange(last.shape[1]) - (per_image.cumsum() - per_image)[last[0]]
    proposals, layers, joint = matches_on([[proposal_pairs], layer_pairs, [last]], device, slots)
    return Matching(proposals, layers, joint, most=max(int(per_image.max()), 1))


def matches_on(blocks: list[list[np.ndarray]], device: torch.device, last_slots: np.ndarray) -> list[Matches]:
    """Send blocks of parts to the device in one copy.

    Args:
        blocks: each a list of pairs (3, m), one for each part.
        device: where the matches go.
        last_slots: (m,) `Matches.slot` of the last block; 0 for the others.
    """
    lengths = [[pairs.shape[1] for pairs in block] for block in blocks]
    parts = np.concatenate([np.full(length, i) for block in lengths for i, length in enumerate(block)])
    columns = np.concatenate([pairs for block in blocks for pairs in block], 1)
    slot = np.concatenate([np.zeros(len(parts) - len(last_slots), np.int64), last_slots])
    table = to_device(torch.from_numpy(np.stack([parts, *columns, slot])), device)  # (5, m of all blocks)
    rows = table.split([sum(block) for block in lengths], 1)
    return [Matches(block, *row) for row, block in zip(rows, lengths, strict=True)]


def match_counts(matching: Matching, targets: Targets) -> list[Tensor]:
    """Return the divisors of the proposals', layers' and joint decoder's losses, over processes: (parts, 2) each.

    They are the number of matched queries, and twice the number of their labelled keypoints.
    """
    blocks = [matching.proposals, matching.layers, matching.joint]
    labelled = targets.visible.sum(-1)  # (B, n)
    keypoints = torch.cat([2 * block.sums(labelled[block.image, block.target]) for block in blocks])
    matched = torch.tensor([size for block in blocks for size in block.sizes])
    counts = torch.stack([to_device(matched, keypoints.device), keypoints], -1).float()
    return list(mean_over_processes(counts).split([len(block.sizes) for block in blocks]))


def person_counts(matches: Matches, targets: Targets, groups: int) -> Tensor:
    """Return Group Pose's divisors (parts, 2): persons of the batch; of further groups, their matched queries."""
    persons = sum(targets.counts)
    sizes = [size if part % groups else persons for part, size in enumerate(matches.sizes)]
    counts = to_device(torch.tensor(sizes, dtype=torch.float32), matches.part.device)
    return mean_over_processes(counts)[:, None].expand(-1, 2)


def ignored_queries(keypoints: Tensor, targets: Targets) -> Tensor:
    """Return which predicted poses (..., B, Q, K, 2) have their center in an ignore box of their image: (..., B, Q)."""
    middle = keypoints.detach().mean(-2) * targets.sizes[:, None]  # (..., B, Q, 2) pixels
    boxes = targets.ignore_boxes[:, None]  # (B, 1, m, 4)
    inside = (middle[..., None, :] >= boxes[..., :2]) & (middle[..., None, :] < boxes[..., 2:])  # (..., B, Q, m, 2)
    return inside.all(-1).any(-1)


def focal_terms(predictions: Predictions, truth: Tensor, targets: Targets) -> Tensor:
    """Return the sigmoid focal loss of every query (..., B, Q), summed over classes (Lin et al. 2017).

    Args:
        predictions: logits (..., B, Q, C) with gradient. Unmatched queries whose keypoints lie in ignore boxes do not
            count.
        truth: as the logits: 1 for the class of a matched query, or its OKS in 0..1. With an OKS this is the quality
            focal loss of Li et al. 2020 (arXiv 2006.04388) with focal loss's alpha.
        targets: ignore boxes.
    """
    logits = at_least_float32(predictions.logits)
    probability = logits.sigmoid()
    miss = (truth - probability).abs()
    alpha = FOCAL_ALPHA * truth + (1 - FOCAL_ALPHA) * (1 - truth)
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * alpha * miss**FOCAL_GAMMA
    if targets.ignore_boxes.shape[1]:
        counted = ~ignored_queries(predictions.keypoints, targets) | truth.bool().any(-1)
        loss = loss * counted[..., None]
    return loss.sum(-1)


def oks_loss(similarity: Tensor, config: HPetrConfig) -> Tensor:
    """Return the loss of an object keypoint similarity."""
    similarity = similarity.clamp(min=1e-6)
    return 1 - similarity if config.oks_loss == "linear" else -similarity.log()


def keypoint_terms(
    keypoints: Tensor, matches: Matches, targets: Targets, config: HPetrConfig, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    """Return L1 (normalized coordinates) and OKS of matched poses (..., m, K, 2), 1 = the image: (..., m) each."""
    visible = targets.visible[matches.image, matches.target]  # (m, K)
    sizes = targets.sizes[matches.image][:, None]  # (m, 1, 2)
    difference = keypoints * sizes - targets.keypoints[matches.image, matches.target]  # (..., m, K, 2) pixels
    l1 = (difference.abs() / sizes * visible[..., None]).sum((-1, -2))
    unit = targets.oks_unit(config)[matches.image]  # (m, 2)
    areas = targets.areas[matches.image, matches.target] / unit.prod(-1)
    squared = (difference / unit[:, None]).square().sum(-1)  # (..., m, K)
    return l1, object_keypoint_similarity(squared, visible, areas, sigmas)


def proposal_losses(
    proposals: Proposals,
    keypoints: Tensor,
    matches: Matches,
    targets: Targets,
    config: HPetrConfig,
    sigmas: Tensor,
    counts: Tensor,
) -> dict[str, Tensor]:
    """Return the focal loss over all tokens, with class 0 for every matched one, and the L1 loss of the matched ones.

    Args:
        proposals: of all tokens.
        keypoints: (B, S, K, 2) of all tokens, without gradient.
        matches: of the proposals.
        targets: people of the batch.
        config: weights.
        sigmas: (K,).
        counts: (1, 2) from `match_counts`.
    """
    truth = torch.zeros_like(proposals.logits, dtype=torch.promote_types(proposals.logits.dtype, torch.float32))
    truth[matches.image, matches.query, config.leading_columns] = 1
    focal = focal_terms(Predictions(proposals.logits, keypoints), truth, targets).sum()
    matched = proposals.keypoints_at(matches.image, matches.query)  # (m, K, 2)
    l1 = keypoint_terms(matched, matches, targets, config, sigmas)[0].sum()
    return {
        "proposal.class": config.loss_class * focal / counts[0, 0],
        "proposal.l1": config.loss_l1 * l1 / counts[0, 1],
    }


def decoder_losses(
    layers: Predictions,
    sizes: list[int],
    matches: Matches,
    targets: Targets,
    config: HPetrConfig,
    sigmas: Tensor,
    counts: Tensor,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Return the losses of every pose-decoder layer, each group divided by its own counts and the groups added.

    Args:
        layers: (layers, B, Q, ...).
        sizes: number of queries of each group.
        matches: of all layers and groups.
        targets: people of the batch.
        config: weights.
        sigmas: (K,).
        counts: (layers * groups, 2) from `match_counts` or `person_counts`.
        names: of the layers, the first part of their terms' names.
    """
    depth = len(layers.logits)
    layer = torch.div(matches.part, len(sizes), rounding_mode="floor")
    truth = torch.zeros_like(layers.logits, dtype=torch.promote_types(layers.logits.dtype, torch.float32))
    matched = layers.keypoints[layer, matches.image, matches.query]  # (m, K, 2)
    distance, similarity = keypoint_terms(matched, matches, targets, config, sigmas)
    classes = targets.classes[matches.image, matches.target] + config.leading_columns
    quality = similarity.detach() if config.class_target == "oks" else 1.0
    truth[layer, matches.image, matches.query, classes] = quality
    focal = focal_terms(layers, truth, targets).sum(1)  # (layers, Q)
    focal = torch.stack([group.sum(-1) for group in focal.split(sizes, 1)], -1)  # (layers, groups)
    seen = targets.visible[matches.image, matches.target].any(-1)
    l1, oks = (matches.sums(x).view(depth, -1) for x in (distance, oks_loss(similarity, config) * seen))
    people, coordinates = counts.view(depth, len(sizes), 2).unbind(-1)
    sums = {
        "class": config.loss_class * (focal / people).sum(-1),  # (layers,) each
        "l1": config.loss_l1 * (l1 / coordinates).sum(-1),
        "oks": config.loss_oks * (oks / people).sum(-1),
    }
    return {f"{name}.{kind}": term[i] for i, name in enumerate(names) for kind, term in sums.items()}


def joint_losses(
    poses: Tensor,
    scores: Tensor | None,
    matches: Matches,
    targets: Targets,
    config: HPetrConfig,
    sigmas: Tensor,
    counts: Tensor,
) -> dict[str, Tensor]:
    """Return the losses of every joint-decoder layer over the matched poses of all groups.

    Args:
        poses: (layers, B, T, K, 2).
        scores: (B, T, K) logits of the keypoint scores, or None.
        matches: of the joint decoder.
        targets: people of the batch.
        config: weights.
        sigmas: (K,).
        counts: (1, 2) from `match_counts`.
    """
    l1, similarity = keypoint_terms(
        poses[:, matches.image, matches.slot], matches, targets, config, sigmas
    )  # (layers, m)
    oks = oks_loss(similarity, config) * targets.visible[matches.image, matches.target].any(-1)
    terms = {}
    for i in range(len(poses)):
        terms[f"joint.{i}.l1"] = config.loss_joint_l1 * l1[i].sum() / counts[0, 1]
        terms[f"joint.{i}.oks"] = config.loss_joint_oks * oks[i].sum() / counts[0, 0]
    if scores is not None:
        matched = poses[-1, matches.image, matches.slot].detach(), scores[matches.image, matches.slot]
        terms["joint.score"] = config.loss_keypoint_score * score_loss(*matched, matches, targets, sigmas)
    return terms


def score_loss(poses: Tensor, scores: Tensor, matches: Matches, targets: Targets, sigmas: Tensor) -> Tensor:
    """Return the binary cross-entropy of keypoint scores (m, K) of matched poses (m, K, 2), averaged over keypoints.

    A labelled keypoint is right if its keypoint similarity is at least one half; an absent one is wrong; others do not
    count.
    """
    person = matches.image, matches.target
    difference = poses * targets.sizes[matches.image][:, None] - targets.keypoints[person]  # (m, K, 2) pixels
    right = keypoint_similarity(difference.square().sum(-1), targets.areas[person], sigmas) >= 0.5  # (m, K)
    visible, absent = targets.visible[person], targets.absent[person]
    loss = F.binary_cross_entropy_with_logits(at_least_float32(scores), (right & visible).float(), reduction="none")
    known = visible | absent
    return (loss * known).sum() / mean_over_processes(known.sum().float())


def gaussian_radius(width: Tensor, height: Tensor, min_overlap: float = 0.9) -> Tensor:
    """Return the largest shift of a box's corners that keeps an IoU of `min_overlap` in three cases (CornerNet)."""
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
    """Return Gaussians (B, K, H, W) with peak 1 at floor(keypoint / stride), the larger one where they overlap.

    Their radius r follows the person's box at that stride, floored and clamped to [0, 3]; sigma = (2 r + 1) / 6.
    """
    batch, _, joints = targets.visible.shape
    extent = (targets.boxes[..., 2:] - targets.boxes[..., :2]) / stride  # (B, n, 2)
    radius = gaussian_radius(extent[..., 0].ceil(), extent[..., 1].ceil()).floor().clamp(0, 3)  # (B, n)
    center = (targets.keypoints / stride).floor().long()  # (B, n, K, 2)
    reach = radius[..., None, None]  # (B, n, 1, 1)
    steps = torch.arange(-3, 4, device=center.device)
    dy, dx = (step.flatten() for step in torch.meshgrid(steps, steps, indexing="ij"))  # (49,)
    values = (-(dx**2 + dy**2) / (2 * ((2 * reach + 1) / 6) ** 2)).exp()  # (B, n, 1, 49)
    x, y = center[..., :1] + dx, center[..., 1:] + dy  # (B, n, K, 49)
    inside = (dx.abs() <= reach) & (dy.abs() <= reach) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # Cells outside add a 0, which is no maximum: selecting the cells inside would synchronize with the device.
    values = values * (inside & targets.visible[..., None])
    index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).transpose(1, 2).flatten(2)  # (B, K, n * 49)
    flat = values.new_zeros(batch, joints, height * width)
    flat.scatter_reduce_(2, index, values.transpose(1, 2).flatten(2), "amax")
    return flat.view(batch, joints, height, width)


def heatmap_loss(
    logits: Tensor, padding: Tensor | None, targets: Targets, stride: int, config: HPetrConfig
) -> dict[str, Tensor]:
    """Return the penalty-reduced focal loss (CornerNet, alpha 2, beta 4) of logits (B, K, H, W) outside padding."""
    height, width = logits.shape[-2:]
    truth = heatmap_targets(targets, height, width, stride)
    probability = at_least_float32(logits).sigmoid().clamp(1e-4, 1 - 1e-4)
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
    """Return which cells have their center in an ignore box, (B, H, W)."""
    device = targets.ignore_boxes.device
    x = ((torch.arange(width, device=device) + 0.5) * stride).view(1, 1, 1, -1)
    y = ((torch.arange(height, device=device) + 0.5) * stride).view(1, 1, -1, 1)
    left, top, right, bottom = (targets.ignore_boxes[..., i, None, None] for i in range(4))  # (B, m, 1, 1)
    return ((x >= left) & (x < right) & (y >= top) & (y < bottom)).any(1)
