"""The command line. Commands import everything heavy themselves, so that `hpetr --help` answers at once."""

from __future__ import annotations

import errno
import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hpetr import __version__
from hpetr.cli.benchmark import benchmark_command
from hpetr.cli.convert import convert_command
from hpetr.cli.data import data_app
from hpetr.cli.environment import prepare_environment
from hpetr.cli.evaluate import EvalCommand, eval_command
from hpetr.cli.export import export_command
from hpetr.cli.info import info_command
from hpetr.cli.output import BAD_INPUT, is_verbose, set_level
from hpetr.cli.predict import predict_command
from hpetr.cli.serve import serve_command
from hpetr.cli.train import TrainCommand, train_command
from hpetr.errors import InputError

# Options of all commands, accepted before and behind the command's name.
GLOBAL_OPTIONS = ("-q", "--quiet", "-v", "--verbose", "-V", "--version")


class _Group(TyperGroup):
    """Turns bad input into one line on stderr and exit code 2; every other error keeps its traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ahead = [arg for arg in args[:end] if arg in GLOBAL_OPTIONS]
        return super().parse_args(ctx, [*ahead, *(arg for arg in args[:end] if arg not in ahead), *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            if is_verbose():
                traceback.print_exc()
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(BAD_INPUT) from None
        except FloatingPointError as error:  # a training diverged: neither the input nor hpetr is wrong
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            # Files have their own errors; left is standard output, on a full disk for example.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            typer.echo(f"error: standard output: cannot be written ({error.strerror})", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's last flush would fail once more
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
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
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings alone.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the model and the device, and where an error comes from.")
    ] = False,
) -> None:
    """Multi-person pose estimation with one network and no NMS: PETR and H-PETR."""
    set_level(1 if verbose else -1 if quiet else 0)


def main() -> None:
    """Run the `hpetr` command."""
    prepare_environment()
    app()
