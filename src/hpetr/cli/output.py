"""Lines, tables and progress bars of the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

BAD_INPUT = 2  # exit code
SECONDS_BETWEEN_LINES = 30


@dataclass
class _Lines:
    """Where the lines of a command go."""

    to_stderr: bool = False
    level: int = 0  # -1 quiet, 1 verbose


_lines = _Lines()


def set_level(level: int) -> None:
    """Begin a command: -1 prints errors and warnings alone, 1 prints more."""
    _lines.to_stderr, _lines.level = False, level


def is_verbose() -> bool:
    """Return whether `-v` was given."""
    return _lines.level > 0


def say(text: str) -> None:
    """Print a line on standard output, or on stderr if data go to standard output; nothing if quiet."""
    if _lines.level >= 0:
        typer.echo(text, err=_lines.to_stderr)


def say_beside(output: Path | None) -> None:
    """Print further lines on stderr if an output is standard output."""
    from hpetr.images.files import STANDARD_OUTPUT

    _lines.to_stderr = output in (STANDARD_OUTPUT, Path("/dev/stdout"))


def warn(text: str) -> None:
    """Print a warning."""
    typer.echo(f"warning: {text}", err=True)


def print_table(title: str, rows: Any, header: tuple[str, ...] = ()) -> None:
    """Print rows of texts under a title."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    # rich would take a folder called [bold] for a style, and stop at [/bold].
    table = Table(*header, title=escape(title), title_justify="left", show_header=bool(header), box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def console() -> Console:
    """Return a console where `say` prints."""
    from rich.console import Console

    return Console(soft_wrap=True, stderr=_lines.to_stderr, quiet=_lines.level < 0)


@contextmanager
def progress(title: str, total: int, seconds: float = SECONDS_BETWEEN_LINES) -> Iterator[Callable[[int], None]]:
    """Show the progress of a work on stderr: a bar in a terminal, else a line now and then; nothing if quiet.

    Of several processes the first one shows it.

    Args:
        title: of the work.
        total: number of parts.
        seconds: between two lines.

    Yields:
        A function to call with the number of parts done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bars = Console(stderr=True)
    is_first = os.environ.get("RANK", "0") == "0" and _lines.level >= 0
    shown, done = time.monotonic(), 0

    def advance(parts: int) -> None:
        nonlocal shown, done
        done += parts
        bar.advance(task, parts)
        if is_first and not bars.is_terminal and done < total and time.monotonic() - shown >= seconds:
            typer.echo(f"{title.lower()}: {done:,} of {total:,}", err=True)
            shown = time.monotonic()

    with Progress(*columns, console=bars, transient=True, disable=not (is_first and bars.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield advance


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"
