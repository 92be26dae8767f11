"""Time and memory of inference in the official order of computation and in hpetr's, on the same weights.

    python benchmarks/literal_order.py [--preset h-petr-r50] [--size 800x1216] [--repeats 3] [--threads 2]

The literal order computes as the official code does: deformable attention by grid_sample; the keypoint MLP of the
proposals on every token; all queries, also one-to-many, in the pose decoder under a block mask; the image's memory
copied for each pose, and every copy projected, in the joint decoder. Both orders give the same poses, which the script
checks. Each runs in its own process, so that peak memory is its own. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.inference.precision import keep_freed_memory
from hpetr.model.proposals import Predictions
from hpetr.model.steps import inverse_sigmoid


def literal_pose_decoder(model: HPetrForPoseEstimation, memory: Tensor, grid) -> Predictions:
    """Return the predictions of all queries under a block mask, with keypoints for every token's proposal."""
    decoder, config = model.pose_decoder, model.config
    proposals = decoder.propose(memory, grid)
    every = proposals.predictions()
    total = decoder.query_embedding.num_embeddings
    best = every.logits[..., 0].topk(total, dim=1).indices[..., None, None]
    references = every.keypoints.gather(1, best.expand(-1, -1, config.num_keypoints, 2))
    position, x = decoder.query_embedding.weight.expand(len(memory), -1, -1).chunk(2, -1)
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[: config.num_queries, config.num_queries :] = True
    mask[config.num_queries :, : config.num_queries] = True
    logits, keypoints = [], []
    for i, layer in enumerate(decoder.layers):
        keys = x + position
        x = layer.self_attention_norm(x + layer.self_attention(keys, keys, x, need_weights=False, attn_mask=mask)[0])
        value = layer.attention.project_value(memory, grid.padding_mask)
        x = layer.attend_to_image(x, position, grid.scale_references(references), value, grid.spatial_shapes)
        offsets = decoder.keypoint_heads[i](x).unflatten(-1, (-1, 2))
        logits.append(decoder.class_heads[i](x))
        keypoints.append((offsets + inverse_sigmoid(references)).sigmoid())
        references = keypoints[-1]
    kept = slice(0, config.num_queries)
    return Predictions(torch.stack(logits)[:, :, kept], torch.stack(keypoints)[:, :, kept])


def literal_joint_decoder(model: HPetrForPoseEstimation, memory: Tensor, grid, poses: Tensor) -> Tensor:
    """Return the refined poses (1, T, K, 2): memory is copied for each pose, every copy projected in every layer."""
    decoder = model.joint_decoder
    count = poses.shape[1]
    copies = memory.repeat(count, 1, 1)  # (T, S, D)
    position, x = (part.expand(count, -1, -1) for part in decoder.query_embedding.weight.chunk(2, -1))
    references = poses[0]  # (T, K, 2)
    for layer, head in zip(decoder.layers, decoder.heads, strict=True):
        x = layer.attend_to_each_other(x, position, [x.shape[1]])
        value = layer.attention.project_value(copies, None)
        references_of_levels = grid.scale_references(references[:, :, None])
        x = layer.attend_to_image(x, position, references_of_levels, value, grid.spatial_shapes)
        references = (head(x) + inverse_sigmoid(references)).sigmoid()
    return references[None]


def measure(order: str, preset: str, height: int, width: int, repeats: int) -> dict:
    """Return the median seconds of every stage, peak memory in MB, and a checksum of the poses."""
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset(preset)).eval()
    for name, parameter in model.named_parameters():
        if "keypoint_heads" in name or "joint_decoder.heads" in name or "sampling_offsets" in name:
            torch.nn.init.normal_(parameter, std=0.03)  # a fresh model's zeros would make the orders' poses equal
    pixels = torch.randn(1, 3, height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: dict[str, list[float]] = {"backbone and encoder": [], "pose decoder": [], "joint decoder": [], "image": []}
    poses = torch.empty(0)
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            memory, grid, prior = model.encode(pixels, None)
            encoded = time.perf_counter()
            if order == "literal":
                predictions = literal_pose_decoder(model, memory, grid)
            else:
                predictions = model.pose_decoder(memory, grid, model.propose(memory, grid, prior), model.groups[:1])[0]
            decoded = time.perf_counter()
            best = predictions.logits[-1][0, :, 0].topk(model.config.num_poses).indices
            chosen = predictions.keypoints[-1][:, best]
            if order == "literal":
                poses = literal_joint_decoder(model, memory, grid, chosen)
            else:
                poses = model.joint_decoder(memory, grid, chosen)[0][-1]
            end = time.perf_counter()
            spans = (encoded - start, decoded - encoded, end - decoded, end - start)
            for name, span in zip(times, spans, strict=True):
                times[name].append(span)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {name: statistics.median(values) for name, values in times.items()}
    return {**result, "peak MB": peak / 1024, "of it before": before / 1024, "poses": poses.flatten()[:400].tolist()}


def run(order: str, args: argparse.Namespace) -> dict:
    """Run `measure` in its own process; the literal order uses grid_sample."""
    command = [sys.executable, __file__, "--order", order, "--preset", args.preset, "--size", args.size]
    command += ["--repeats", str(args.repeats if order == "hpetr" else 1), "--threads", str(args.threads)]
    kernel = {"HPETR_KERNEL": "reference"} if order == "literal" else {}
    done = subprocess.run(command, env={**os.environ, **kernel}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h-petr-r50")
    parser.add_argument("--size", default="800x1216", help="height x width")
    parser.add_argument("--repeats", type=int, default=3, help="of hpetr's order; the literal one runs once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--order", choices=["literal", "hpetr"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.order == "hpetr":
        keep_freed_memory()  # as the command line does; the official code leaves the system's default
    if args.order:
        height, width = (int(side) for side in args.size.split("x"))
        print(json.dumps(measure(args.order, args.preset, height, width, args.repeats)))
        return
    literal, ours = run("literal", args), run("hpetr", args)
    apart = max(abs(a - b) for a, b in zip(literal["poses"], ours["poses"], strict=True))
    print(f"{args.preset}, {args.size}, {args.threads} threads, float32; poses differ by {apart:.1e} at most")
    print(f"{'':22}{'literal':>10}{'hpetr':>10}{'ratio':>8}")
    for name in ("backbone and encoder", "pose decoder", "joint decoder", "image", "peak MB"):
        print(f"{name:22}{literal[name]:>10.2f}{ours[name]:>10.2f}{literal[name] / ours[name]:>8.1f}")


if __name__ == "__main__":
    main()
