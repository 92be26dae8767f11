"""The command `hpetr train`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hpetr.cli.evaluate import one_error_line
from hpetr.cli.options import Overrides
from hpetr.cli.output import say


class TrainCommand(TyperCommand):
    """Accepts `--resume` alone, which means `--resume auto`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--resume" in args:
            place = args.index("--resume") + 1
            following = args[place] if place < len(args) else ""
            if not following or following.startswith("-") or "=" in following:
                args = [*args[:place], "auto", *args[place:]]
        return super().parse_args(ctx, args)


def train_command(
    recipe: Annotated[str, typer.Argument(help="Recipe, a YAML file or the name of one in the package.")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|DIR]", help="Go on from the newest checkpoint of the recipe's output (auto), or from one."
        ),
    ] = None,
) -> None:
    """Train a model by a recipe."""
    from hpetr.errors import needs_extra
    from hpetr.inference import processes

    with needs_extra("train", "train"):
        from hpetr.training.recipe import load_recipe

        processes.join(training=True)
    with one_error_line():
        loaded = load_recipe(recipe, overrides or [])
        # The recipe is checked before the seconds that importing the training engine takes.
        with needs_extra("train", "train"):
            from hpetr.training.run import Interrupted
            from hpetr.training.train import train

        try:
            folder = train(loaded, resume)
        except Interrupted as stop:
            if processes.rank() == 0:
                typer.echo(str(stop), err=True)
            raise typer.Exit(128 + stop.signal) from None
    if processes.rank() == 0:
        say(f"checkpoint: {folder}")
