"""Write a file of one JSON value a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hpetr.errors import InputError, first_line


class JsonLines:
    """A file of JSON lines, under a temporary name until `close`.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: TextIO | None = None

    def write(self, value: Any) -> None:
        """Append a line; NaN and infinity, which JSON does not have, raise a ValueError."""
        line = json.dumps(value, allow_nan=False) + "\n"
        with self._writing():
            if self._file is None:
                self._file = open(self._temporary, "w", encoding="utf-8")
            self._file.write(line)

    def close(self) -> None:
        """Finish the file and give it its name; without a line there is no file."""
        if self._file is not None:
            with self._writing():
                self._file.close()
                self._temporary.replace(self.path)

    def discard(self) -> None:
        """Remove the unfinished file."""
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({first_line(error)})") from error
