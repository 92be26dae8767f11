"""The images of docs/model.md: what the parts of the network do with one photograph.

    python docs/figures/make_model_figures.py [--checkpoint h-petr-nano] [--image examples/000000000785.jpg]
        [--output docs/figures]

One run of the network, as `hpetr predict` makes it, with hooks that keep what the parts pass on. Writes
model-proposals.jpg, model-pose-decoder.jpg, model-pose-attention.jpg and model-joint-decoder.jpg.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hpetr import PosePredictor, Skeleton
from hpetr.data import load_image
from hpetr.images.files import write_bytes
from hpetr.poses.draw import person_color

WIDTH = 9.0  # inches of a figure
BEST_PROPOSALS = 20
DARK, MOVED = "#141414", "#ff2fb3"


@dataclass
class Trace:
    """What one run passed on; coordinates are x, y in pixels of the image.

    N queries, K joints, M heads, L feature levels, T poses, best first.

    Attributes:
        image: (H, W, 3) uint8 RGB. skeleton: names and limbs.
        heat: class probability of every token, (H_l, W_l) for each level. stretch: (L, 2) how far the level's map
            reaches beyond the image's width and height (padding), 1 = not at all.
        proposals: (N, K, 2) the poses of the best tokens. centers: (N, 2) of those tokens.
        layers: (layers, N, K, 2) after each layer of the pose decoder. scores: (N,) of the last.
        points: (layers, N, M, L, K, 2) where pose attention looks. weights: (layers, N, M, L, K), sum 1 over L and K.
        before, after: (T, K, 2) poses in front of and behind the joint decoder. final_scores: (T,).
    """

    image: np.ndarray
    skeleton: Skeleton
    heat: list[np.ndarray]
    stretch: np.ndarray
    proposals: np.ndarray
    centers: np.ndarray
    layers: np.ndarray
    scores: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    before: np.ndarray
    after: np.ndarray
    final_scores: np.ndarray

    def query_of(self, rank: int) -> int:
        """The query of the pose of this rank."""
        return int(np.argsort(-self.scores, kind="stable")[rank])


@torch.inference_mode()
def trace(predictor: PosePredictor, path: Path) -> Trace:
    """Run the network on an image and keep what its parts pass on."""
    model, image = predictor.model, load_image(path)
    kept: dict[Any, tuple[Any, Any]] = {}
    parts = [model.pose_decoder, model.joint_decoder, *(layer.attention for layer in model.pose_decoder.layers)]
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: kept.update({module: (inputs, output)}))
        for part in parts
    ]
    output = model(**predictor.processor([image]).to(model.device))
    for hook in hooks:
        hook.remove()

    (predictions, _), proposals = kept[model.pose_decoder][1], kept[model.pose_decoder][0][2]
    (_, grid, before), (refined, _) = kept[model.joint_decoder]
    attentions = [(layer.attention, kept[layer.attention][0]) for layer in model.pose_decoder.layers]
    shares = grid.valid_ratios[0]  # (L, 2) of each padded map that is image
    size = torch.tensor([image.shape[1], image.shape[0]], device=shares.device)

    def pixels(normalized: Tensor) -> np.ndarray:
        return (normalized * size).float().cpu().numpy()

    points, weights = [], []
    for attention, (query, references, _, spatial_shapes) in attentions:
        layout = (attention.num_heads, attention.num_levels, attention.num_points)
        offsets = attention.sampling_offsets(query)[0].unflatten(-1, (*layout, 2))[None]  # (1, N, M, L, K, 2)
        locations = attention.sampling_locations(offsets, references, spatial_shapes)[0]  # (N, M, L, K, 2)
        points.append(pixels(locations / shares[:, None]))
        share = attention.attention_weights(query)[0].unflatten(-1, (layout[0], -1)).softmax(-1)
        weights.append(share.unflatten(-1, layout[1:]).float().cpu().numpy())
    first_references = attentions[0][1][1][0, :, 0] / shares[0]  # (N, K, 2), of the finest level
    probabilities = proposals.logits[0, :, 0].sigmoid()
    cells = [height * width for height, width in grid.spatial_shapes]
    best = proposals.logits[0, :, 0].topk(len(first_references)).indices
    return Trace(
        image=image,
        skeleton=Skeleton.from_dict(model.config.skeleton),
        heat=[
            level.view(shape).float().cpu().numpy()
            for level, shape in zip(probabilities.split(cells), grid.spatial_shapes, strict=True)
        ],
        stretch=(1 / shares).cpu().numpy(),
        proposals=pixels(first_references),
        centers=pixels(grid.centers[0, best]),
        layers=pixels(predictions.keypoints[:, 0]),
        scores=predictions.logits[-1, 0].amax(-1).sigmoid().float().cpu().numpy(),
        points=np.stack(points),
        weights=np.stack(weights),
        before=pixels(before[0]),
        after=pixels(refined[-1, 0]),
        final_scores=output.scores[0].float().cpu().numpy(),
    )


# --- drawing


def panels(count: int, columns: int, aspect: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels of this height / width, without axes."""
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(WIDTH, rows * (WIDTH / columns * aspect + 0.3)), layout="constrained", squeeze=False
    )
    flat = [axis for row in axes for axis in row]
    for axis in flat:
        axis.set_axis_off()
    return figure, flat[:count]


def show_image(axis: Axes, trace: Trace, title: str, view: tuple[float, float, float, float], dim: float = 0) -> None:
    """The image, paler by `dim` (0..1), cut to the view (left, top, right, bottom)."""
    pale = trace.image + (255 - trace.image.astype(np.float32)) * dim
    height, width = trace.image.shape[:2]
    axis.imshow(pale.astype(np.uint8), extent=(0, width, height, 0))
    axis.set_xlim(view[0], view[2])
    axis.set_ylim(view[3], view[1])
    axis.set_title(title, fontsize=9)


def whole(trace: Trace) -> tuple[float, float, float, float]:
    height, width = trace.image.shape[:2]
    return (0, 0, width, height)


def around(trace: Trace, poses: np.ndarray, margin: float = 0.25) -> tuple[float, float, float, float]:
    """The part of the image that holds these poses (..., 2), with a margin."""
    height, width = trace.image.shape[:2]
    points = poses.reshape(-1, 2).clip(0, [width, height])
    least, most = points.min(0), points.max(0)
    middle, reach = (least + most) / 2, max((most - least).max() * (0.5 + margin), 40)
    left, top = (middle - reach).clip(0, None)
    right, bottom = (middle + reach).clip(None, [width, height])
    return (left, top, right, bottom)


def colors(count: int) -> np.ndarray:
    """(count, 4) one bright color each."""
    return matplotlib.colormaps["turbo"](np.linspace(0.08, 0.95, count))


def draw_pose(axis: Axes, trace: Trace, pose: np.ndarray, color: Any, width: float = 1.8) -> None:
    """One pose (K, 2), with a dark rim that keeps every color readable."""
    for first, second in trace.skeleton.edges:
        line = pose[[first, second]].T
        axis.plot(*line, color=DARK, linewidth=width + 1.2, solid_capstyle="round", alpha=0.7)
        axis.plot(*line, color=color, linewidth=width, solid_capstyle="round")
    axis.scatter(*pose.T, c=[color], s=(2.2 * width) ** 2, edgecolors=DARK, linewidths=0.6, zorder=3)


def proposals_figure(trace: Trace) -> Figure:
    """How probable each token of each level is to be a person, and the best tokens' poses."""
    height, width = trace.image.shape[:2]
    figure, axes = panels(len(trace.heat) + 1, 2, height / width)
    most = max(float(level.max()) for level in trace.heat)
    for axis, level, stretch in zip(axes, trace.heat, trace.stretch, strict=False):
        rows, columns = level.shape
        show_image(axis, trace, f"{rows} x {columns} tokens, best {level.max():.2f}", whole(trace))
        right, bottom = width * stretch[0], height * stretch[1]
        axis.imshow(level, extent=(0, right, bottom, 0), cmap="inferno", vmin=0, vmax=most, alpha=0.65)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
    axis = axes[-1]
    shown = min(BEST_PROPOSALS, len(trace.proposals))
    show_image(axis, trace, f"the {shown} best tokens and their poses", whole(trace), dim=0.35)
    for pose, center, color in zip(trace.proposals[:shown], trace.centers, colors(shown), strict=False):
        draw_pose(axis, trace, pose, color, width=0.8)
        axis.plot(*center, marker="s", color=color, markeredgecolor="white", markersize=5, zorder=4)
    return figure


def pose_decoder_figure(trace: Trace, ranks: list[int]) -> Figure:
    """The proposals of the best queries, and what each layer makes of them."""
    queries = [trace.query_of(rank) for rank in ranks]
    stages = [trace.proposals, *trace.layers]
    view = around(trace, np.stack([stage[queries] for stage in stages]), margin=0.1)
    figure, axes = panels(len(stages), 3 if len(stages) % 2 else 2, (view[3] - view[1]) / (view[2] - view[0]))
    for number, (axis, stage) in enumerate(zip(axes, stages, strict=True)):
        show_image(axis, trace, f"after layer {number}" if number else "proposals", view, dim=0.2)
        for rank, query in zip(ranks, queries, strict=True):
            draw_pose(axis, trace, stage[query], np.divide(person_color(rank), 255))
    return figure


def pose_attention_figure(trace: Trace) -> Figure:
    """Where the best query looks in each layer: a ring at each joint it has so far, dots where it samples."""
    query, joints = trace.query_of(0), colors(trace.skeleton.num_keypoints)
    stages = [trace.proposals, *trace.layers][: len(trace.points)]
    view = around(trace, np.stack([stage[query] for stage in stages]))
    figure, axes = panels(len(stages), min(len(stages), 3), (view[3] - view[1]) / (view[2] - view[0]))
    for number, (axis, pose) in enumerate(zip(axes, (stage[query] for stage in stages), strict=True)):
        show_image(axis, trace, f"layer {number + 1}", view, dim=0.45)
        points, weights = trace.points[number, query], trace.weights[number, query]  # (M, L, K, 2), (M, L, K)
        heads_and_levels = weights[..., 0].size
        axis.scatter(
            *points.reshape(-1, 2).T, s=6 + 220 * weights.ravel(), c=np.tile(joints, (heads_and_levels, 1)),
            alpha=0.75, edgecolors="none",
        )  # fmt: skip
        for edge in trace.skeleton.edges:
            axis.plot(*pose[list(edge)].T, color=DARK, linewidth=0.7)
        axis.scatter(*pose.T, s=42, facecolors="none", edgecolors=DARK, linewidths=2.2)
        axis.scatter(*pose.T, s=42, facecolors="none", edgecolors=joints, linewidths=1.2)
    return figure


def joint_decoder_figure(trace: Trace, ranks: list[int]) -> Figure:
    """The best poses in front of the joint decoder and behind it, with the way that each joint went."""
    view = around(trace, np.stack([trace.before[ranks], trace.after[ranks]]), margin=0.1)
    figure, axes = panels(2, 2, (view[3] - view[1]) / (view[2] - view[0]))
    moved = np.linalg.norm(trace.after[ranks] - trace.before[ranks], axis=-1)
    titles = ("before", f"after: joints moved {moved.mean():.1f} pixels in the mean, {moved.max():.0f} at most")
    for axis, poses, title in zip(axes, (trace.before, trace.after), titles, strict=True):
        show_image(axis, trace, title, view, dim=0.2)
        for rank in ranks:
            draw_pose(axis, trace, poses[rank], np.divide(person_color(rank), 255))
    for way in np.stack([trace.before, trace.after], -1)[ranks].reshape(-1, 2, 2):  # x, y of start and end
        axes[1].plot(*way, color=MOVED, linewidth=1.6, zorder=4)
    return figure


def write_figures(trace: Trace, output: Path, threshold: float) -> list[Path]:
    """All figures, of the poses above the threshold, or of the best one where there is none."""
    ranks = list(range(max(1, int((trace.final_scores > threshold).sum()))))
    figures = {
        "model-proposals": proposals_figure(trace),
        "model-pose-decoder": pose_decoder_figure(trace, ranks),
        "model-pose-attention": pose_attention_figure(trace),
        "model-joint-decoder": joint_decoder_figure(trace, ranks),
    }
    paths = []
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(
            buffer,
            format="jpeg",
            dpi=130,
            bbox_inches="tight",
            pad_inches=0.03,
            pil_kwargs={"quality": 82, "optimize": True},
        )
        pyplot.close(figure)
        paths.append(output / f"{name}.jpg")
        write_bytes(paths[-1], buffer.getvalue())
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="h-petr-nano", help="checkpoint folder, or h-petr-nano")
    parser.add_argument("--image", type=Path, default=Path("examples/000000000785.jpg"))
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    parser.add_argument("--threshold", type=float, help="which poses are drawn; default: the checkpoint's")
    args = parser.parse_args()
    matplotlib.use("agg")
    predictor = PosePredictor(args.checkpoint)
    threshold = predictor.processor.threshold if args.threshold is None else args.threshold
    for path in write_figures(trace(predictor, args.image), args.output, threshold):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
