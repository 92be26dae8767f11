"""Poses of image files: the images that inputs name, their outputs, and the results."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hpetr.errors import InputError
from hpetr.images.files import check_writable, output_names, write_bytes
from hpetr.images.read import encode_image, is_image, load_image
from hpetr.poses.formats import check_formats, write_format
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.runtime import is_exported


def split_off_model(inputs: list[str], checkpoint: str | None) -> tuple[list[str], str | None]:
    """Return the inputs without an exported model among them, and the model: that one or the option's.

    Raises:
        InputError: more than one model, or no other input.
    """
    models = [text for text in inputs if is_exported(text)]
    if not models:
        return inputs, checkpoint
    named = [*([checkpoint] if checkpoint else []), *models]
    if len(named) > 1:
        raise InputError(f"predict: {len(named)} models ({', '.join(named)}), expected one")
    rest = [text for text in inputs if text not in models]
    if not rest:
        raise InputError(f"{models[0]}: a model without images, expected them behind it")
    return rest, models[0]


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the images that files, folders and glob patterns name, each once, in the order given, folders by name.

    A folder gives the files directly in it that have an image's suffix. A named file is taken whatever its suffix.

    Raises:
        InputError: an input names nothing.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if is_image(p) and p.is_file())
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
    """The outcome of `predict_files`.

    Attributes:
        images: number of images given.
        people: number of poses in all images.
        unreadable: images that could not be read, and the reasons.
        written: the file or folder of each format.
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
    """Predict every image, write the drawings and the results. An image that cannot be read does not stop the rest.

    Args:
        predictor: the model.
        images: see `find_images`.
        output: folder of the drawings, named by `output_names`, and of the results, named by `formats.FORMATS`.
        results: another file for the results in `coco`.
        draw: write drawings.
        batch_size: see `Predictor`.
        progress: called with the number of images after each batch.
        formats: of the results, see `hpetr.poses.formats`.

    Raises:
        InputError: no image can be read, or an output cannot be written.
    """
    run = PredictionRun(len(images))
    names = dict(zip(images, output_names(images), strict=True))
    found: list[PoseResult] = []
    size = predictor.default_batch_size if batch_size is None else batch_size
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        for image, result in _predict_readable(predictor, batch, run):
            found.append(result)
            if draw:
                name = names[result.path]
                write_bytes(output / name, encode_image(result.draw(image), Path(name).suffix))
        if progress is not None:
            progress(len(batch))
    if not found:
        more = f" (and none of the other {len(images) - 1} images)" if len(images) > 1 else ""
        raise InputError(f"{run.unreadable[0][1]}{more}")
    run.people = sum(len(result) for result in found)
    for form in formats:
        place = results if form == "coco" else None
        run.written.append(write_format(form, found, predictor.class_names, output, run.unreadable, place))
    return run


def _predict_readable(
    predictor: Predictor, paths: Sequence[Path], run: PredictionRun
) -> Iterator[tuple[np.ndarray, PoseResult]]:
    """Yield the readable images of a batch with their results; add the others to `run.unreadable`."""
    loaded: dict[Path, np.ndarray] = {}
    for path in paths:
        try:
            loaded[path] = load_image(path)
        except InputError as error:
            run.unreadable.append((path, str(error)))
    results = predictor.predict(list(loaded.values())) if loaded else []
    for (path, image), result in zip(loaded.items(), results, strict=True):
        yield image, replace(result, path=path)


def check_outputs(
    images: Sequence[Path], output: Path, results: Path | None, draw: bool, formats: Sequence[str] = ("coco",)
) -> None:
    """Check before any work that the outputs can be written and that no image is among them.

    Raises:
        InputError: a folder cannot be written, a drawing would replace one of the images, or see `check_formats`.
    """
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
