"""The command line. Everything heavy is imported inside the commands, so that `hpetr --help` answers at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hpetr import __version__
from hpetr.errors import InputError

if TYPE_CHECKING:
    from hpetr.evaluate import EvalResult
    from hpetr.info import ModelInfo

BAD_INPUT = 2


class _Group(TyperGroup):
    """Turns bad input into one line on stderr and exit code 2; every other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None


class _TrainCommand(TyperCommand):
    """Lets `--resume` stand alone, meaning `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--resume" in args:
            place = args.index("--resume") + 1
            following = args[place] if place < len(args) else ""
            if not following or following.startswith("-") or "=" in following:
                args = [*args[:place], "auto", *args[place:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Pictures that go through the network together. Default: 8 on a GPU, else 1.")
]


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
    inputs: Annotated[list[str], typer.Argument(help="Pictures, folders of pictures, or quoted glob patterns.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint folder. Default: the model that comes with hpetr.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the drawings and the results.")] = Path("outputs"),
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Report poses with a higher score. Default: the checkpoint's.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Where the results go. Default: OUTPUT/predictions.json."),
    ] = None,
    draw: Annotated[bool, typer.Option("--draw/--no-draw", help="Write pictures with the poses drawn.")] = True,
) -> None:
    """Find the people in pictures: drawings and one JSON with all keypoints."""
    from hpetr.picture_files import check_outputs, find_pictures, predict_files
    from hpetr.predict import PosePredictor

    pictures = find_pictures(inputs)
    check_outputs(pictures, output, json_file, draw)
    predictor = PosePredictor(checkpoint, device, threshold)
    with _progress("Predicting", len(pictures)) as advance:
        run = predict_files(predictor, pictures, output, json_file, draw, batch_size, advance)
    read = run.pictures - len(run.unreadable)
    typer.echo(f"{_count(run.people, 'person', 'people')} in {_count(read, 'picture', 'pictures')}")
    if draw:
        typer.echo(f"drawings: {output}")
    typer.echo(f"results: {run.results}")
    if run.unreadable:
        for _, reason in run.unreadable:
            typer.echo(f"warning: {reason}", err=True)
        names = ", ".join(str(path) for path, _ in run.unreadable)
        typer.echo(f"{len(run.unreadable)} of {run.pictures} pictures could not be read: {names}", err=True)


@app.command("eval")
def evaluate_command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or h-petr-nano for the one in the package.")],
    data: Annotated[Path, typer.Argument(help="Folder with annotations.json and images/, or a COCO keypoint JSON.")],
    annotations: Annotated[Path | None, typer.Option(help="COCO keypoint JSON, when it is elsewhere.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures. Default: beside the JSON.")] = None,
    batch_size: BatchSize = None,
    output: Annotated[Path, typer.Option(help="JSON for the poses; the figures go beside it as .metrics.json.")] = Path(
        "outputs/eval.json"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pictures of the JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint: the ten COCO keypoint figures."""
    from hpetr.checkpoint import load_checkpoint
    from hpetr.data.dataset import CocoPoseDataset
    from hpetr.evaluate import evaluate
    from hpetr.results import check_writable

    source = annotations or (data / "annotations.json" if data.is_dir() else data)
    folder = images or (data / "images" if data.is_dir() else None)
    check_writable(output.parent)
    dataset = CocoPoseDataset(source, folder, limit=limit)
    model, processor = load_checkpoint(checkpoint, device)
    size = batch_size or (8 if model.device.type == "cuda" else 1)
    with _progress("Evaluating", len(dataset)) as advance:
        result = evaluate(model, processor, dataset, size, advance)
    metrics_file = result.write(output, {"checkpoint": checkpoint, "annotations": str(source), "hpetr": __version__})
    _print_metrics(result, str(source))
    typer.echo(f"poses: {output}\nfigures: {metrics_file}")


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
    from hpetr.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    # The recipe is checked before the seconds that importing the training engine takes.
    from hpetr.train import train

    typer.echo(f"checkpoint: {train(loaded, resume)}")


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
    from hpetr import convert as conversion
    from hpetr.checkpoint import load_checkpoint, save_checkpoint
    from hpetr.data.processor import HPetrImageProcessor
    from hpetr.results import check_writable, write_bytes

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
) -> None:
    """Show a model's size and cost, and the versions in use."""
    pixels = None if size is None else _parse_size(size)
    from hpetr.info import environment_info, model_info

    if target is not None:
        _print_model(model_info(target, pixels))
    _print_table("Environment", environment_info().items())


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise InputError(f"--size {text}: expected HEIGHTxWIDTH in pixels, e.g. 800x1216")
    return int(height), int(width)


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
    _print_table(model.name, rows)


def _print_metrics(result: EvalResult, source: str) -> None:
    rows = [(name, "-" if value < 0 else f"{value:.4f}") for name, value in result.metrics.items()]
    pictures = _count(result.pictures, "picture", "pictures")
    _print_table(f"{source}: {pictures}, {result.seconds:.1f} s", rows)


def _print_table(title: str, rows: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; yields what to call with the number of pictures done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def main() -> None:
    """Entry point of the `hpetr` command."""
    app()


if __name__ == "__main__":
    main()
