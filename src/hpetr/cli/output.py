"""Lines, tables and progress bars of the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

BAD_INPUT = 2  # exit code
SECONDS_BETWEEN_LINES = 30


def warn(text: str) -> None:
    """Print a warning."""
    typer.echo(f"warning: {text}", err=True)


def print_table(title: str, rows: Any, header: tuple[str, ...] = ()) -> None:
    """Print rows of texts under a title."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # rich would take a folder called [bold] for a style, and stop at [/bold].
    table = Table(*header, title=escape(title), title_justify="left", show_header=bool(header), box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(soft_wrap=True).print(table)


@contextmanager
def progress(title: str, total: int, seconds: float = SECONDS_BETWEEN_LINES) -> Iterator[Callable[[int], None]]:
    """Show the progress of a work on stderr: a bar in a terminal, else a line now and then.

    Of several processes only the first one shows it.

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
    console = Console(stderr=True)
    is_first = os.environ.get("RANK", "0") == "0"
    shown, done = time.monotonic(), 0

    def advance(parts: int) -> None:
        nonlocal shown, done
        done += parts
        bar.advance(task, parts)
        if is_first and not console.is_terminal and done < total and time.monotonic() - shown >= seconds:
            typer.echo(f"{title.lower()}: {done:,} of {total:,}", err=True)
            shown = time.monotonic()

    with Progress(*columns, console=console, transient=True, disable=not (is_first and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total)
        yield advance


def count(number: int, one: str, many: str) -> str:
    """Return a number with its noun."""
    return f"{number} {one if number == 1 else many}"
