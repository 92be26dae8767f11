"""Predict the poses of a video frame by frame."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.video.decoding import FrameQueue
from hpetr.video.open import open_source
from hpetr.video.source import Frame, Source

logger = logging.getLogger(__name__)


def predict_frames(
    predictor: Predictor,
    source: str | os.PathLike[str] | int | Source,
    threshold: float | None = None,
    batch_size: int | None = None,
    live: bool | None = None,
) -> Iterator[tuple[Frame, PoseResult]]:
    """Yield each frame of a video, camera or stream with its poses.

    Frames are decoded in a thread while the network runs. Closing the generator, or leaving a loop over it, closes the
    source. Lost frames are logged as warnings at the end.

    Args:
        source: a file, a URL, a camera's number, or an opened source.
        threshold: minimum score of a pose, exclusive; None takes the predictor's own.
        batch_size: maximum number of frames in a forward pass; None takes the predictor's own.
        live: drop frames to keep up; None does so for cameras, broadcasts and streams without a length.

    Raises:
        InputError: the source cannot be opened or has no frame.
    """
    if not isinstance(source, Source):
        text = os.fspath(source) if isinstance(source, str | os.PathLike) else str(source)
        source = open_source(text, live, sound=False)
    size = batch_size or predictor.default_batch_size
    count = 0
    with FrameQueue(source, size if source.live else 2 * size) as frames:
        while batch := frames.take(size):
            results = predictor.predict([frame.image for frame in batch], threshold)
            count += len(batch)
            yield from zip(batch, results, strict=True)
    if not count:
        raise source.no_frame()
    for loss in source.losses(count):
        logger.warning("%s: %s", source.name, loss)
