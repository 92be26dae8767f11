"""What the commands share: how they read a size and show tables, counts and progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpetr.errors import InputError

BAD_INPUT = 2  # exit code


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of HEIGHTxWIDTH; else InputError."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise InputError(f"--size {text}: expected HEIGHTxWIDTH in pixels, e.g. 800x1216")
    return int(height), int(width)


def print_table(title: str, rows: Any, header: tuple[str, ...] = ()) -> None:
    """Print rows of texts under a title."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A folder may be called [bold], or worse [/bold], which rich would take for a style.
    table = Table(*header, title=escape(title), title_justify="left", show_header=bool(header), box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(soft_wrap=True).print(table)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, of torchrun's processes the first one's; yields what to call with the
    number of images done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def count(number: int, one: str, many: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else many}"
