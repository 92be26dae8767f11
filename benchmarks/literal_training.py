"""The losses of a training step in the official order of computation; `training_step.py` compares it with hpetr's.

It follows the method's description step by step, as the official code does, without batching over images, layers,
groups or people. It shares hpetr's modules, and so their weights, and the formulas of single terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.model.attention import DeformableLayer
from hpetr.model.grid import Grid
from hpetr.model.losses import gaussian_radius
from hpetr.model.steps import inverse_sigmoid

Label = dict[str, Tensor]
Match = list[tuple[Tensor, Tensor]]  # for each image, query and target indices


def project_and_attend(layer: DeformableLayer, x: Tensor, position: Tensor, references: Tensor, memory: Tensor, grid):
    value = layer.attention.project_value(memory, None)
    return layer.attend_to_image(x, position, grid.scale_references(references), value, grid.spatial_shapes)


def pose_decoder(model: HPetrForPoseEstimation, memory: Tensor, grid: Grid):
    """Return logits and keypoints, with gradient, of all tokens, and of every layer's queries under a block mask."""
    decoder, config = model.pose_decoder, model.config
    proposals = decoder.propose(memory, grid)
    offsets = proposals.head(proposals.features).unflatten(-1, (-1, 2))
    every = (offsets + proposals.centers.logit()[..., None, :]).sigmoid()  # (B, S, K, 2)
    total = decoder.query_embedding.num_embeddings
    best = proposals.logits[..., 0].topk(total, dim=1).indices[..., None, None]
    references = every.gather(1, best.expand(-1, -1, config.num_keypoints, 2)).detach()
    position, x = decoder.query_embedding.weight.expand(len(memory), -1, -1).chunk(2, -1)
    group = torch.arange(total, device=memory.device) < config.num_queries
    mask = group[:, None] != group
    outputs = []
    for i, layer in enumerate(decoder.layers):
        keys = x + position
        x = layer.self_attention_norm(x + layer.self_attention(keys, keys, x, need_weights=False, attn_mask=mask)[0])
        x = project_and_attend(layer, x, position, references, memory, grid)
        offsets = decoder.keypoint_heads[i](x).unflatten(-1, (-1, 2))
        outputs.append((decoder.class_heads[i](x), (offsets + inverse_sigmoid(references)).sigmoid()))
        references = outputs[-1][1].detach()
    return proposals.logits, every, outputs


def joint_decoder(model: HPetrForPoseEstimation, memory: Tensor, grid: Grid, poses: Tensor, image: Tensor) -> Tensor:
    """Refine P poses (P, K, 2), with a copy of its image's memory for each, projected in every layer."""
    decoder = model.joint_decoder
    copies = memory[image]  # (P, S, D)
    position, x = (part.expand(len(poses), -1, -1) for part in decoder.query_embedding.weight.chunk(2, -1))
    copied = Grid(
        grid.spatial_shapes, None, grid.valid_ratios[image], grid.centers[image], grid.cells[image], grid.positions
    )
    references, outputs = poses, []
    for layer, head in zip(decoder.layers, decoder.heads, strict=True):
        x = layer.attend_to_each_other(x, position, [x.shape[1]])
        x = project_and_attend(layer, x, position, references[:, :, None], copies, copied)
        outputs.append((head(x) + inverse_sigmoid(references)).sigmoid())
        references = outputs[-1].detach()
    return torch.stack(outputs)  # (layers, P, K, 2)


@torch.no_grad()
def match(logits: Tensor, keypoints: Tensor, label: Label, size: Tensor, config: HPetrConfig, repeat: int):
    """Match queries to targets in one image, layer and group: logits (Q, C), normalized keypoints (Q, K, 2)."""
    sigmas = torch.tensor(config.skeleton["sigmas"], device=logits.device)
    people = [i for _ in range(repeat) for i in range(len(label["areas"]))]
    probability = logits.float().sigmoid()
    negative = -(1 - probability + 1e-12).log() * 0.75 * probability**2
    positive = -(probability + 1e-12).log() * 0.25 * (1 - probability) ** 2
    columns = []
    for person in people:
        truth, seen = label["keypoints"][person, :, :2], label["keypoints"][person, :, 2] > 0
        focal = (positive - negative)[:, label["class_labels"][person]]
        l1 = ((keypoints - truth / size).abs() * seen[:, None]).sum((1, 2)) / (2 * seen.sum())
        squared = (keypoints * size - truth).square().sum(-1)
        similarity = (-squared / (2 * label["areas"][person] * (2 * sigmas) ** 2)).exp()
        oks = (similarity * seen).sum(-1) / seen.sum()
        columns.append(config.cost_class * focal + config.cost_l1 * l1 - config.cost_oks * oks)
    query, column = linear_sum_assignment(torch.stack(columns, 1).cpu().numpy())
    query, column = torch.from_numpy(query).to(logits.device), torch.from_numpy(column).to(logits.device)
    return query, column % len(label["areas"])


def regression(keypoints: list[Tensor], targets: list[Tensor], labels: list[Label], size: Tensor, config: HPetrConfig):
    """Return the L1 and OKS losses of matched poses of all images: means over labelled coordinates and over poses."""
    sigmas = torch.tensor(config.skeleton["sigmas"], device=size.device)
    predicted = torch.cat(keypoints)  # (m, K, 2)
    truth = torch.cat([label["keypoints"][target] for label, target in zip(labels, targets, strict=True)])
    areas = torch.cat([label["areas"][target] for label, target in zip(labels, targets, strict=True)])
    seen = truth[..., 2] > 0
    l1 = ((predicted - truth[..., :2] / size).abs() * seen[..., None]).sum() / (2 * seen.sum()).clamp(min=1)
    squared = (predicted * size - truth[..., :2]).square().sum(-1)
    similarity = (-squared / (2 * areas[:, None] * (2 * sigmas) ** 2)).exp()
    oks = (similarity * seen).sum(-1) / seen.sum(-1).clamp(min=1)
    return l1, -oks.clamp(min=1e-6).log().sum() / max(len(oks), 1)


def focal_loss(logits: Tensor, match: Match, classes: list[Tensor]) -> Tensor:
    """Return the sigmoid focal loss of logits (B, Q, C) over all queries, divided by the number of matched ones."""
    truth = torch.zeros_like(logits, dtype=torch.float32)
    for i, (query, target) in enumerate(match):
        truth[i, query, classes[i][target]] = 1
    probability = logits.float().sigmoid()
    miss = probability * (1 - truth) + (1 - probability) * truth
    alpha = 0.25 * truth + 0.75 * (1 - truth)
    loss = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none") * alpha * miss**2
    return loss.sum() / max(sum(len(query) for query, _ in match), 1)


def group_losses(
    logits: Tensor, keypoints: Tensor, labels: list[Label], size: Tensor, config: HPetrConfig, repeat: int
):
    """Return the losses and the match of one layer and group: logits (B, Q, C), keypoints (B, Q, K, 2)."""
    pairs = [match(logits[i], keypoints[i], label, size, config, repeat) for i, label in enumerate(labels)]
    matched = [keypoints[i, query] for i, (query, _) in enumerate(pairs)]
    l1, oks = regression(matched, [target for _, target in pairs], labels, size, config)
    return focal_loss(logits, pairs, [label["class_labels"] for label in labels]), l1, oks, pairs


def heatmap_targets(labels: list[Label], joints: int, height: int, width: int, stride: int) -> Tensor:
    """Return the heatmaps (B, K, H, W), drawn one Gaussian after the other."""
    maps = torch.zeros(len(labels), joints, height, width)
    for image, label in enumerate(labels):
        for person in range(len(label["areas"])):
            extent = ((label["boxes"][person, 2:] - label["boxes"][person, :2]) / stride).ceil()
            reach = int(gaussian_radius(extent[0], extent[1]).floor().clamp(0, 3))
            sigma = (2 * reach + 1) / 6
            for joint in range(joints):
                x, y, visible = label["keypoints"][person, joint].tolist()
                if not visible:
                    continue
                x, y = int(x // stride), int(y // stride)
                left, right = max(x - reach, 0), min(x + reach + 1, width)
                top, bottom = max(y - reach, 0), min(y + reach + 1, height)
                dx = torch.arange(left, right) - x
                dy = torch.arange(top, bottom)[:, None] - y
                patch = maps[image, joint, top:bottom, left:right]
                torch.maximum(patch, (-(dx**2 + dy**2) / (2 * sigma**2)).exp(), out=patch)
    return maps


def heatmap_loss(model: HPetrForPoseEstimation, memory: Tensor, grid: Grid, labels: list[Label], stride: int) -> Tensor:
    height, width = grid.spatial_shapes[0]
    tokens = memory[:, : height * width]
    layer, coarse = model.heatmap_encoder.layers[0], grid.first_level()
    features = project_and_attend(
        layer, tokens, torch.zeros_like(tokens[:1]), coarse.centers[:, :, None], tokens, coarse
    )
    logits = model.heatmap_head(features).transpose(1, 2).unflatten(-1, (height, width))
    truth = heatmap_targets(labels, model.config.num_keypoints, height, width, stride).to(logits.device)
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = -probability.log() * (1 - probability) ** 2 * (truth == 1)
    negative = -(1 - probability).log() * probability**2 * (1 - truth) ** 4
    return (positive + negative).sum() / (truth == 1).sum().clamp(min=1)


def loss_terms(model: HPetrForPoseEstimation, pixels: Tensor, labels: list[Label]) -> dict[str, Tensor]:
    """Return all weighted loss terms of images (B, 3, H, W) without padding."""
    config = model.config
    size = torch.tensor([pixels.shape[3], pixels.shape[2]], dtype=torch.float32, device=pixels.device)
    memory, grid, _ = model.encode(pixels, None)
    proposal_logits, proposal_keypoints, outputs = pose_decoder(model, memory, grid)
    binary = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    focal, l1, _, _ = group_losses(proposal_logits, proposal_keypoints, binary, size, config, 1)
    terms = {"proposal.class": config.loss_class * focal, "proposal.l1": config.loss_l1 * l1}
    terms["heatmap"] = config.loss_heatmap * heatmap_loss(
        model, memory, grid, labels, round(pixels.shape[3] / grid.spatial_shapes[0][1])
    )
    first = config.num_queries
    last: list[tuple[int, Tensor, Tensor]] = []
    for i, (logits, keypoints) in enumerate(outputs):
        last = []
        for group, repeat in ((slice(0, first), 1), (slice(first, None), config.one_to_many_k)):
            if not logits[:, group].shape[1]:
                continue
            *losses, pairs = group_losses(logits[:, group], keypoints[:, group], labels, size, config, repeat)
            weights = (config.loss_class, config.loss_l1, config.loss_oks)
            for name, weight, loss in zip(("class", "l1", "oks"), weights, losses, strict=True):
                key = f"decoder.{i}.{name}"
                terms[key] = terms.get(key, 0) + weight * loss
            last += [(image, keypoints[image, group][query], target) for image, (query, target) in enumerate(pairs)]
    last.sort(key=lambda entry: entry[0])
    image = torch.cat([torch.full((len(poses),), i) for i, poses, _ in last]).to(pixels.device)
    refined = joint_decoder(model, memory, grid, torch.cat([poses for _, poses, _ in last]).detach(), image)
    counts = [len(poses) for _, poses, _ in last]
    for i, layer in enumerate(refined):
        chosen = [labels[image] for image, _, _ in last]
        l1, oks = regression(list(layer.split(counts)), [target for _, _, target in last], chosen, size, config)
        terms[f"joint.{i}.l1"], terms[f"joint.{i}.oks"] = config.loss_joint_l1 * l1, config.loss_joint_oks * oks
    return terms
