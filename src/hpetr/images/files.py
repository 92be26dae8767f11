"""Output files: written whole or not at all, and named so that none replaces another."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpetr.errors import InputError
from hpetr.images.read import JPEG_SUFFIXES


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or none: a reader never sees half of it, and a failure leaves an older file as it was.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of JSON; numbers that JSON does not have (NaN, infinity) are an error, not a broken file."""
    write_bytes(path, (json.dumps(value, allow_nan=False) + "\n").encode())


def check_writable(folder: Path) -> None:
    """Create the folder and prove that a file can be made in it, before any work is done.

    Raises:
        InputError: it cannot be created or written.
    """
    probe = folder / f".hpetr-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder ({error.strerror})") from error


def output_names(images: Sequence[Path]) -> list[str]:
    """A file name for each image's drawing, all different even where letter case does not count.

    JPEGs stay JPEGs, everything else becomes PNG. Of equal names the later ones get their folder's name in front, and
    a number where that is not enough.
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
    """A stem for a file beside each image, as `output_names` makes names: also of a.jpg and a.png two."""
    return [Path(name).stem for name in output_names([image.with_suffix(".png") for image in images])]
