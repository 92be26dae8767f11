"""Time and memory of a training step in the official order of computation and in hpetr's, on the same weights.

    python benchmarks/training_step.py [--preset h-petr-r50] [--size 640x640] [--batch 2] [--threads 2] [--repeats 3]
        [--device cpu] [--precision float32] [--gradient-checkpointing] [--compile] [--skip-literal] [--joint-decoder]
        [--profile]

The literal order computes as the official code does: deformable attention by grid_sample; the keypoint MLP of the
proposals with gradient on every token; all queries under a block mask; costs for each image, layer and group
separately, with a loop over people; heatmap targets person by person; the image's memory copied for every matched pose,
and each copy projected in every layer of the joint decoder. Both orders give the same loss terms (dropout 0), which the
script checks. Each runs in its own process, so that peak memory is its own.

A step is forward, losses, backward, clipping and AdamW. With `--device cuda` the defaults are 800 x 1333 images,
batches of 1, 2, 4, 8 and 16, float32 and bfloat16. Weights and people are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import literal_training
from hpetr import HPetrConfig, HPetrForPoseEstimation

PEOPLE = [6, 3, 1, 8, 2, 5, 4, 10]  # of the images of a batch
JOINT_POSES = [10, 50, 200, 800]
LITERAL_JOINT_POSES = 200  # with 800, the copies of one image's memory would take tens of gigabytes


def build_model(preset: str, device: str) -> HPetrForPoseEstimation:
    """Return a model with random weights and nonzero heads, so that poses and the losses of the layers differ."""
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset(preset, dropout=0.0, deformable_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "keypoint_heads" in name or "joint_decoder.heads" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    return model.to(device).train()


def random_people(count: int, height: int, width: int, seed: int, device: str) -> dict[str, Tensor]:
    """Return labels of people about 150 pixels tall, two thirds of their keypoints labelled."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    center = (0.15 + 0.7 * torch.rand(count, 1, 2, generator=generator)) * size
    xy = center + 40 * torch.randn(count, 17, 2, generator=generator)
    xy = torch.minimum(xy.clamp(min=0), size - 1)
    visible = 2.0 * (torch.rand(count, 17, 1, generator=generator) > 0.3)
    visible[:, 0] = 2
    label = {
        "keypoints": torch.cat([xy * (visible > 0), visible], -1),
        "boxes": torch.cat([xy.amin(1), xy.amax(1)], -1),
        "areas": torch.full((count,), 8000.0),
        "class_labels": torch.zeros(count, dtype=torch.long),
    }
    return {name: value.to(device) for name, value in label.items()}


def peak_megabytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_step(args: argparse.Namespace) -> dict:
    """Return median seconds of the parts of a step, peak memory in MB; in the literal order also loss differences."""
    height, width = (int(side) for side in args.size.split("x"))
    model = build_model(args.preset, args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    pixels = torch.randn(args.batch, 3, height, width, device=args.device)
    labels = [random_people(PEOPLE[i % 8], height, width, i, args.device) for i in range(args.batch)]
    forward = literal_training.loss_terms if args.order == "literal" else hpetr_terms
    half = args.precision == "bfloat16"
    before = peak_megabytes(args.device)
    times: dict[str, list[float]] = {
        "forward and losses": [],
        "backward": [],
        "optimizer": [],
        "step": [],
        "step, CPU time": [],
    }
    apart: float | None = None
    if args.order == "literal" and not half:
        # On one kernel: another kernel rounds differently, so two proposals of nearly equal score may change
        # places, and whole queries with them.
        with torch.no_grad():
            literal, ours = (
                {name: term.item() for name, term in terms_of(model, pixels, labels).items()}
                for terms_of in (forward, hpetr_terms)
            )
        apart = max(abs(ours[name] - value) / max(abs(value), 1e-6) for name, value in literal.items())
    for step in range(args.repeats + 1):
        marks, processor = [now(args.device)], time.process_time()
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=half):
            terms = forward(model, pixels, labels)
        marks.append(now(args.device))
        torch.stack(list(terms.values())).sum().backward()
        marks.append(now(args.device))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now(args.device))
        if step == 0:
            continue  # the first step compiles kernels and allocates
        spans = [end - start for start, end in itertools.pairwise(marks)] + [marks[-1] - marks[0]]
        spans.append(time.process_time() - processor)  # of all threads; other processes disturb it less
        for name, span in zip(times, spans, strict=True):
            times[name].append(span)
    result = {name: statistics.median(values) for name, values in times.items()}
    return {**result, "peak MB": peak_megabytes(args.device), "of it before": before, "apart": apart}


def hpetr_terms(model: HPetrForPoseEstimation, pixels: Tensor, labels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return model(pixels, None, labels).loss_dict


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_joint_decoder(args: argparse.Namespace) -> dict:
    """Return the peak memory in MB of the joint decoder, forward and backward."""
    height, width = (int(side) for side in args.size.split("x"))
    model = build_model(args.preset, args.device)
    with torch.no_grad():
        memory, grid, _ = model.encode(torch.randn(1, 3, height, width, device=args.device), None)
    memory = memory.requires_grad_()
    poses = torch.rand(1, args.joint_poses, model.config.num_keypoints, 2, device=args.device)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_megabytes(args.device)
    start = now(args.device)
    if args.order == "literal":
        image = torch.zeros(args.joint_poses, dtype=torch.long, device=args.device)
        output = literal_training.joint_decoder(model, memory, grid, poses[0], image)
    else:
        output = model.joint_decoder(memory, grid, poses)[0]
    output.sum().backward()
    return {"seconds": now(args.device) - start, "peak MB": peak_megabytes(args.device), "of it before": before}


def profile_step(args: argparse.Namespace) -> None:
    """Print the time of hpetr's step by operator."""
    height, width = (int(side) for side in args.size.split("x"))
    model = build_model(args.preset, args.device)
    pixels = torch.randn(args.batch, 3, height, width, device=args.device)
    labels = [random_people(PEOPLE[i % 8], height, width, i, args.device) for i in range(args.batch)]
    model(pixels, None, labels).loss.backward()
    with torch.profiler.profile() as profile:
        model(pixels, None, labels).loss.backward()
    column = "self_cuda_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60))


def run(order: str, args: argparse.Namespace, **options: object) -> dict | None:
    """Measure one order in its own process, the literal one with grid_sample; None if out of memory."""
    settings = {name: value for name, value in vars(args).items() if name not in ("skip_literal", "profile")}
    settings |= {"order": order, **options}
    command = [sys.executable, __file__]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        command += [] if value is None or value is False else [flag] if value is True else [flag, str(value)]
    kernel = {"HPETR_KERNEL": "reference"} if order == "literal" else {}
    done = subprocess.run(command, env={**os.environ, **kernel}, capture_output=True, text=True, check=False)
    if done.returncode == -9 or "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare_steps(args: argparse.Namespace) -> None:
    ours = run("hpetr", args)
    literal = None if args.skip_literal else run("literal", args, gradient_checkpointing=False, compile=False)
    options = ", hpetr with gradient checkpointing" if args.gradient_checkpointing else ""
    options += ", hpetr compiled" if args.compile else ""
    place = "GPU" if args.device == "cuda" else f"{args.threads} threads"
    print(f"{args.preset}, batch {args.batch} of {args.size}, {place}, {args.precision}{options}")
    if ours is None:
        print("hpetr: out of memory")
        return
    if literal and literal["apart"] is not None:
        print(f"loss terms, on the literal order's kernel, differ by {literal['apart']:.1e} at most, relatively")
    print(f"{'':22}{'literal':>10}{'hpetr':>10}{'ratio':>8}")
    for name in ("forward and losses", "backward", "optimizer", "step", "step, CPU time", "peak MB", "of it before"):
        left, ratio = (f"{literal[name]:.2f}", f"{literal[name] / ours[name]:.1f}") if literal else ("-", "-")
        print(f"{name:22}{left:>10}{ours[name]:>10.2f}{ratio:>8}")
    sys.stdout.flush()


def compare_joint_decoders(args: argparse.Namespace) -> None:
    print(f"joint decoder, forward and backward, one {args.size} image: MB above the start, seconds")
    print(f"{'poses':>8}{'literal':>18}{'hpetr':>18}")
    for poses in JOINT_POSES:
        cells = []
        for order in ("literal", "hpetr"):
            skip = order == "literal" and (args.skip_literal or poses > LITERAL_JOINT_POSES)
            result = None if skip else run(order, args, joint_poses=poses, joint_decoder=False)
            cells.append(
                f"{result['peak MB'] - result['of it before']:>9.0f}{result['seconds']:>9.2f}"
                if result
                else f"{'-':>18}"
            )
        print(f"{poses:>8}" + "".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h-petr-r50")
    parser.add_argument("--size", help="height x width; 640x640, on a GPU 800x1333")
    parser.add_argument("--batch", type=int, help="images; 2, on a GPU 1, 2, 4, 8 and 16")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="float32; on a GPU both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="steps to take the median of, after one to warm up")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in hpetr's order")
    parser.add_argument("--compile", action="store_true", help="hpetr's order through torch.compile")
    parser.add_argument("--skip-literal", action="store_true")
    parser.add_argument(
        "--joint-decoder", action="store_true", help="only the joint decoder, for growing numbers of poses"
    )
    parser.add_argument("--profile", action="store_true", help="only hpetr's step, by operator")
    parser.add_argument("--order", choices=["literal", "hpetr"], help=argparse.SUPPRESS)
    parser.add_argument("--joint-poses", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = args.device == "cuda"
    args.size = args.size or ("800x1333" if gpu else "640x640")
    batches = [args.batch] if args.batch else [1, 2, 4, 8, 16] if gpu else [2]
    precisions = [args.precision] if args.precision else ["float32", "bfloat16"] if gpu else ["float32"]
    args.batch, args.precision = batches[0], precisions[0]
    task: Callable[[argparse.Namespace], dict] = measure_joint_decoder if args.joint_poses else measure_step
    if args.order:
        print(json.dumps(task(args)))
    elif args.profile:
        profile_step(args)
    elif args.joint_decoder:
        compare_joint_decoders(args)
    else:
        for args.precision in precisions:
            for args.batch in batches:
                compare_steps(args)


if __name__ == "__main__":
    main()
