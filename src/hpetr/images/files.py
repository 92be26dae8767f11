"""Output files: written whole or not at all, never over an input, under names that do not collide."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from hpetr.errors import InputError, first_line
from hpetr.images.read import JPEG_SUFFIXES

STANDARD_OUTPUT = Path("-")
RESULT_SUFFIXES = (".json", ".jsonl")


def check_output(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (), suffixes: Collection[str] = ()
) -> Path:
    """Check, before any work, that a file can be written and is none of the inputs.

    Symbolic links are followed. Standard output (`-`), devices and pipes pass.

    Args:
        path: the output.
        inputs: files and folders that the command reads; names of other things pass.
        suffixes: of a regular file, such as `RESULT_SUFFIXES`; empty allows any.

    Returns:
        The path.

    Raises:
        InputError: it is an input or a folder, has another suffix, or its folder cannot be written.
    """
    path = Path(path)
    if is_stream(path):
        return path
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if path.exists():
        status = path.stat()
        for source in inputs:
            if os.path.exists(source) and os.path.samestat(os.stat(source), status):
                raise InputError(f"{path}: is one of the inputs, expected another file to write")
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: expected a file to write that ends in {' or '.join(suffixes)}")
    check_writable(Path(os.path.realpath(path)).parent)
    return path


def is_stream(path: Path) -> bool:
    """Return whether a path is standard output, a device, a pipe or the like: written into, never replaced."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return path == STANDARD_OUTPUT
    return _is_stdout(path) or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: no reader sees half of it, and a failure leaves an older file as it was.

    A symbolic link is followed. Standard output (`-`), devices and pipes are written into.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if _is_stdout(path):
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        elif is_stream(path):
            with path.open("wb") as file:
                file.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        name = "standard output" if path == STANDARD_OUTPUT else path
        raise InputError(f"{name}: cannot be written ({first_line(error)})") from error


def _replace(path: Path, data: bytes) -> None:
    # A part of the name, since the whole one may leave no room for more.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _is_stdout(path: Path) -> bool:
    """Return whether a path is `-` or, as /dev/stdout may be, the file that standard output goes to."""
    try:
        return path == STANDARD_OUTPUT or os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_bytes` does; numbers that JSON does not have (NaN, infinity) raise a ValueError."""
    write_bytes(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def check_writable(folder: Path) -> None:
    """Create a folder and check that a file can be made in it, before any work is done.

    Raises:
        InputError: it cannot be created or written.
    """
    probe = folder / f".hpetr-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder ({first_line(error)})") from error


def output_names(images: Sequence[Path]) -> list[str]:
    """Return a file name for the drawing of each image, all different even if letter case does not count.

    JPEGs stay JPEGs, everything else becomes PNG. Of equal names the later ones are preceded by the folder's name, and
    followed by a number if that is not enough.
    """
    taken: set[str] = set()
    names = []
    for image in images:
        suffix = image.suffix if image.suffix.lower() in JPEG_SUFFIXES else ".png"
        with_folder = f"{image.resolve().parent.name}_{image.stem}"
        candidates = [image.stem, with_folder, *(f"{with_folder}_{n}" for n in range(2, len(images) + 2))]
        name = next(f"{stem}{suffix}" for stem in candidates if f"{stem}{suffix}".lower() not in taken)
        taken.add(name.lower())
        names.append(name)
    return names


def unique_stems(images: Sequence[Path]) -> list[str]:
    """Return a different stem for a file beside each image, also for a.jpg and a.png."""
    return [Path(name).stem for name in output_names([image.with_suffix(".png") for image in images])]
