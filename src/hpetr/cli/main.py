"""The command line. Everything heavy is imported inside the commands, so that `hpetr --help` answers at once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hpetr import __version__
from hpetr.cli.benchmark import benchmark_command
from hpetr.cli.data import data_app
from hpetr.cli.export import export_command
from hpetr.cli.output import BAD_INPUT, count, parse_size, print_table, progress
from hpetr.cli.serve import serve_command
from hpetr.errors import InputError

if TYPE_CHECKING:
    from hpetr.data.dataset import PoseDataset
    from hpetr.evaluation.evaluate import EvalResult
    from hpetr.evaluation.info import ModelInfo
    from hpetr.evaluation.zoo import ZooResult
    from hpetr.poses.predictor import Predictor


class _Group(TyperGroup):
    """Turns bad input into one line on stderr and exit code 2; every other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None
        except FloatingPointError as error:  # a training diverged: nothing is wrong with the input or with hpetr
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


class _TrainCommand(TyperCommand):
    """Lets `--resume` stand alone, meaning `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--resume" in args:
            place = args.index("--resume") + 1
            following = args[place] if place < len(args) else ""
            if not following or following.startswith("-") or "=" in following:
                args = [*args[:place], "auto", *args[place:]]
        return super().parse_args(ctx, args)


class _EvalCommand(TyperCommand):
    """Shows its arguments as they are meant: typer has no optional one before a required one."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[CHECKPOINT] DATA"]


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16: faster on GPUs, and on CPUs with hardware for bfloat16 matrices.")
]
Compiled = Annotated[bool, typer.Option("--compile", help="Run through torch.compile: a minute before it is faster.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images that go through the network together. Default: 8 on a GPU, else 1.")
]


app.add_typer(data_app, name="data")
app.command("benchmark")(benchmark_command)
app.command("export")(export_command)
app.command("serve")(serve_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpetr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Multi-person pose estimation with one network and no NMS: PETR and H-PETR."""


@app.command()
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, videos, folders of them, quoted glob patterns; a camera's number; a stream's URL. "
            "An exported model (.onnx, .xml) among them is used."
        ),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or exported model. Default: the model that comes with hpetr."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawings and the results.")] = Path("outputs"),
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Report poses with a higher score. Default: the checkpoint's.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Where the results go. Default: OUTPUT/predictions.json, of videos OUTPUT/predictions.jsonl."
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Images: coco, coco-labels, yolo, labelme, csv; may be given several times. Default: coco.",
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
    compiled: Compiled = False,
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
    if run.unreadable:
        for _, reason in run.unreadable:
            typer.echo(f"warning: {reason}", err=True)
        names = ", ".join(str(path) for path, _ in run.unreadable)
        typer.echo(f"{len(run.unreadable)} of {run.images} images could not be read: {names}", err=True)


@app.command("eval", cls=_EvalCommand)
def evaluate_command(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[CHECKPOINT] DATA",
            help="Checkpoint folder, or h-petr-nano for the one in the package (none with --zoo); and the data: a COCO "
            "or CrowdPose JSON, a YOLO data.yaml, or a folder with annotations.json and images/.",
        ),
    ],
    annotations: Annotated[Path | None, typer.Option(help="COCO keypoint JSON, when it is elsewhere.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images. Default: beside the JSON.")] = None,
    split: Annotated[str | None, typer.Option(help="Which images of a YOLO data.yaml. Default: val.")] = None,
    flip_test: Annotated[
        bool, typer.Option("--flip-test", help="Merge the poses of each image and of its mirror image.")
    ] = False,
    zoo: Annotated[
        Path | None,
        typer.Option(help="Folder of official .pth files: evaluate each, and compare with the published figures."),
    ] = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON for the poses; the figures go beside it as .metrics.json. With --zoo: JSON for the figures. "
            "Default: outputs/eval.json, outputs/zoo.json."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images of the data.")] = None,
    device: Device = "auto",
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the checkpoint's model card.")] = False,
    precision: Precision = "float32",
) -> None:
    """Evaluate a checkpoint: the figures of COCO's keypoint protocol, or of CrowdPose's.

    Under torchrun all processes share the work.
    """
    from hpetr.checkpoints.card import check_card
    from hpetr.data.dataset import is_yolo, open_dataset, source_file
    from hpetr.images.files import check_writable
    from hpetr.inference import processes

    data, target = Path(places[-1]), output or Path("outputs") / ("zoo.json" if zoo else "eval.json")
    folder = images or (data / "images" if annotations and data.is_dir() else None)
    processes.join()

    def prepare() -> tuple[PoseDataset, str]:
        if len(places) != (1 if zoo else 2):
            expected = "DATA alone, as --zoo names the checkpoints" if zoo else "CHECKPOINT DATA"
            raise InputError(f"eval: {len(places)} arguments, expected {expected}")
        if processes.rank() == 0:
            check_writable(target.parent)
        if card:
            check_card(None if zoo else places[0])
        source = source_file(annotations or data)
        chosen = split or ("val" if is_yolo(source) else None)
        return open_dataset(source, folder, split=chosen, limit=limit), processes.claim_device(device)

    with _one_error_line():
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
    from hpetr.inference.precision import keep_freed_memory, set_up_inference
    from hpetr.inference.torch_predictor import default_batch_size

    keep_freed_memory()
    first = processes.rank() == 0
    model, processor = processes.together(lambda: load_checkpoint(checkpoint, device))
    size = batch_size or default_batch_size(model)
    set_up_inference(model, precision)
    with progress("Evaluating", len(dataset)) as advance:
        result = evaluate(model, processor, dataset, size, advance, flip_test=flip_test)
    about = {"checkpoint": checkpoint, "annotations": str(dataset.path), "hpetr": __version__}
    metrics_file = processes.together(lambda: result.write(output, about) if first else None)
    if first:
        _print_metrics(result, str(dataset.path))
        typer.echo(f"poses: {output}\nfigures: {metrics_file}")
    if card and first:
        typer.echo(f"card: {write_evaluation(Path(checkpoint), model, dataset.path, result)}")


def _evaluate_zoo(
    folder: Path, dataset: PoseDataset, output: Path, device: str, batch_size: int | None, flip_test: bool
) -> None:
    from hpetr.evaluation.zoo import evaluate_zoo, find_checkpoints
    from hpetr.inference import processes

    first = processes.rank() == 0
    paths = processes.together(lambda: find_checkpoints(folder))
    with progress("Evaluating", len(paths) * len(dataset)) as advance:
        result = evaluate_zoo(paths, dataset, device, batch_size, advance, flip_test=flip_test)
    about = {"zoo": str(folder), "annotations": str(dataset.path), "hpetr": __version__}
    processes.together(lambda: result.write(output, about) if first else None)
    if first:
        _print_zoo(result, str(dataset.path))
        typer.echo(f"figures: {output}")
        for _, reason in result.left_out:
            typer.echo(f"warning: {reason}", err=True)
        if result.left_out:
            names = ", ".join(path.name for path, _ in result.left_out)
            typer.echo(f"{len(result.left_out)} of {len(paths)} checkpoints left out: {names}", err=True)


@contextmanager
def _one_error_line() -> Iterator[None]:
    """Of several processes with the same error only the first one says it; all end with `BAD_INPUT`."""
    from hpetr.inference import processes

    try:
        yield
    except InputError as error:
        if processes.count() == 1 or error.alone:
            raise
        if processes.rank() == 0:
            typer.echo(f"error: {error}", err=True)
        # torchrun ends the others as soon as one has ended: nobody goes before it is said.
        processes.gather(None)
        raise typer.Exit(BAD_INPUT) from None


@app.command("train", cls=_TrainCommand)
def train_command(
    recipe: Annotated[str, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|DIR]", help="Go on from the newest checkpoint of the recipe's output (auto), or from one."
        ),
    ] = None,
) -> None:
    """Train a model by a recipe."""
    from hpetr.inference import processes
    from hpetr.training.recipe import load_recipe

    processes.join(training=True)
    with _one_error_line():
        loaded = load_recipe(recipe, overrides or [])
        # The recipe is checked before the seconds that importing the training engine takes.
        from hpetr.training.train import train

        folder = train(loaded, resume)
    if processes.rank() == 0:
        typer.echo(f"checkpoint: {folder}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="Official .pth file; or a checkpoint folder with --to-official or --half.")
    ],
    preset: Annotated[str | None, typer.Option(help="Which model the .pth is of, e.g. h-petr-r50.")] = None,
    output: Annotated[Path | None, typer.Option(help="New checkpoint folder.")] = None,
    to_official: Annotated[Path | None, typer.Option(help="New .pth file in the official layout.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the folder's matrices as float16 in --output.")] = False,
) -> None:
    """Convert an official checkpoint to hpetr, or back; or halve a checkpoint's size."""
    given = (preset is not None, output is not None, to_official is not None, half)
    directions = {(True, True, False, False), (False, False, True, False), (False, True, False, True)}
    if given not in directions:
        raise InputError("convert: expected --preset and --output, or --to-official, or --half and --output")
    from hpetr.checkpoints import official as conversion
    from hpetr.checkpoints.folder import load_checkpoint, save_checkpoint
    from hpetr.images.files import check_writable, write_bytes
    from hpetr.model.image_processor import HPetrImageProcessor

    if to_official is not None:
        check_writable(to_official.parent)
        model, _ = load_checkpoint(source, "cpu")
        import torch

        buffer = io.BytesIO()
        torch.save({"state_dict": conversion.to_official(model)}, buffer)
        write_bytes(to_official, buffer.getvalue())
        typer.echo(f"official checkpoint: {to_official}")
    elif preset is not None and output is not None:
        check_writable(output.parent)
        save_checkpoint(conversion.load_official(source, preset), HPetrImageProcessor(), output)
        typer.echo(f"checkpoint: {output}")
    elif output is not None:
        check_writable(output.parent)
        save_checkpoint(*load_checkpoint(source, "cpu"), output, half=True)
        typer.echo(f"checkpoint: {output}")


@app.command()
def info(
    target: Annotated[
        str | None, typer.Argument(help="Preset or checkpoint folder. Without one: versions and machine only.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Input of the network as HEIGHTxWIDTH, e.g. 800x1216.")] = None,
    licenses: Annotated[
        bool, typer.Option("--licenses", help="The licences of all packages that hpetr runs with, and nothing else.")
    ] = False,
) -> None:
    """Show a model's size and cost, and the versions in use."""
    if licenses:
        _print_licenses()
        return
    pixels = None if size is None else parse_size(size)
    from hpetr.evaluation.info import environment_info, model_info

    if target is not None:
        _print_model(model_info(target, pixels))
    print_table("Environment", environment_info().items())


def _print_model(model: ModelInfo) -> None:
    tokens = ", ".join(f"{count:,}" for count in model.tokens)
    rows = [
        ("parameters", f"{model.parameters:,}"),
        ("trainable", f"{model.trainable:,}"),
        ("frozen", f"{model.frozen:,}"),
        ("input", f"{model.size[0]} x {model.size[1]} (height x width)"),
        ("FLOPs", f"{model.flops / 1e9:.1f} G, multiply-add = 2, without deformable sampling"),
        ("tokens per level", f"{tokens} (sum {sum(model.tokens):,})"),
    ]
    print_table(model.name, rows)


def _print_licenses() -> None:
    from hpetr.licenses import installed_licenses, to_look_at

    packages = installed_licenses()
    rows = [("package", "version", "needed for", "licence")]
    for package in packages:
        carried = ", ".join(name for name, _ in package.carried)
        license_text = package.license + (f"; carries {carried}" if carried else "")
        rows.append((package.name, package.version, package.needed_for, license_text))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
    for *columns, license_text in rows:
        typer.echo("  ".join([*(text.ljust(w) for text, w in zip(columns, widths, strict=True)), license_text]))
    typer.echo("\n" + "\n".join(to_look_at(packages)))


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


def main() -> None:
    """Entry point of the `hpetr` command."""
    app()
