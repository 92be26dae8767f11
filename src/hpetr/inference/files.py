"""Poses of whole folders of image files: which images, what the outputs are called, and the results file."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hpetr.errors import InputError
from hpetr.images.files import check_writable, output_names, write_bytes
from hpetr.images.read import IMAGE_SUFFIXES, encode_image, load_image
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.runtime import is_exported


def split_off_model(inputs: list[str], checkpoint: str | None) -> tuple[list[str], str | None]:
    """The images and videos among the inputs, and the model: the option's, or the exported one among the inputs.

    Raises:
        InputError: more than one model, or none but the model among the inputs.
    """
    models = [text for text in inputs if is_exported(text)]
    if not models:
        return inputs, checkpoint
    if len(models) > 1 or checkpoint is not None:
        named = [*([checkpoint] if checkpoint else []), *models]
        raise InputError(f"predict: {len(named)} models ({', '.join(named)}), expected one")
    rest = [text for text in inputs if text not in models]
    if not rest:
        raise InputError(f"{models[0]}: a model without images, expected them behind it")
    return rest, models[0]


def find_images(inputs: Sequence[str]) -> list[Path]:
    """The images that files, folders and glob patterns name, each once, in the order given, folders by name.

    A folder gives the files with an image's suffix directly in it; a file that is named is taken whatever its suffix.

    Raises:
        InputError: an input names nothing.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not images:
                raise InputError(f"{path}: the folder has no image directly in it (its sub-folders are not searched)")
        elif path.is_file():
            images = [path]
        elif glob.has_magic(text):
            images = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())
            if not images:
                raise InputError(f"{text}: the pattern matches no file")
        else:
            raise InputError(f"{path}: no such file or folder, expected images")
        for image in images:
            found.setdefault(image.resolve(), image)
    return list(found.values())


@dataclass
class PredictionRun:
    """What became of the images.

    Attributes:
        images: how many were given.
        people: poses found in all of them.
        unreadable: images that could not be read, and why.
        written: the file or folder of each format with all poses.
    """

    images: int
    people: int = 0
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)


def predict_files(
    predictor: Predictor,
    images: Sequence[Path],
    output: Path,
    results: Path | None = None,
    draw: bool = True,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    formats: Sequence[str] = ("coco",),
) -> PredictionRun:
    """Predict every image, write the drawings and the results; an image that cannot be read does not stop the rest.

    Args:
        images: see `find_images`.
        output: folder for the drawings, named by `output_names`, and the results, named by `formats.FORMATS`.
        results: another place for the results in `coco`.
        draw: write drawings.
        batch_size: see `Predictor`.
        progress: called with the number of images after each batch.
        formats: of the results, see `hpetr.poses.formats`.

    Raises:
        InputError: no image at all can be read, or an output cannot be written.
    """
    from hpetr.poses.formats import write_format  # that module imports this one

    run = PredictionRun(len(images))
    names = dict(zip(images, output_names(images), strict=True))
    found: list[PoseResult] = []
    size = predictor.default_batch_size if batch_size is None else batch_size
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        for path, image, result in _predict_readable(predictor, batch, size, run):
            found.append(replace(result, path=path))
            if draw:
                name = names[path]
                write_bytes(output / name, encode_image(result.draw(image), Path(name).suffix))
        if progress is not None:
            progress(len(batch))
    if not found:
        more = f" (and none of the other {len(images) - 1} images)" if len(images) > 1 else ""
        raise InputError(f"{run.unreadable[0][1]}{more}")
    run.people = sum(len(result) for result in found)
    for form in formats:
        place = results if form == "coco" and results is not None else None
        run.written.append(write_format(form, found, predictor.class_names, output, run.unreadable, place))
    return run


def _predict_readable(
    predictor: Predictor, paths: Sequence[Path], batch_size: int, run: PredictionRun
) -> Iterator[tuple[Path, np.ndarray, PoseResult]]:
    readable, loaded = [], []
    for path in paths:
        try:
            loaded.append(load_image(path))
            readable.append(path)
        except InputError as error:
            run.unreadable.append((path, str(error)))
    yield from zip(readable, loaded, predictor(loaded, batch_size), strict=True)


def check_outputs(
    images: Sequence[Path], output: Path, results: Path | None, draw: bool, formats: Sequence[str] = ("coco",)
) -> None:
    """Prove before any work that the outputs can be written and that no input is among them.

    Raises:
        InputError: a folder cannot be written, a drawing would replace one of the images, or see `check_formats`.
    """
    from hpetr.poses.formats import check_formats  # that module imports this one

    check_formats(formats, images, output)
    if results is not None and "coco" not in formats:
        raise InputError(f"--json {results}: is for the results in coco, expected --format coco among the others")
    if draw or results is None or len(formats) > 1:
        check_writable(output)
    if results is not None:
        check_writable(results.parent)
        if results.is_dir():
            raise InputError(f"{results}: is a folder, expected a file for the results")
    if draw:
        inputs = {image.resolve() for image in images}
        for name in output_names(images):
            if (output / name).resolve() in inputs:
                raise InputError(f"{output / name}: is one of the images, expected another output folder")
