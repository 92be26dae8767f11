"""The report of a training run: one HTML file that needs nothing besides itself, and no script."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.errors import InputError
from hpetr.evaluation.info import environment_info
from hpetr.images.files import write_bytes
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.result import PoseResult
from hpetr.training.data import open_data
from hpetr.training.recipe import Recipe, load_recipe, recipe_yaml
from hpetr.training.run import LOG, RECIPE

if TYPE_CHECKING:
    from hpetr.data.dataset import PoseDataset
    from hpetr.data.sample import Sample

REPORT = "report.html"
# Of a training line of the log; every other number in it is a term of the loss.
NOT_A_TERM = {"step", "epoch", "loss", "grad_norm", "learning_rate", "step_seconds"}
NOT_A_FIGURE = {"step", "epoch"}  # of an evaluation's line
CURVE_POINTS = 200  # more than these cannot be told apart at the width of a curve
SAMPLE_SIDE = 640  # pixels, the longer side of each half of a sample image
GAP = 8
# Middle tones: curves have no background of their own and must read on white as on black.
INK = "#7f868d"
COLORS = ("#3b82d6", "#e0662f", "#2e9f6b", "#c2479b", "#b58a14", "#7c6bdb", "#17a2b3", "#d64550", "#8a8f4a", "#9a7352")


@dataclass(frozen=True)
class RunLog:
    """What `log.jsonl` of a run says, in its order.

    Attributes:
        training: lines with a `loss`. evaluations: lines with an `AP`. summaries: lines that end a start of the run.
        unreadable: lines that are no JSON object with a step; a killed run can leave one.
    """

    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    unreadable: int

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, in the order they first appear."""
        return list(dict.fromkeys(name for line in self.training for name in line if name not in NOT_A_TERM))

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the highest AP, the first of equals."""
        return max(self.evaluations, key=lambda line: line["AP"])


def read_log(path: Path) -> RunLog:
    """Read the log of a run, also of one that was killed while it wrote.

    Raises:
        InputError: there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected the log of a training run") from None
    log = RunLog([], [], [], 0)
    unreadable = 0
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "step" not in line:
            unreadable += 1
        elif "AP" in line:
            log.evaluations.append(line)
        elif "loss" in line:
            log.training.append(line)
        elif "train_runtime" in line:
            log.summaries.append(line)
    return RunLog(log.training, log.evaluations, log.summaries, unreadable)


def draw_samples(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    dataset: PoseDataset,
    count: int = 8,
    threshold: float | None = None,
) -> list[tuple[str, np.ndarray]]:
    """The first images of a data set, the labels on the left and the model's poses on the right.

    Args:
        model: left in the mode (train or eval) it came in.
        count: how many images, at most.
        threshold: only poses with a higher score are drawn; None takes the processor's.

    Returns:
        Pairs of a caption and an image (H, W, 3) uint8 RGB.

    Raises:
        InputError: an image cannot be read.
    """
    limit = processor.threshold if threshold is None else threshold
    was_training = model.training
    model.eval()
    samples = []
    try:
        for index in range(min(count, len(dataset))):
            sample = dataset[index]
            found = predict_batch(model, processor, [sample.image], limit)[0]
            labelled = _labels_as_result(sample, found)
            halves = [_shrink(poses.draw(sample.image)) for poses in (labelled, found)]
            gap = np.full((len(halves[0]), GAP, 3), 128, np.uint8)
            counts = f"{len(labelled)} labelled, {len(found)} found with a score above {limit:g}"
            samples.append((f"{sample.path.name}: {counts}", np.hstack([halves[0], gap, halves[1]])))
    finally:
        model.train(was_training)
    return samples


def _labels_as_result(sample: Sample, found: PoseResult) -> PoseResult:
    return PoseResult(
        keypoints=sample.keypoints[..., :2],
        keypoint_scores=(sample.keypoints[..., 2] > 0).astype(np.float32),
        scores=np.ones(len(sample.keypoints), np.float32),
        boxes=sample.boxes,
        labels=sample.class_labels,
        skeleton=found.skeleton,
        image_size=found.image_size,
    )


def _shrink(image: np.ndarray) -> np.ndarray:
    scale = SAMPLE_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def write_report(
    folder: Path,
    recipe: Recipe,
    train: Sequence[PoseDataset],
    val: PoseDataset | None,
    samples: Sequence[tuple[str, np.ndarray]],
) -> Path:
    """Write `report.html` from the folder's `log.jsonl`, whole or not at all.

    Args:
        folder: of the run.
        recipe: that the run followed.
        train: the data sets of `recipe.data.train`, in its order. val: that of `recipe.data.val`.
        samples: captions and images (H, W, 3) uint8 RGB, see `draw_samples`.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder has no log, or the report cannot be written.
    """
    log = read_log(folder / LOG)
    values = recipe_yaml(recipe)
    images = [_figure(caption, _jpeg_uri(image), "wide") for caption, image in samples]
    page = [
        f"<h1>{html.escape(recipe.model.preset)}</h1>",
        f"<p class=note>Training report of {html.escape(str(folder))}</p>",
        _table(_run_rows(recipe, log, train, val)),
        "<h2>Average precision</h2>",
        _metrics_table(log, val is not None),
        "<h2>Curves</h2>",
        _curves(log),
        "<h2>Samples: labels left, predictions right</h2>" + "".join(images) if images else "",
        f"<h2>Recipe</h2><pre>{html.escape(values)}</pre>",
        "<h2>Versions and machine that wrote this report</h2>",
        _table(environment_info().items()),
    ]
    body = "\n".join(part for part in page if part)
    title = html.escape(f"{recipe.model.preset}: training report")
    write_bytes(folder / REPORT, PAGE.format(title=title, body=body).encode())
    return folder / REPORT


def remake_report(folder: Path, count: int = 8) -> Path:
    """Write the report of a finished run anew, from what its folder holds: recipe, log and checkpoint.

    Raises:
        InputError: one of them is missing or broken, or the recipe's data are not where they were.
    """
    recipe = load_recipe(folder / RECIPE)
    model, processor = load_checkpoint(folder)
    train = [open_data(source) for source in recipe.data.train]
    val = None if recipe.data.val is None else open_data(recipe.data.val)
    return write_report(folder, recipe, train, val, draw_samples(model, processor, val or train[0], count))


def _run_rows(
    recipe: Recipe, log: RunLog, train: Sequence[PoseDataset], val: PoseDataset | None
) -> list[tuple[str, str]]:
    rows = [("starts from", recipe.model.backbone_weights or recipe.model.weights)]
    for source, dataset in zip(recipe.data.train, train, strict=True):
        repeats = f", each {source.repeat} times an epoch" if source.repeat > 1 else ""
        rows.append(("training data", f"{dataset.path}: {dataset.report}{repeats}"))
    rows.append(("validation data", "none" if val is None else f"{val.path}: {val.report}"))
    lines = sorted([*log.training, *log.evaluations, *log.summaries], key=lambda line: line["step"])
    if not lines:
        rows.append(("steps", f"none in {LOG}"))
    else:
        epoch = max((line["epoch"] for line in lines if "epoch" in line), default=0.0)
        total = recipe.train.total_batch_size
        rows.append(("steps", f"{lines[-1]['step']:,} of {total} images each, {epoch:.4g} epochs"))
    if log.training:
        rows.append(("loss", f"{log.training[0]['loss']:.4g} at first, {log.training[-1]['loss']:.4g} at last"))
    rows.append(("time per step", _time_per_step(log)))
    if log.summaries:
        rows.append(("time since the last start", _duration(log.summaries[-1]["train_runtime"])))
    if log.unreadable:
        rows.append((LOG, f"{log.unreadable} unreadable line{'s' * (log.unreadable > 1)} left out"))
    return rows


def _time_per_step(log: RunLog) -> str:
    seconds = [line["step_seconds"] for line in log.training if "step_seconds" in line]
    if seconds:
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return f"{median:.3g} s median, {low:.3g} to {high:.3g} s quartiles"
    if log.summaries and log.summaries[-1].get("train_steps_per_second"):
        return f"{1 / log.summaries[-1]['train_steps_per_second']:.3g} s on average, evaluations included"
    return "not logged"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _metrics_table(log: RunLog, has_val: bool) -> str:
    if not log.evaluations:
        return f"<p>{'Not evaluated yet.' if has_val else 'Not evaluated: the recipe has no data.val.'}</p>"
    final, best = log.evaluations[-1], log.best
    names = [name for name in final if name not in NOT_A_FIGURE]
    rows = [(n, *("-" if line.get(n, -1) < 0 else f"{line[n]:.4f}" for line in (final, best))) for n in names]
    heads = ("", f"final, step {final['step']:,}", f"best, step {best['step']:,}")
    return _table(rows, heads, "figures")


def _curves(log: RunLog) -> str:
    """All curves as figures; those without a single point are left out."""
    last = max((line["step"] for line in [*log.training, *log.evaluations]), default=0)
    stages = list(dict.fromkeys(name.rpartition(".")[0] for name in log.terms))
    colors = {stage: COLORS[i % len(COLORS)] for i, stage in enumerate(stages)}

    def single(title: str, name: str, *, log_axis: bool = False) -> str:
        series = {"": _series(log.training, name)}
        return _chart(title, series, last, log_axis=log_axis, from_zero=not log_axis)

    charts = [single("loss, all terms", "loss", log_axis=True)]
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in log.terms):
        names = [name for name in log.terms if name.rpartition(".")[2] == kind]
        series = {name.rpartition(".")[0]: _series(log.training, name) for name in names}
        charts.append(_chart(f"loss: {kind}", series, last, log_axis=True, colors=colors))
    precision = {name: _series(log.evaluations, name) for name in ("AP", "AP50")}
    charts += [
        _chart("average precision", precision, last, from_zero=True),
        single("learning rate", "learning_rate"),
        single("gradient norm before clipping", "grad_norm", log_axis=True),
        single("seconds per step", "step_seconds"),
    ]
    shown = [chart for chart in charts if chart]
    if not shown:
        return "<p>Nothing was logged.</p>"
    block = _block_length(len(log.training))
    note = f"<p class=note>Each point is the mean of {block} lines of the log.</p>" if block > 1 else ""
    return f"{note}<div class=curves>{''.join(shown)}</div>"


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n,) and values (n,) of the lines that have the name; long ones as means of blocks."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    block = _block_length(len(points))
    if block == 1:
        return steps, values
    starts = np.arange(0, len(points), block)
    lengths = np.diff([*starts, len(points)])
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths


def _block_length(points: int) -> int:
    return max(1, math.ceil(points / CURVE_POINTS))


def _chart(
    title: str,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    last_step: int,
    *,
    log_axis: bool = False,
    from_zero: bool = False,
    colors: Mapping[str, str] | None = None,
) -> str:
    """One figure of named curves over the steps; empty where there is no point.

    The Figure is used by itself: pyplot would keep it and choose a window system for the whole process.
    """
    drawn = {name: xy for name, xy in series.items() if len(xy[0])}
    if not drawn:
        return ""
    figure = Figure(figsize=(4.8, 3.1), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(drawn.items()):
        color = colors[name] if colors else COLORS[i]
        marker = "o" if len(steps) < 20 else ""
        axes.plot(steps, values, color=color, marker=marker, markersize=3, linewidth=1.4, label=name)
    every = np.concatenate([values for _, values in drawn.values()])
    if log_axis and every.min() > 0 and every.max() > 10 * every.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif from_zero:
        axes.set_ylim(bottom=min(0.0, float(every.min())))
    axes.set_xlim(0, last_step * 1.03)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.tick_params(which="both", labelsize=9, colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    if any(drawn):
        legend = {"loc": "outside lower center", "ncols": 4, "fontsize": 8, "frameon": False, "labelcolor": INK}
        figure.legend(**legend)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return _figure(title, _data_uri("png", buffer.getvalue()), "curve", show_caption=False)


def _jpeg_uri(image: np.ndarray) -> str:
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return _data_uri("jpeg", encoded.tobytes())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _figure(caption: str, uri: str, css_class: str, *, show_caption: bool = True) -> str:
    text = html.escape(caption, quote=True)
    below = f"<figcaption>{text}</figcaption>" if show_caption else ""
    return f'<figure class={css_class}><img src="{uri}" alt="{text}">{below}</figure>'


def _table(rows: Any, heads: Sequence[str] = (), css_class: str = "facts") -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    lines = [
        f"<tr><th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    return f"<table class={css_class}>{head}{''.join(lines)}</table>"


# The policy is a promise that the browser keeps: the page loads nothing and runs nothing.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --ink: #1d2228; --paper: #ffffff; --line: #d9dee3; --soft: #f4f6f8; --note: #5b646d; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ec; --paper: #15181c; --line: #343a41; --soft: #1e2329; --note: #a0a8b0; }}
}}
body {{ margin: 0 auto; max-width: 1080px; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ margin: .2rem 0; }}
h2 {{ margin: 2rem 0 .6rem; font-size: 1.15rem; }}
.note, figcaption {{ color: var(--note); font-size: .88rem; margin: .2rem 0 .8rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; white-space: nowrap; }}
.figures td, .figures th + th {{ text-align: right; font-variant-numeric: tabular-nums; white-space: normal; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: .8rem; }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; }}
@media (max-width: 560px) {{
  .facts th, .facts td {{ display: block; white-space: normal; }}
  .facts th {{ border: 0; padding-bottom: 0; }}
}}
.wide img {{ width: auto; max-width: 100%; }}
pre {{ background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
