"""The report of a training run: one HTML file that needs nothing besides itself, and no script."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from hpetr.checkpoints.folder import load_checkpoint
from hpetr.data.dataset import PoseDataset
from hpetr.data.sample import Sample
from hpetr.errors import InputError
from hpetr.evaluation.info import environment_info
from hpetr.images.files import write_bytes
from hpetr.images.read import encode_image
from hpetr.inference.torch_predictor import predict_batch
from hpetr.model.hpetr import HPetrForPoseEstimation
from hpetr.model.image_processor import HPetrImageProcessor
from hpetr.poses.result import PoseResult
from hpetr.training.data import open_data
from hpetr.training.recipe import Recipe, load_recipe, recipe_yaml
from hpetr.training.run import LOG, RECIPE

REPORT = "report.html"
# Of a training line of the log; every other number in it is a term of the loss.
NOT_A_TERM = {"step", "epoch", "loss", "grad_norm", "learning_rate", "step_seconds"}
CURVE_POINTS = 200  # more cannot be told apart at the width of a curve
SAMPLE_SIDE = 640  # pixels, the longer side of each half of a sample image
GAP = 8
# Middle tones: curves have no background of their own and must read on white as on black.
INK = "#7f868d"
COLORS = ("#3b82d6", "#e0662f", "#2e9f6b", "#c2479b", "#b58a14", "#7c6bdb", "#17a2b3", "#d64550", "#8a8f4a", "#9a7352")


@dataclass(frozen=True)
class RunLog:
    """The lines of a run's `log.jsonl`, in its order.

    Attributes:
        training: lines with a `loss`.
        evaluations: lines with an `AP`.
        summaries: lines that end a start of the run.
        unreadable: number of lines that are no JSON object with a step; a killed run can leave one.
    """

    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    unreadable: int

    @property
    def terms(self) -> list[str]:
        """Names of the loss terms, in the order of their first lines."""
        return list(dict.fromkeys(name for line in self.training for name in line if name not in NOT_A_TERM))


def read_log(path: Path) -> RunLog:
    """Read the log of a run, also of one that was killed while it wrote.

    Raises:
        InputError: there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}), expected the log of a training run") from None
    kinds: dict[str, list[dict[str, Any]]] = {"AP": [], "loss": [], "train_runtime": []}
    unreadable = 0
    for row in text.splitlines():
        try:
            line = json.loads(row)
            _ = line["step"]
        except (ValueError, TypeError, LookupError):
            unreadable += 1
            continue
        if kind := next((kind for kind in kinds if kind in line), None):
            kinds[kind].append(line)
    return RunLog(kinds["loss"], kinds["AP"], kinds["train_runtime"], unreadable)


def draw_samples(
    model: HPetrForPoseEstimation,
    processor: HPetrImageProcessor,
    dataset: PoseDataset,
    count: int = 8,
    threshold: float | None = None,
) -> list[tuple[str, np.ndarray]]:
    """Draw the first images of a data set, the labels on the left and the model's poses on the right.

    Args:
        model: its mode (train or eval) stays.
        count: maximum number of images.
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
            left, right = (_shrink(poses.draw(sample.image)) for poses in (labelled, found))
            gap = np.full((len(left), GAP, 3), 128, np.uint8)
            counts = f"{len(labelled)} labelled, {len(found)} found with a score above {limit:g}"
            samples.append((f"{sample.path.name}: {counts}", np.hstack([left, gap, right])))
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


def _shrink(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.BOX)
    return np.asarray(image)


def write_report(
    folder: Path,
    recipe: Recipe,
    train: Sequence[PoseDataset],
    val: PoseDataset | None,
    samples: Iterable[tuple[str, np.ndarray]],
) -> Path:
    """Write `report.html` from the folder's `log.jsonl`, whole or not at all.

    Args:
        folder: of the run.
        recipe: that the run followed.
        train: the data sets of `recipe.data.train`, in its order.
        val: the data set of `recipe.data.val`.
        samples: captions and images (H, W, 3) uint8 RGB, see `draw_samples`.

    Returns:
        The path of the report.

    Raises:
        InputError: the folder has no log, or the report cannot be written.
    """
    log = read_log(folder / LOG)
    images = [_figure("wide", text, encode_image(image, ".jpg"), "jpeg", caption=True) for text, image in samples]
    parts = [
        f"<h1>{escape(recipe.model.preset)}</h1>",
        f"<p class=note>Training report of {escape(str(folder))}</p>",
        _table(_run_rows(recipe, log, train, val)),
        "<h2>Average precision</h2>",
        _metrics_table(log, val is not None),
        "<h2>Curves</h2>",
        _curves(log),
        *(["<h2>Samples: labels left, predictions right</h2>"] if images else []),
        *images,
        f"<h2>Recipe</h2><pre>{escape(recipe_yaml(recipe))}</pre>",
        "<h2>Versions and machine that wrote this report</h2>",
        _table(environment_info().items()),
    ]
    template = Template(files("hpetr.training").joinpath(REPORT).read_text(encoding="utf-8"))
    page = template.substitute(title=escape(f"{recipe.model.preset}: training report"), body="\n".join(parts))
    write_bytes(folder / REPORT, page.encode())
    return folder / REPORT


def remake_report(folder: Path, count: int = 8) -> Path:
    """Write the report of a finished run again, from the recipe, log and checkpoint in its folder.

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
) -> Iterable[tuple[str, str]]:
    yield "starts from", recipe.model.backbone_weights or recipe.model.weights
    for source, dataset in zip(recipe.data.train, train, strict=True):
        repeats = f", each {source.repeat} times an epoch" if source.repeat > 1 else ""
        yield "training data", f"{dataset.path}: {dataset.report}{repeats}"
    yield "validation data", "none" if val is None else f"{val.path}: {val.report}"
    lines = [*log.training, *log.evaluations, *log.summaries]
    steps = f"none in {LOG}"
    if lines:
        step, epoch = (max(line.get(key, 0) for line in lines) for key in ("step", "epoch"))
        steps = f"{step:,} of {recipe.train.total_batch_size} images each, {epoch:.4g} epochs"
    yield "steps", steps
    if log.training:
        yield "loss", f"{log.training[0]['loss']:.4g} at first, {log.training[-1]['loss']:.4g} at last"
    yield "time per step", _time_per_step(log)
    if log.summaries:
        minutes, seconds = divmod(round(log.summaries[-1]["train_runtime"]), 60)
        hours, rest = divmod(minutes, 60)
        yield "time since the last start", f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"
    if log.unreadable:
        yield LOG, f"{log.unreadable} unreadable line{'s' * (log.unreadable > 1)} left out"


def _time_per_step(log: RunLog) -> str:
    seconds = [line["step_seconds"] for line in log.training if "step_seconds" in line]
    if seconds:
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
        return f"{median:.3g} s median, {low:.3g} to {high:.3g} s quartiles"
    if log.summaries and log.summaries[-1].get("train_steps_per_second"):
        return f"{1 / log.summaries[-1]['train_steps_per_second']:.3g} s on average, evaluations included"
    return "not logged"


def _metrics_table(log: RunLog, has_val: bool) -> str:
    if not log.evaluations:
        return f"<p>{'Not evaluated yet.' if has_val else 'Not evaluated: the recipe has no data.val.'}</p>"
    final, best = log.evaluations[-1], max(log.evaluations, key=lambda line: line["AP"])
    names = [name for name in final if name not in NOT_A_TERM]
    rows = [(n, *("-" if line.get(n, -1) < 0 else f"{line[n]:.4f}" for line in (final, best))) for n in names]
    return _table(rows, ("", f"final, step {final['step']:,}", f"best, step {best['step']:,}"), "metrics")


def _curves(log: RunLog) -> str:
    """Draw all curves that have points, each in its own figure."""
    last = max((line["step"] for line in [*log.training, *log.evaluations]), default=0)
    stages = list(dict.fromkeys(name.rpartition(".")[0] for name in log.terms))
    colors = {stage: COLORS[i % len(COLORS)] for i, stage in enumerate(stages)}
    kinds: dict[str, dict[str, Any]] = {}
    for name in log.terms:
        stage, _, kind = name.rpartition(".")
        kinds.setdefault(f"loss: {kind}", {})[stage] = _series(log.training, name)
    charts = {  # title: curves by their names, and whether the axis is logarithmic
        "loss, all terms": ({"": _series(log.training, "loss")}, True),
        **{title: (series, True) for title, series in kinds.items()},
        "average precision": ({name: _series(log.evaluations, name) for name in ("AP", "AP50")}, False),
        "learning rate": ({"": _series(log.training, "learning_rate")}, False),
        "gradient norm before clipping": ({"": _series(log.training, "grad_norm")}, True),
        "seconds per step": ({"": _series(log.training, "step_seconds")}, False),
    }
    shown = [
        _figure("curve", title, _chart(title, drawn, last, logarithmic, colors if title in kinds else {}), "png")
        for title, (series, logarithmic) in charts.items()
        if (drawn := {name: points for name, points in series.items() if points.size})
    ]
    if not shown:
        return "<p>Nothing was logged.</p>"
    block = _block_length(len(log.training))
    note = f"<p class=note>Each point is the mean of {block} lines of the log.</p>" if block > 1 else ""
    return f"{note}<div class=curves>{''.join(shown)}</div>"


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Return the steps and values (2, n) of the lines that have the name; long ones as means of blocks."""
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    starts = np.arange(0, len(points), _block_length(len(points)))
    return np.add.reduceat(values, starts, axis=1) / np.diff([*starts, len(points)]) if points else values


def _block_length(points: int) -> int:
    return max(1, math.ceil(points / CURVE_POINTS))


def _chart(
    title: str, series: Mapping[str, np.ndarray], last_step: int, logarithmic: bool, colors: Mapping[str, str]
) -> bytes:
    """Return a PNG of named curves (2, n) over the steps.

    The Figure is used by itself: pyplot would keep it and choose a window system for the whole process.
    """
    figure = Figure(figsize=(4.8, 3.1), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(series.items()):
        color, marker = colors.get(name, COLORS[i]), "o" if len(steps) < 20 else ""
        axes.plot(steps, values, color=color, marker=marker, markersize=3, linewidth=1.4, label=name)
    every = np.concatenate([values for _, values in series.values()])
    if logarithmic and every.min() > 0 and every.max() > 10 * every.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not logarithmic:
        axes.set_ylim(bottom=min(0.0, float(every.min())))
    axes.set_xlim(0, last_step * 1.03)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.tick_params(which="both", labelsize=9, colors=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    if any(series):
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _figure(css_class: str, text: str, image: bytes, kind: str, *, caption: bool = False) -> str:
    text, data = escape(text), base64.b64encode(image).decode()
    below = f"<figcaption>{text}</figcaption>" if caption else ""
    return f'<figure class={css_class}><img src="data:image/{kind};base64,{data}" alt="{text}">{below}</figure>'


def _table(rows: Iterable[tuple[str, ...]], heads: Sequence[str] = (), css_class: str = "facts") -> str:
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    lines = (
        f"<tr><th>{escape(first)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table class={css_class}>{head}{''.join(lines)}</table>"
