"""Growth of time and memory with image, batch, people, poses, queries and threads.

    python benchmarks/scaling.py [--preset h-petr-nano] [--large-preset h-petr-r50] [--threads 2] [--repeats 5]
        [--sweeps image people ...] [--quick] [--output outputs/scaling] [--page docs/scaling.md]

A sweep runs in one process. Every round runs each of its points once, in random order, so that other load on the
machine affects all points. The exponent is fitted to the least times: a line through the logarithms, over the upper
half of the range, at least three points. The table also has the medians. Memory is the peak of a fresh process above
its memory once the model is loaded, on Linux only. A figure of each sweep of more than two points goes to `--output`;
with `--page`, the tables replace those between the page's markers. Weights and people are random: time does not depend
on them.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from hpetr import HPetrConfig, HPetrForPoseEstimation
from hpetr.evaluation.benchmark import OTHER, count_flops, profile_stages
from hpetr.model.stages import ASSIGNMENT, COSTS, HEATMAP, NETWORK_STAGES, stage
from hpetr.training.report import COLORS, INK
from training_step import random_people

LOSSES, BACKWARD, OPTIMIZER = "losses", "backward", "optimizer"
TRAINING_STAGES = (*NETWORK_STAGES, COSTS, HEATMAP, ASSIGNMENT, LOSSES, BACKWARD, OPTIMIZER)
MARKERS = "osD^vP*X<>x"
SHOWN_SHARE = 0.01  # of the time at the largest point: a figure leaves out stages that never reach it
RESET = Path("/proc/self/clear_refs")  # Linux: lets a process forget its peak


@dataclass(frozen=True)
class Point:
    """One setting of a sweep; `x` is the quantity that grows. `options` override the preset's configuration."""

    x: float
    label: str
    preset: str
    threads: int
    height: int = 288
    width: int = 384
    batch: int = 1
    people: int = 5
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Sweep:
    """Points of growing `x`, of inference or of a training step."""

    name: str
    title: str
    axis: str
    training: bool
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Result:
    """For every point: least and median seconds, least seconds of every stage, and bytes (None: unknown).

    `flops` are counted operations of every stage of inference; empty for training.
    """

    least: list[float]
    median: list[float]
    stages: dict[str, list[float]]
    flops: dict[str, list[float]]
    memory: list[float] | None


# ---------------------------------------------------------------------------------------------------------- the sweeps


def make_sweeps(args: argparse.Namespace) -> list[Sweep]:
    """Return the chosen sweeps; quick ones have three points, and images of 96 x 128 where the image does not grow."""
    nano = functools.partial(Point, preset=args.preset, threads=args.threads)
    large = functools.partial(Point, preset=args.large_preset, threads=args.threads)
    if args.quick:
        nano = functools.partial(nano, height=96, width=128)
    small, big = args.preset, args.large_preset
    sweeps = [
        Sweep("image", f"{small}: image", "pixels", False, sizes(nano, 192, 288, 384, 480, 576, 768, 960)),
        Sweep("image-large", f"{big}: image", "pixels", False, sizes(large, 288, 384, 576, 768)),
        Sweep("batch", f"{small}: batch", "images", False, counts(nano, "batch", 1, 2, 4, 8)),
        Sweep("poses", f"{small}: poses through the joint decoder", "poses", False, pose_counts(nano)),
        Sweep("queries", f"{small}: queries", "queries", False, query_counts(nano)),
        Sweep("step-image", f"{small}: image, training", "pixels", True, sizes(nano, 192, 288, 384, 480)),
        Sweep("step-batch", f"{small}: batch, training", "images", True, counts(nano, "batch", 1, 2, 4)),
        Sweep("people", f"{small}: people, training", "people", True, counts(nano, "people", 1, 3, 10, 30, 60, 100)),
        Sweep("step-queries", f"{small}: queries, training", "queries", True, training_queries(nano)),
        Sweep("threads", f"{small}: threads", "threads", False, thread_counts(nano)),
        Sweep("step-threads", f"{small}: threads, training", "threads", True, thread_counts(nano)),
    ]
    if args.quick:
        sweeps = [Sweep(s.name, s.title, s.axis, s.training, s.points[:3]) for s in sweeps]
    names = [sweep.name for sweep in sweeps]
    if unknown := sorted(set(args.sweeps or []) - set(names)):
        sys.exit(f"--sweeps: unknown {unknown[0]!r}, expected some of {', '.join(names)}")
    return [sweep for sweep in sweeps if not args.sweeps or sweep.name in args.sweeps]


def sizes(point: Callable[..., Point], *heights: int) -> tuple[Point, ...]:
    """Return points of images of aspect 3 : 4."""
    shapes = [(height, height * 4 // 3) for height in heights]
    return tuple(point(x=h * w, label=f"{h} x {w}", height=h, width=w) for h, w in shapes)


def counts(point: Callable[..., Point], field: str, *values: int) -> tuple[Point, ...]:
    """Return points with these values of one field."""
    return tuple(point(x=value, label=str(value), **{field: value}) for value in values)


def pose_counts(point: Callable[..., Point]) -> tuple[Point, ...]:
    options = [(("num_queries", 800), ("num_poses", n)) for n in (25, 50, 100, 200, 400, 800)]
    return tuple(point(x=o[1][1], label=str(o[1][1]), options=o) for o in options)


def query_counts(point: Callable[..., Point]) -> tuple[Point, ...]:
    return tuple(point(x=n, label=str(n), options=(("num_queries", n),)) for n in (50, 100, 200, 400, 800, 1600))


def training_queries(point: Callable[..., Point]) -> tuple[Point, ...]:
    """Return points with 3 one-to-many queries per one-to-one query, as in the presets; at most one per token."""
    values = (32, 64, 128, 256, 512)
    options = [(("num_queries", n), ("num_one_to_many_queries", 3 * n)) for n in values]
    return tuple(point(x=4 * n, label=str(4 * n), options=o) for n, o in zip(values, options, strict=True))


def thread_counts(point: Callable[..., Point]) -> tuple[Point, ...]:
    """Return powers of two up to the number of cores."""
    values = [2**i for i in range((os.cpu_count() or 1).bit_length())]
    return tuple(point(x=n, label=str(n), threads=n, height=384, width=512, batch=2) for n in values)


# ---------------------------------------------------------------------------------------------------- what is measured


@functools.cache
def build(preset: str, options: tuple[tuple[str, int], ...], *, training: bool) -> tuple[Any, torch.optim.Optimizer]:
    """Return a model with random weights, whose heads are not zero, so that keypoints differ as after training."""
    torch.manual_seed(0)
    model = HPetrForPoseEstimation(HPetrConfig.preset(preset, **dict(options)))
    for name, parameter in model.named_parameters():
        if "keypoint_heads" in name or "joint_decoder.heads" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    if training:  # AdamW's two values per weight
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 1e-9)
        optimizer.step()
        optimizer.zero_grad()
    return model.train(training), optimizer


def prepare(point: Point, *, training: bool) -> Callable[[], None]:
    """Return one inference or training step."""
    torch.set_num_threads(point.threads)
    model, optimizer = build(point.preset, point.options, training=training)
    pixels = torch.randn(point.batch, 3, point.height, point.width)
    labels = [random_people(point.people, point.height, point.width, i, "cpu") for i in range(point.batch)]

    def infer() -> None:
        with torch.inference_mode():
            model(pixels)

    def train() -> None:
        loss = model(pixels, None, labels).loss
        with stage(BACKWARD):
            loss.backward()
        with stage(OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    return train if training else infer


def run(point: Point, *, training: bool) -> dict[str, float]:
    """Seconds of every stage of one inference or training step."""
    seconds = profile_stages(prepare(point, training=training), torch.device("cpu"))
    if training:  # outside of all stages the loss terms remain
        seconds[LOSSES] = seconds.pop(OTHER)
    return seconds


def time_sweep(sweep: Sweep, repeats: int) -> list[list[dict[str, float]]]:
    """Return the stage times of every point and round, after one run of the first point to warm up."""
    rng = np.random.default_rng(0)
    times: list[list[dict[str, float]]] = [[] for _ in sweep.points]
    run(sweep.points[0], training=sweep.training)
    for _ in range(repeats):
        for i in rng.permutation(len(sweep.points)):
            times[i].append(run(sweep.points[i], training=sweep.training))
    return times


def peak_memory(point: Point, training: bool) -> float:
    """Return the bytes that a run needs above the loaded model and its optimizer."""
    torch.set_num_threads(point.threads)
    build(point.preset, point.options, training=training)
    step = prepare(point, training=training)
    RESET.write_text("5")
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """Return the bytes of this process alone; `getrusage` would give a parent's peak where that is larger."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def measure(sweep: Sweep, repeats: int, fresh: ProcessPoolExecutor) -> Result:
    """Measure a sweep; `fresh` runs every task in its own process."""
    times = fresh.submit(time_sweep, sweep, repeats).result()
    whole = [[sum(stages.values()) for stages in rounds] for rounds in times]
    peaks = [fresh.submit(peak_memory, p, sweep.training).result() for p in sweep.points] if RESET.exists() else None
    names = [name for name in dict.fromkeys((*TRAINING_STAGES, OTHER)) if any(name in t for t in times[0])]
    stages = {name: [min(t.get(name, 0.0) for t in rounds) for rounds in times] for name in names}
    flops: dict[str, list[float]] = {}
    for point in () if sweep.training else sweep.points:
        config = HPetrConfig.preset(point.preset, **dict(point.options))
        for name, parts in count_flops(config, point.batch, point.height, point.width).items():
            flops.setdefault(name, []).append(float(parts.sum()))
    return Result(
        least=[min(values) for values in whole],
        median=[statistics.median(values) for values in whole],
        stages=stages,
        flops={**flops, "whole": [sum(values) for values in zip(*flops.values(), strict=True)]},
        memory=peaks,
    )


# ---------------------------------------------------------------------------------------------------- what is shown


def upper_half(x: Sequence[float]) -> slice:
    """Return the points above the middle of the range on a logarithmic axis, and at least the last three."""
    middle = math.sqrt(x[0] * x[-1])
    first = next(i for i, value in enumerate(x) if value >= middle)
    return slice(max(0, min(first, len(x) - 3)), None)


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Return exponent and factor of y = factor * x^exponent over the upper half; None where y is not positive."""
    half = upper_half(x)
    if min(y[half]) <= 0:
        return None
    exponent, factor = np.polyfit(np.log(x[half]), np.log(y[half]), 1)
    return float(exponent), math.exp(factor)


def exponent_text(x: Sequence[float], y: Sequence[float] | None) -> str:
    fitted = fit(x, y) if y else None
    return "-" if fitted is None else f"{fitted[0] + 0.0:.2f}"


def axis_label(sweep: Sweep) -> str:
    return "height x width (exponents over pixels)" if sweep.axis == "pixels" else sweep.axis


def table(sweep: Sweep, result: Result) -> str:
    """Return a Markdown table: milliseconds of every point, MB, and exponents."""
    x = [point.x for point in sweep.points]
    counted = ["operations' exponent"] if not sweep.training and sweep.axis != "threads" else []
    rows = [[axis_label(sweep), *(point.label for point in sweep.points), "exponent", *counted]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])

    def add(name: str, values: Sequence[float], scale: float, flops: Sequence[float] | None = None) -> None:
        cells = [f"{value * scale:.3g}" if value * scale < 100 else f"{value * scale:,.0f}" for value in values]
        rows.append([name, *cells, exponent_text(x, values), *([exponent_text(x, flops)] if counted else [])])

    add("whole, median ms", result.median, 1e3)
    add("whole, least ms", result.least, 1e3, result.flops["whole"] if counted else None)
    for name, values in result.stages.items():
        add(name, values, 1e3, result.flops.get(name) if name != OTHER else None)
    if result.memory:
        add("memory, MB", result.memory, 1e-6)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(sweep: Sweep, result: Result) -> Figure:
    """Draw time and memory over x on logarithmic axes, in colors that are readable on white and on black.

    The Figure is used directly, because pyplot would choose a window system.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    widths = [3, 2] if result.memory else [1]
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    x = [point.x for point in sweep.points]
    time = panels[0]
    curve(time, x, [1e3 * value for value in result.least], "whole", INK, "o", 2.2)
    time.vlines(x, [1e3 * v for v in result.least], [1e3 * v for v in result.median], color=INK, linewidth=1.2)
    order = TRAINING_STAGES if sweep.training else (*NETWORK_STAGES, OTHER)
    for name, values in result.stages.items():
        if values[-1] >= SHOWN_SHARE * result.least[-1]:
            i = order.index(name)
            curve(time, x, [1e3 * v for v in values], name, COLORS[i % len(COLORS)], MARKERS[i], 1.2)
    finish(time, sweep, f"{sweep.title}: ms, and exponents")
    if result.memory:
        curve(panels[1], x, [value / 1e6 for value in result.memory], "peak", COLORS[0], "o", 2.2)
        finish(panels[1], sweep, "memory: MB, and exponent")
    return figure


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, color: str, marker: str, width: float) -> None:
    """Draw a curve, its exponent in the legend and, for a thick one, the fitted line."""
    label = f"{name}: {exponent_text(x, y)}"
    axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=width, label=label)
    fitted = fit(x, y)
    if fitted and width > 2:
        exponent, factor = fitted
        axes.plot(x, [factor * v**exponent for v in x], color=color, linewidth=1, linestyle=(0, (4, 3)))


def finish(axes: Axes, sweep: Sweep, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([point.x for point in sweep.points], [point.label for point in sweep.points], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high < 4 * low:  # a nearly constant curve must not look steep
        axes.set_ylim(low / 2, high * 2)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(axis_label(sweep), fontsize=9, color=INK)
    axes.tick_params(which="both", labelsize=8, colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    legend = {"fontsize": 8, "frameon": False, "labelcolor": INK}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.24), ncols=3, columnspacing=1.2, **legend)


def fill_page(page: Path, name: str, text: str) -> None:
    """Replace the table between a sweep's markers."""
    before = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- scaling: {name} -->\n).*?(<!-- end -->)"
    after, found = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", before, count=1, flags=re.DOTALL)
    if not found:
        sys.exit(f"{page}: no marker '<!-- scaling: {name} -->' with its '<!-- end -->'")
    page.write_text(after, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h-petr-nano")
    parser.add_argument("--large-preset", default="h-petr-r50", help="of the sweep image-large")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a sweep")
    parser.add_argument("--sweeps", nargs="+", help="only these: image, people, ... as the figures are named")
    parser.add_argument("--quick", action="store_true", help="three small points a sweep, to see that all runs")
    parser.add_argument("--output", type=Path, default=Path("outputs/scaling"), help="folder of the figures")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables to replace")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # its processes begin with these imported, and no thread started
        context.set_forkserver_preload(
            ["hpetr.evaluation.benchmark", "hpetr.training.report", "transformers.models.resnet"]
        )
    # Identical figures from identical numbers; text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "hpetr", "svg.fonttype": "none"})
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as fresh:
        for sweep in make_sweeps(args):
            start = perf_counter()
            result = measure(sweep, args.repeats, fresh)
            text = table(sweep, result)
            print(f"\n{sweep.title} ({perf_counter() - start:.0f} s)\n\n{text}", flush=True)
            if len(sweep.points) > 2:
                path = args.output / f"scaling-{sweep.name}.svg"
                draw(sweep, result).savefig(path, transparent=True, metadata={"Date": None})
            if args.page:
                fill_page(args.page, sweep.name, text)


if __name__ == "__main__":
    main()
