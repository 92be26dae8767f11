"""Poses of image files: the images that inputs name, their outputs, and the results."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hpetr.errors import InputError
from hpetr.images.files import (
    RESULT_SUFFIXES,
    check_output,
    check_writable,
    is_stream,
    output_names,
    write_bytes,
)
from hpetr.images.read import encode_image, is_image, load_image
from hpetr.inference.journal import SUFFIX, Journal
from hpetr.poses.formats import FORMATS, LABELS, check_formats, write_format
from hpetr.poses.predictor import Predictor
from hpetr.runtime import is_exported

COCO = "coco"


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


def model_files(name: str | None) -> list[Path]:
    """Return the files of a checkpoint folder or an exported model; none for other names of models."""
    path = Path(name or "")
    if name and path.is_dir():
        return list(path.iterdir())
    return [path, path.with_suffix(".bin")] if name and is_exported(path) else []


@dataclass(frozen=True)
class FoundImages:
    """Images that inputs name, and the files in their folders that are no images."""

    images: list[Path]
    passed_over: list[Path]


def find_images(inputs: Sequence[str], *, recursive: bool = False) -> FoundImages:
    """Find the images that files, folders and glob patterns name, each once, in the order given, folders by name.

    A folder gives the files in it with an image's suffix. A named file is taken whatever its suffix.

    Args:
        inputs: files, folders and patterns.
        recursive: search the sub-folders, too.

    Raises:
        InputError: an input names nothing.
    """
    found: dict[Path, Path] = {}
    passed_over: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in (path.rglob("*") if recursive else path.iterdir()) if p.is_file())
            images = [file for file in files if is_image(file)]
            passed_over += [file for file in files if not is_image(file) and not file.name.startswith(".")]
            if not images:
                depth = "" if recursive else " directly in it (its sub-folders are searched with --recursive)"
                raise InputError(f"{path}: the folder has no image{depth}")
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
    return FoundImages(list(found.values()), passed_over)


@dataclass(frozen=True)
class ImageOutputs:
    """The outputs of `predict_files`.

    Attributes:
        folder: of the drawings, named by `output_names`, and of the results, named by `formats.FORMATS`.
        results: another file for the results in `coco`, or for JSON lines if it ends in .jsonl.
        draw: write drawings.
        formats: of the results, see `hpetr.poses.formats`.
    """

    folder: Path
    results: Path | None = None
    draw: bool = True
    formats: Sequence[str] = (COCO,)

    @property
    def journal(self) -> Path | None:
        """File of the results while the run lasts; None if only a stream is written."""
        if self.results is None or is_stream(self.results):
            name = Path(FORMATS[COCO][0]).with_suffix(SUFFIX)
            return self.folder / name if self.uses_folder else None
        return self.results.with_suffix(SUFFIX)

    @property
    def uses_folder(self) -> bool:
        """Whether anything is written into the folder."""
        return self.draw or self.results is None or len(self.formats) > 1

    def place(self, name: str) -> Path:
        """Return the file or folder of a format."""
        return self.results if name == COCO and self.results is not None else self.folder / FORMATS[name][0]

    def check(self, images: Sequence[Path], inputs: Sequence[str | Path] = (), *, resume: bool = False) -> None:
        """Check before any work that the outputs can be written and that none of them is an input.

        Args:
            images: those to predict.
            inputs: other files that the command reads.
            resume: labels may be there from the run that goes on.

        Raises:
            InputError: an output cannot be written or is an input, or see `check_formats`.
        """
        check_formats([name for name in self.formats if not (resume and name in LABELS)], images, self.folder)
        sources = [*images, *inputs]
        if self.results is not None:
            if COCO not in self.formats:
                raise InputError(
                    f"--json {self.results}: is for the format coco, expected --format coco among the others"
                )
            check_output(self.results, sources, RESULT_SUFFIXES)
        if self.uses_folder:
            check_writable(self.folder)
        for place in (self.place(name) for name in self.formats if name not in LABELS):
            check_output(place, sources)
        if self.draw:
            taken = {source.resolve() for source in map(Path, sources)}
            for name in output_names(images):
                if (self.folder / name).resolve() in taken:
                    raise InputError(f"{self.folder / name}: is one of the images, expected another output folder")


@dataclass
class PredictionRun:
    """The outcome of `predict_files`.

    Attributes:
        images: number of images given.
        people: number of poses in all images.
        unreadable: images that could not be read, and the reasons.
        written: the file or folder of each format.
        resumed: number of images that an earlier run had done.
        kept: files of earlier results of other images, under their new names.
        hidden: highest score of a keypoint, if no keypoint of any pose counts as found; else None.
    """

    images: int
    people: int = 0
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    resumed: int = 0
    kept: list[Path] = field(default_factory=list)
    hidden: float | None = None


def predict_files(
    predictor: Predictor,
    images: Sequence[Path],
    outputs: ImageOutputs,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    resume: bool = False,
    model: str = "",
) -> PredictionRun:
    """Predict every image, write the drawings and the results. An image that cannot be read does not stop the rest.

    Args:
        predictor: the model.
        images: see `find_images`.
        outputs: what is written, and where.
        batch_size: see `Predictor`.
        progress: called with the number of images after each batch.
        resume: go on after the images that a stopped run has done.
        model: name of the model, which a run that goes on has to share.

    Raises:
        InputError: no image can be read, an output cannot be written, or there is a stopped run's journal and `resume`
            is false.
    """
    run = PredictionRun(len(images))
    names = dict(zip(images, output_names(images), strict=True))
    settings = {
        "model": model,
        "threshold": predictor.threshold,
        "keypoint_threshold": predictor.keypoint_threshold,
        "draw": outputs.draw,
    }
    journal = Journal(outputs.journal, settings, predictor.skeleton, resume=resume)
    done = journal.results.keys() | journal.unreadable.keys()
    left = [image for image in images if str(image) not in done]
    run.resumed = len(images) - len(left)
    size = predictor.default_batch_size if batch_size is None else batch_size
    is_finished = False
    try:
        if progress is not None and run.resumed:
            progress(run.resumed)
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            loaded = _load(batch, journal)
            found = predictor.predict(list(loaded.values())) if loaded else []
            for (path, image), result in zip(loaded.items(), found, strict=True):
                if outputs.draw:
                    drawing = outputs.folder / names[path]
                    write_bytes(drawing, encode_image(result.draw(image), drawing.suffix))
                journal.add(replace(result, path=path))
            if progress is not None:
                progress(len(batch))
        _write_results(predictor, images, outputs, journal, run, resume=resume)
        is_finished = True
    finally:
        journal.close(remove=is_finished or not (journal.results or journal.unreadable))
    return run


def _load(images: Sequence[Path], journal: Journal) -> dict[Path, np.ndarray]:
    loaded = {}
    for path in images:
        try:
            loaded[path] = load_image(path)
        except InputError as error:
            journal.add_unreadable(path, str(error))
    return loaded


def _write_results(
    predictor: Predictor,
    images: Sequence[Path],
    outputs: ImageOutputs,
    journal: Journal,
    run: PredictionRun,
    *,
    resume: bool,
) -> None:
    """Write the results in the order of the images, and complete `run`."""
    run.unreadable = [(path, journal.unreadable[str(path)]) for path in images if str(path) in journal.unreadable]
    results = [journal.results[str(path)] for path in images if str(path) in journal.results]
    if not results:
        journal.unreadable.clear()  # nothing to go on with
        more = f" (and none of the other {len(images) - 1} images)" if len(images) > 1 else ""
        raise InputError(f"{run.unreadable[0][1]}{more}")
    run.people = sum(map(len, results))
    if run.people and not any(result.found.any() for result in results):
        run.hidden = max(float(result.keypoint_scores.max(initial=0)) for result in results)
    for name in outputs.formats:
        place = outputs.place(name)
        if resume and name in LABELS and place.exists():  # whole already: it appears at once
            run.written.append(place)
            continue
        if name == COCO and place != outputs.results and (kept := _keep_other_results(place, images)):
            run.kept.append(kept)
        if name == COCO and place.suffix.lower() == ".jsonl":
            lines = [result.to_json() for result in results]
            lines += [json.dumps({"file_name": str(path), "unreadable": reason}) for path, reason in run.unreadable]
            write_bytes(place, "".join(f"{line}\n" for line in lines).encode())
        else:
            write_format(name, results, predictor.class_names, outputs.folder, run.unreadable, place)
        run.written.append(place)


def is_complete(outputs: ImageOutputs, images: Sequence[Path]) -> bool:
    """Return whether an earlier run has written the results of all images."""
    journal = outputs.journal
    return (journal is None or not journal.exists()) and {str(path) for path in images} <= _images_in(
        outputs.place(COCO)
    )


def _images_in(path: Path) -> set[str]:
    """Return the images of a results file, none of a file of another form."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if path.is_file():
            content = json.loads(path.read_bytes())
            return {image["file_name"] for image in [*content["images"], *content["unreadable"]]}
    return set()


def _keep_other_results(path: Path, images: Sequence[Path]) -> Path | None:
    """Rename a results file of other images, whose drawings may be in the folder, and return its new name."""
    earlier = _images_in(path)
    if not path.is_file() or is_stream(path) or (earlier and earlier <= {str(image) for image in images}):
        return None
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(kept)
