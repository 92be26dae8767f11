"""The command `hpetr predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpetr.cli.options import BatchSize, Checkpoint, Device, Precision
from hpetr.cli.output import count, is_verbose, progress, say, say_beside, warn
from hpetr.errors import InputError

if TYPE_CHECKING:
    from hpetr.inference.files import ImageOutputs
    from hpetr.poses.predictor import Predictor

Threshold = typer.Option(min=0, max=1, help="Report poses with a higher score. Default: the checkpoint's.")
FORMATS = "Images: coco, coco-labels, yolo, labelme, csv; may be given several times. Default: coco."
JSON = "File for the results, - for standard output. Default: OUTPUT/predictions.json, of videos .jsonl."
# Names that a warning lists.
MOST_NAMES = 5


def predict_command(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders of them, quoted glob patterns; a camera's number; a stream's URL. "
            "An exported model (.onnx, .xml) among them is used."
        ),
    ],
    checkpoint: Checkpoint = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the drawings and the results.")] = Path(
        "outputs"
    ),
    threshold: Annotated[float | None, Threshold] = None,
    keypoint_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Draw and label keypoints from this score on. Default: the checkpoint's."),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help=JSON)] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help=FORMATS)] = None,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Write images with the poses drawn.")] = True,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Search the sub-folders of folders for images, too.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Images: go on after those that a stopped run has done.")
    ] = False,
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
    from hpetr.inference.files import FoundImages, ImageOutputs, find_images, is_complete, model_files, split_off_model
    from hpetr.video.naming import split_inputs

    inputs, checkpoint = split_off_model(inputs, checkpoint)
    videos, rest = split_inputs(inputs)
    found = find_images(rest, recursive=recursive) if rest else FoundImages([], [])
    if videos and found.images and json_file is not None:
        raise InputError("--json names one file, and there are images and videos: expected --output instead")
    if (track or smooth or live is not None) and not videos:
        raise InputError("--track, --smooth and --live are for videos, and there is none")
    if videos and (formats or resume):
        raise InputError("--format and --resume are for images, and there are videos: their results are JSON lines")
    outputs = ImageOutputs(output, json_file, draw, tuple(dict.fromkeys(formats or ["coco"])))
    models = model_files(checkpoint)
    if found.images:
        outputs.check(found.images, [*videos, *models], resume=resume)
    if videos:
        from hpetr.video.run import check_video_outputs

        check_video_outputs(videos, output, json_file, draw, inputs=[*found.images, *models])
    say_beside(json_file)
    passed_over = [str(path) for path in found.passed_over if str(path) not in videos]
    if passed_over:
        names = ", ".join([*passed_over[:MOST_NAMES], *(["..."] if len(passed_over) > MOST_NAMES else [])])
        warn(f"{count(len(passed_over), 'file', 'files')} passed over, no image by the suffix: {names}")
    if resume and is_complete(outputs, found.images):
        say(f"nothing left to do: {outputs.place('coco')} has {count(len(found.images), 'image', 'images')}")
        return
    from hpetr.inference.open import open_predictor
    from hpetr.inference.precision import keep_freed_memory

    keep_freed_memory()
    predictor = open_predictor(
        checkpoint, device, threshold, precision=precision, compiled=compiled, keypoint_threshold=keypoint_threshold
    )
    if is_verbose():
        typer.echo(f"model: {checkpoint or 'h-petr-nano'} on {predictor.device_name}, {precision}", err=True)
    if found.images:
        _predict_images(predictor, found.images, outputs, batch_size, resume, checkpoint or "")
    if videos:
        from hpetr.cli.video import predict_and_report
        from hpetr.video.run import VideoOptions

        options = VideoOptions(draw, batch_size, track, smooth, live)
        predict_and_report(predictor, videos, output, json_file, options)


def _predict_images(
    predictor: Predictor, images: list[Path], outputs: ImageOutputs, batch_size: int | None, resume: bool, model: str
) -> None:
    from hpetr.inference.files import predict_files

    with progress("Predicting", len(images)) as advance:
        run = predict_files(predictor, images, outputs, batch_size, advance, resume=resume, model=model)
    if run.resumed:
        say(f"{count(run.resumed, 'image', 'images')} done before")
    read = run.images - len(run.unreadable)
    say(f"{count(run.people, 'person', 'people')} in {count(read, 'image', 'images')}")
    if outputs.draw:
        say(f"drawings: {outputs.folder}")
    for kept in run.kept:
        say(f"earlier results of other images: {kept}")
    for written in run.written:
        say(f"results: {written}")
    if run.hidden is not None:
        warn(
            f"no keypoint has a score of {predictor.keypoint_threshold:g} or more, so drawings and labels show none; "
            f"the highest is {run.hidden:.3f}: expected a lower --keypoint-threshold"
        )
    for _, reason in run.unreadable:
        warn(reason)
    if run.unreadable:
        names = ", ".join(str(path) for path, _ in run.unreadable)
        typer.echo(f"{len(run.unreadable)} of {run.images} images could not be read: {names}", err=True)
