"""The command `hpetr eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from hpetr import __version__
from hpetr.cli.options import BatchSize, Device, Images, Precision
from hpetr.cli.output import BAD_INPUT, count, print_table, progress, say, say_beside, warn
from hpetr.errors import InputError

if TYPE_CHECKING:
    from hpetr.data.dataset import PoseDataset
    from hpetr.evaluation.evaluate import EvalResult
    from hpetr.evaluation.zoo import ZooResult


class EvalCommand(TyperCommand):
    """Shows the arguments in their order: typer has no optional one before a required one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[CHECKPOINT] DATA"]


def eval_command(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[CHECKPOINT] DATA",
            help="Checkpoint folder, or h-petr-nano for the one in the package (none with --zoo); and the data: a COCO "
            "or CrowdPose JSON, a YOLO data.yaml, or a folder with annotations.json and images/.",
        ),
    ],
    annotations: Annotated[Path | None, typer.Option(help="COCO keypoint JSON, when it is elsewhere.")] = None,
    images: Images = None,
    split: Annotated[str | None, typer.Option(help="Which images of a YOLO data.yaml. Default: val.")] = None,
    flip_test: Annotated[
        bool, typer.Option("--flip-test", help="Merge the poses of each image and of its mirror image.")
    ] = False,
    zoo: Annotated[
        Path | None,
        typer.Option(help="Folder of official .pth files: evaluate each, and compare with the published metrics."),
    ] = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="JSON for the poses; the metrics go beside it as .metrics.json. With --zoo: JSON for the metrics. "
            "Default: outputs/eval.json, outputs/zoo.json.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images of the data.")] = None,
    device: Device = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the metrics into the checkpoint's model card.")] = False,
    precision: Precision = "float32",
) -> None:
    """Evaluate a checkpoint: the metrics of COCO's keypoint protocol, or of CrowdPose's.

    Under torchrun all processes share the work.
    """
    from hpetr.checkpoints.card import check_card
    from hpetr.data.dataset import open_dataset
    from hpetr.data.readers import reader_of, source_file
    from hpetr.evaluation.evaluate import metrics_file
    from hpetr.images.files import RESULT_SUFFIXES, check_output
    from hpetr.inference import processes
    from hpetr.inference.files import model_files

    data, target = Path(places[-1]), output or Path("outputs") / ("zoo.json" if zoo else "eval.json")
    folder = images or (data / "images" if annotations and data.is_dir() else None)
    processes.join()
    say_beside(target)

    def prepare() -> tuple[PoseDataset, str]:
        if len(places) != (1 if zoo else 2):
            expected = "DATA alone, as --zoo names the checkpoints" if zoo else "CHECKPOINT DATA"
            raise InputError(f"eval: {len(places)} arguments, expected {expected}")
        if card:
            check_card(None if zoo else places[0])
        source = source_file(annotations or data)
        chosen = split or ("val" if reader_of(source).splits else None)
        dataset = open_dataset(source, folder, split=chosen, limit=limit)
        if processes.rank() == 0:
            for path in [target] if zoo else [target, metrics_file(target)]:
                check_output(path, [source, *dataset.image_paths, *model_files(places[0])], RESULT_SUFFIXES)
        return dataset, processes.claim_device(device)

    with one_error_line():
        dataset, own_device = processes.together(prepare)
        if zoo:
            _evaluate_zoo(zoo, dataset, target, own_device, batch_size, flip_test)
        else:
            _evaluate_one(places[0], dataset, target, own_device, batch_size, flip_test, card, precision)


def _evaluate_one(
    checkpoint: str,
    dataset: PoseDataset,
    output: Path,
    device: str,
    batch_size: int | None,
    flip_test: bool,
    card: bool,
    precision: str,
) -> None:
    from hpetr.checkpoints.folder import load_checkpoint
    from hpetr.evaluation.evaluate import evaluate, write_evaluation
    from hpetr.inference import processes
    from hpetr.inference.open import find_model
    from hpetr.inference.precision import check_precision, keep_freed_memory
    from hpetr.inference.torch_predictor import default_batch_size

    keep_freed_memory()
    check_precision(precision)
    model, processor = processes.together(lambda: load_checkpoint(find_model(checkpoint).path, device))
    size = batch_size or default_batch_size(model)
    with progress("Evaluating", len(dataset)) as advance:
        result = evaluate(model, processor, dataset, size, advance, flip_test=flip_test, precision=precision)
    about = {"checkpoint": checkpoint, "annotations": str(dataset.path), "hpetr": __version__}
    is_first = processes.rank() == 0
    written = processes.together(lambda: result.write(output, about) if is_first else None)
    if is_first:
        _print_metrics(result, str(dataset.path))
        say(f"poses: {output}\nmetrics: {written}")
        for note in result.notes:
            warn(note)
        if card:
            say(f"card: {write_evaluation(Path(checkpoint), model, dataset.path, result)}")


def _evaluate_zoo(
    folder: Path, dataset: PoseDataset, output: Path, device: str, batch_size: int | None, flip_test: bool
) -> None:
    from hpetr.evaluation.zoo import evaluate_zoo, find_checkpoints
    from hpetr.inference import processes

    paths = processes.together(lambda: find_checkpoints(folder))
    with progress("Evaluating", len(paths) * len(dataset)) as advance:
        result = evaluate_zoo(paths, dataset, device, batch_size, advance, flip_test=flip_test)
    about = {"zoo": str(folder), "annotations": str(dataset.path), "hpetr": __version__}
    is_first = processes.rank() == 0
    processes.together(lambda: result.write(output, about) if is_first else None)
    if is_first:
        _print_zoo(result, str(dataset.path))
        say(f"metrics: {output}")
        for _, reason in result.left_out:
            warn(reason)
        if result.left_out:
            names = ", ".join(path.name for path, _ in result.left_out)
            typer.echo(f"{len(result.left_out)} of {len(paths)} checkpoints left out: {names}", err=True)


@contextmanager
def one_error_line() -> Iterator[None]:
    """Print an error that several processes share on the first one alone, and end all of them with `BAD_INPUT`."""
    from hpetr.inference import processes

    try:
        yield
    except InputError as error:
        if processes.count() == 1 or error.alone:
            raise
        if processes.rank() == 0:
            typer.echo(f"error: {error}", err=True)
        # torchrun ends all processes as soon as one has ended: none may go before the line is printed.
        processes.gather(None)
        raise typer.Exit(BAD_INPUT) from None


def _print_metrics(result: EvalResult, source: str) -> None:
    rows = [(name, "-" if value < 0 else f"{value:.4f}") for name, value in result.metrics.items()]
    images = count(result.images, "image", "images")
    print_table(f"{source}: {images}, {result.seconds:.1f} s", rows)


def _print_zoo(result: ZooResult, source: str) -> None:
    from hpetr.evaluation.zoo import PUBLISHED

    rows = []
    for score in result.scores:
        ap, other = score.result.metrics["AP"], PUBLISHED[score.preset].petr_zoo
        published = "-" if score.published is None else f"{score.published:.3f}"
        if score.published is not None and other is not None:
            published += f" ({other:.3f})"
        difference = "-" if score.difference is None else f"{score.difference:+.4f}"
        rows.append((score.path.name, score.preset, "-" if ap < 0 else f"{ap:.4f}", published, difference))
    images = count(result.scores[0].result.images, "image", "images")
    title = f"{source}: {images}. Published: of all COCO val2017 or CrowdPose test (PETR's own zoo)"
    print_table(title, rows, header=("checkpoint", "model", "AP", "published", "difference"))
