"""The command line. Commands import everything heavy themselves, so that `hpetr --help` answers at once."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hpetr import __version__
from hpetr.cli.benchmark import benchmark_command
from hpetr.cli.convert import convert_command
from hpetr.cli.data import data_app
from hpetr.cli.evaluate import EvalCommand, eval_command
from hpetr.cli.export import export_command
from hpetr.cli.info import info_command
from hpetr.cli.output import BAD_INPUT
from hpetr.cli.predict import predict_command
from hpetr.cli.serve import serve_command
from hpetr.cli.train import TrainCommand, train_command
from hpetr.errors import InputError


class _Group(TyperGroup):
    """Turns bad input into one line on stderr and exit code 2; every other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None
        except FloatingPointError as error:  # a training diverged: neither the input nor hpetr is wrong
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("predict")(predict_command)
app.command("eval", cls=EvalCommand)(eval_command)
app.command("train", cls=TrainCommand)(train_command)
app.add_typer(data_app, name="data")
app.command("convert")(convert_command)
app.command("export")(export_command)
app.command("serve")(serve_command)
app.command("benchmark")(benchmark_command)
app.command("info")(info_command)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"hpetr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Multi-person pose estimation with one network and no NMS: PETR and H-PETR."""


def main() -> None:
    """Run the `hpetr` command."""
    app()
