"""The one exception that means "your input is wrong", as opposed to "hpetr is wrong"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from the user: one line that names the file, the field and what was expected.

    The command line prints it and ends with exit code 2. Names of files and of what is in them may hold anything: line
    breaks and a terminal's control characters are shown as escapes.

    Attributes:
        alone: of several processes only this one has the error; otherwise all have the same.
    """

    alone = False

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """What an error about an unknown name ends with: "did you mean 'epochs'?", or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, for errors of one line.

    Of an `OSError` it is the reason alone ("Permission denied"), of an exception without a message its class's name.
    """
    message = str(getattr(error, "strerror", None) or error)
    return next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)


@contextmanager
def needs_extra(extra: str, feature: str) -> Iterator[None]:
    """Turn the failure of an import inside the block into an `InputError` that names the extra to install.

    Args:
        extra: name in pyproject.toml's optional dependencies, such as "video".
        feature: the command, file or option that needs it, the first word of the error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        install = f'pip install -c constraints.txt ".[{extra}]"'
        raise InputError(f"{feature}: the package {error.name} is missing, expected after {install}") from error
