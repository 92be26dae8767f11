"""Write a file of one JSON value a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hpetr.errors import InputError, first_line
from hpetr.images.files import STANDARD_OUTPUT, is_stream


class JsonLines:
    """A file of JSON lines, under a temporary name until `close`; a failure removes it.

    Standard output (`-`), devices and pipes get every line at once.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_stream = is_stream(path)
        self._target = Path(os.path.realpath(path))
        self._temporary = self._target.with_name(f".{self._target.name[:40]}.{os.getpid()}.tmp")
        self._file: TextIO | None = None

    def write(self, value: Any) -> None:
        """Append a line; NaN and infinity, which JSON does not have, raise a ValueError."""
        line = json.dumps(value, allow_nan=False) + "\n"
        with self._writing():
            if self._file is None:
                self._file = self._open()
            self._file.write(line)
            if self._is_stream:
                self._file.flush()

    def _open(self) -> TextIO:
        if self.path == STANDARD_OUTPUT:
            return sys.stdout
        return open(self.path if self._is_stream else self._temporary, "w", encoding="utf-8")

    def close(self) -> None:
        """Finish the file and give it its name; without a line there is no file."""
        if self._file is not None and self._file is not sys.stdout:
            with self._writing():
                self._file.close()
                if not self._is_stream:
                    self._temporary.replace(self._target)

    def discard(self) -> None:
        """Remove the unfinished file."""
        if self._file is not None and self._file is not sys.stdout:
            with suppress(OSError):  # of a full disk
                self._file.close()
        if not self._is_stream:
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            name = "standard output" if self.path == STANDARD_OUTPUT else self.path
            raise InputError(f"{name}: cannot be written ({first_line(error)})") from error
