"""The commands `hpetr data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpetr.cli.options import Images, Overrides
from hpetr.cli.output import BAD_INPUT, progress, say, warn

data_app = typer.Typer(no_args_is_help=True, help="Look at data before training: check, show, sigmas.")


@data_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="COCO or CrowdPose JSON, YOLO-pose data.yaml, or a folder with one.")],
    images: Images = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a YOLO-pose data set: train, val or test. Default: all there are.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Decode every image and look for equal ones.")
    ] = True,
    examples: Annotated[int, typer.Option(min=0, help="Number of examples of each kind.")] = 3,
) -> None:
    """Report everything wrong or odd in a data set, and the part of it that training uses.

    Exit code 2 if training would refuse the data set, whatever the warnings and notes.
    """
    from hpetr.data.check import check_dataset
    from hpetr.data.readers import reader_of, source_file

    file = source_file(source)
    list_splits = reader_of(file).splits
    splits = list_splits(file, images) if list_splits and split is None else [split]
    accepted = True
    for number, name in enumerate(splits):
        report = check_dataset(file, images, name, decode, examples, lambda total: progress("Checking", total))
        if number:
            typer.echo("")
        if name is not None:
            typer.echo(f"split {name}")
        typer.echo("\n".join(report.lines()))
        accepted = accepted and report.accepted
    if not accepted:
        raise typer.Exit(BAD_INPUT)


@data_app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Recipe, a YAML file or the name of one in the package.")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Image to write, .jpg or .png.")] = Path(
        "outputs/data.jpg"
    ),
    images: Annotated[
        int, typer.Option("--images", "--pictures", min=1, help="Number of training images to show.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="The epoch shown: other images, other augmentation.")] = 0,
) -> None:
    """Draw the images that a recipe shows its network: augmented, with their labels."""
    from hpetr.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hpetr.training.show_data import write_grid

    say(f"images: {write_grid(loaded, output, images, seed)}")


@data_app.command()
def sigmas(
    files: Annotated[list[Path], typer.Argument(help="COCO keypoint JSONs with labels of the same images.")],
) -> None:
    """Estimate sigmas from people that were labelled several times.

    Prints a line for a recipe's `data` or a data.yaml; null stands for a keypoint that cannot be estimated.
    """
    from hpetr.data.sigmas import MIN_PAIRS, estimate_sigmas

    estimate = estimate_sigmas(files)
    typer.echo(f"{estimate.people} people labelled at least twice", err=True)
    for name, sigma, pairs in zip(estimate.names, estimate.sigmas, estimate.pairs, strict=True):
        if sigma is None:
            reason = "all of them equal" if pairs >= MIN_PAIRS else f"expected at least {MIN_PAIRS}"
            warn(f"{name}: not estimable from {pairs} repeated labels, {reason}")
    numbers = ", ".join("null" if sigma is None else f"{sigma:g}" for sigma in estimate.sigmas)
    typer.echo(f"sigmas: [{numbers}]")
