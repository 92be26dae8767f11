"""The command `hpetr predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpetr.cli.options import BatchSize, Checkpoint, Device, Precision
from hpetr.cli.output import count, progress, warn
from hpetr.errors import InputError

if TYPE_CHECKING:
    from hpetr.poses.predictor import Predictor


def predict_command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders of them, quoted glob patterns; a camera's number; a stream's URL. "
            "An exported model (.onnx, .xml) among them is used."
        ),
    ],
    checkpoint: Checkpoint = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawings and the results.")] = Path("outputs"),
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Report poses with a higher score. Default: the checkpoint's.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="File for the results. Default: OUTPUT/predictions.json, of videos OUTPUT/predictions.jsonl."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="Images: coco, coco-labels, yolo, labelme, csv; may be given several times. Default: coco."
        ),
    ] = None,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Write images with the poses drawn.")] = True,
    track: Annotated[bool, typer.Option("--track", help="Videos: give every person a number that stays.")] = False,
    smooth: Annotated[
        bool, typer.Option("--smooth", help="Videos: take the jitter from the keypoints; tracks, too.")
    ] = False,
    live: Annotated[
        bool | None,
        typer.Option(
            "--live/--no-live",
            help="Videos: drop frames rather than to fall behind. Default: cameras and endless streams.",
        ),
    ] = None,
    precision: Precision = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run through torch.compile: a minute before it is faster.")
    ] = False,
) -> None:
    """Find the people in images and videos: drawings, and the keypoints as JSON."""
    from hpetr.inference.files import check_outputs, find_images, split_off_model
    from hpetr.video.naming import split_inputs

    inputs, checkpoint = split_off_model(inputs, checkpoint)
    videos, rest = split_inputs(inputs)
    images = find_images(rest) if rest else []
    if videos and images and json_file is not None:
        raise InputError("--json names one file, and there are images and videos: expected --output instead")
    if (track or smooth or live is not None) and not videos:
        raise InputError("--track, --smooth and --live are for videos, and there is none")
    if formats and videos:
        raise InputError("--format is for images, and there are videos: their results are JSON lines")
    chosen = list(dict.fromkeys(formats or ["coco"]))
    if images:
        check_outputs(images, output, json_file, draw, chosen)
    if videos:
        from hpetr.video.run import check_video_outputs

        check_video_outputs(videos, output, json_file, draw)
    from hpetr.inference.open import open_predictor
    from hpetr.inference.precision import keep_freed_memory

    keep_freed_memory()
    predictor = open_predictor(checkpoint, device, threshold, precision=precision, compiled=compiled)
    if images:
        _predict_images(predictor, images, output, json_file, draw, batch_size, chosen)
    if videos:
        from hpetr.cli.video import predict_and_report
        from hpetr.video.run import VideoOptions

        options = VideoOptions(draw, batch_size, track, smooth, live)
        predict_and_report(predictor, videos, output, json_file, options)


def _predict_images(
    predictor: Predictor,
    images: list[Path],
    output: Path,
    json_file: Path | None,
    draw: bool,
    batch_size: int | None,
    formats: list[str],
) -> None:
    from hpetr.inference.files import predict_files

    with progress("Predicting", len(images)) as advance:
        run = predict_files(predictor, images, output, json_file, draw, batch_size, advance, formats)
    read = run.images - len(run.unreadable)
    typer.echo(f"{count(run.people, 'person', 'people')} in {count(read, 'image', 'images')}")
    if draw:
        typer.echo(f"drawings: {output}")
    for written in run.written:
        typer.echo(f"results: {written}")
    for _, reason in run.unreadable:
        warn(reason)
    if run.unreadable:
        names = ", ".join(str(path) for path, _ in run.unreadable)
        typer.echo(f"{len(run.unreadable)} of {run.images} images could not be read: {names}", err=True)
