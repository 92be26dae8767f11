"""Predict the poses of videos, and write them as drawings and JSON lines."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpetr.errors import InputError, needs_extra
from hpetr.images.files import RESULT_SUFFIXES, check_output, check_writable
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.video.decoding import FrameQueue
from hpetr.video.json_lines import JsonLines
from hpetr.video.naming import DRAWING_SUFFIXES, RESULTS_NAME, output_stem
from hpetr.video.open import open_source
from hpetr.video.source import Frame, Source
from hpetr.video.tracking import UNTRACKED, PoseSmoother, PoseTracker

if TYPE_CHECKING:
    from hpetr.video.sink import VideoSink

# While tracking, poses down to this share of the threshold may continue a track.
DOUBTFUL_SHARE = 0.5


@dataclass
class VideoReport:
    """Outcome of one video.

    Attributes:
        name: the file, camera or URL (without a password).
        frames: number of frames predicted, in the results and in the drawing.
        people: number of poses in all frames.
        tracks: number of different people, None without tracking.
        seconds: from the first frame to the finished files.
        drawing: the video with the poses, None if not written.
        sound_left_out: codecs of the sound tracks that the drawing's container does not take.
        dropped, undecodable, damaged, expected, fault: see `Source`.
        interrupted: ended by Ctrl-C or SIGTERM.
    """

    name: str
    frames: int = 0
    people: int = 0
    tracks: int | None = None
    seconds: float = 0.0
    drawing: Path | None = None
    sound_left_out: list[str] = field(default_factory=list)
    dropped: int = 0
    undecodable: int = 0
    damaged: int = 0
    expected: int | None = None
    fault: str | None = None
    interrupted: bool = False


@dataclass
class VideoRun:
    """Outcome of all videos.

    Attributes:
        results: file of the JSON lines.
        videos: reports in order, up to the interrupted one.
        unreadable: videos that gave no frame, and the reasons.
        kept: new name of a results file with other videos, None if there was none.
    """

    results: Path
    videos: list[VideoReport] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    kept: Path | None = None

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM ended it."""
        return any(video.interrupted for video in self.videos)


@dataclass(frozen=True)
class VideoOptions:
    """Options of `predict_videos`.

    Attributes:
        draw: write videos with the poses.
        batch_size: maximum number of frames in a forward pass; None takes the predictor's own.
        track: give people numbers.
        smooth: reduce the jitter of keypoints; implies `track`.
        live: drop frames to keep up; None does so as `open_source` says.
    """

    draw: bool = True
    batch_size: int | None = None
    track: bool = False
    smooth: bool = False
    live: bool | None = None


class Progress:
    """Receiver of the progress of `predict_videos`; this one ignores it."""

    def start(self, name: str, expected: int | None) -> None:
        """Begin a video of the expected number of frames, None if unknown."""

    def advance(self, frames: int) -> None:
        """Count finished frames."""


def predict_videos(
    predictor: Predictor,
    videos: Sequence[str],
    output: Path,
    results: Path | None = None,
    options: VideoOptions | None = None,
    progress: Progress | None = None,
) -> VideoRun:
    """Predict every frame of videos, cameras and streams; an unreadable video does not stop the others.

    The results have a line for each frame: `video`, `frame` (number from 0), `time` (seconds from the start of the
    video), `width`, `height` and `poses`, each with `category_id`, `keypoints` (x, y, score), `bbox`, `score` and, when
    tracking, `track_id` (from 1).

    Ctrl-C or SIGTERM, in the main thread, finishes the frames so far and both files; a second one ends at once. Files
    get their names when they are complete.

    Args:
        videos: files, cameras' numbers and URLs; see `split_inputs`.
        output: folder for the drawings.
        results: file for the JSON lines; None writes `predictions.jsonl` into `output`.

    Raises:
        InputError: no video gives a frame, or an output cannot be written.
    """
    options, progress = options or VideoOptions(), progress or Progress()
    check_video_outputs(videos, output, results, options.draw)
    run = VideoRun(output / RESULTS_NAME if results is None else results)
    lines = JsonLines(run.results)
    stems: list[str] = []
    with _interruption() as interruption:
        try:
            for video in videos:
                stems.append(output_stem(video, stems))
                try:
                    source = open_source(video, options.live, sound=options.draw)
                except InputError as error:
                    run.unreadable.append((video, str(error)))
                    continue
                work = _VideoWork(predictor, source, lines, output / stems[-1], video, options)
                report = work.run(interruption, progress)
                if report.frames or report.interrupted:
                    run.videos.append(report)
                else:
                    run.unreadable.append((video, str(source.no_frame())))
                if report.interrupted:
                    break
            if not run.videos:
                more = f" (and none of the other {len(videos) - 1} videos)" if len(videos) > 1 else ""
                raise InputError(f"{run.unreadable[0][1]}{more}")
        except BaseException:
            lines.close() if run.videos else lines.discard()  # the videos before this one are complete
            raise
        if results is None:
            run.kept = _keep_other_results(run.results, {report.name for report in run.videos})
        lines.close()
    return run


def _keep_other_results(path: Path, videos: set[str]) -> Path | None:
    """Rename a results file of other videos, whose drawings may be in the folder, and return its new name."""
    if not path.is_file():
        return None
    with suppress(OSError, ValueError, KeyError, TypeError), path.open(encoding="utf-8") as file:
        if {json.loads(line)["video"] for line in file} <= videos:
            return None
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(kept)


class _VideoWork:
    """One video; decoding, network, and tracking with writing run side by side, each in a thread."""

    def __init__(
        self, predictor: Predictor, source: Source, lines: JsonLines, target: Path, video: str, options: VideoOptions
    ) -> None:
        self._predictor, self._source, self._lines = predictor, source, lines
        self._target, self._video, self._options = target, video, options
        is_tracked = options.track or options.smooth
        self._tracker = PoseTracker(predictor.skeleton.sigmas, predictor.threshold) if is_tracked else None
        self._smoother = PoseSmoother() if options.smooth else None
        self._sink: VideoSink | None = None
        self._report = VideoReport(source.name)

    def run(self, interruption: threading.Event, progress: Progress) -> VideoReport:
        """Predict all frames, or those until the interruption, and finish the drawing."""
        start = time.monotonic()
        source, predictor = self._source, self._predictor
        size = self._options.batch_size or predictor.default_batch_size
        threshold = predictor.threshold * (DOUBTFUL_SHARE if self._tracker else 1)
        progress.start(source.name, source.expected)
        try:
            with FrameQueue(source, size if source.live else 2 * size) as frames:
                with ThreadPoolExecutor(1, thread_name_prefix="writing") as writer:
                    written = writer.submit(lambda: None)
                    while batch := frames.take(size, interruption.is_set):
                        found = predictor.predict([frame.image for frame in batch], threshold)
                        written.result()
                        written = writer.submit(self._write, batch, found)
                        progress.advance(len(batch))
                    written.result()
                if self._sink is not None:
                    self._sink.close(() if interruption.is_set() else source.late_sound)
        except BaseException:
            if self._sink is not None:
                self._sink.discard()
            raise
        report = self._report
        if self._sink is not None:
            report.drawing, report.sound_left_out = self._sink.path, self._sink.sound_left_out
        report.tracks = None if self._tracker is None else self._tracker.count
        for name in ("dropped", "undecodable", "damaged", "expected", "fault"):
            setattr(report, name, getattr(source, name))
        report.interrupted = interruption.is_set()
        report.seconds = time.monotonic() - start
        return report

    def _write(self, batch: list[Frame], found: list[PoseResult]) -> None:
        for frame, result in zip(batch, found, strict=True):
            numbers = None
            if self._tracker is not None:
                numbers = self._tracker.update(result, float(frame.time))
                known = numbers != UNTRACKED
                result, numbers = result[known], numbers[known]
                if self._smoother is not None:
                    result = self._smoother.update(result, numbers, float(frame.time))
            if self._options.draw:
                if self._sink is None:
                    self._sink = self._open_sink(frame)
                self._sink.write(frame, result.draw(frame.image, track_ids=numbers))
            self._lines.write(self._line(frame, result, numbers))
            self._report.frames += 1
            self._report.people += len(result)

    def _open_sink(self, first: Frame) -> VideoSink:
        with needs_extra("video", self._source.name):
            from hpetr.video.sink import VideoSink, video_suffix
        path = self._target.with_name(self._target.name + video_suffix(self._video, self._source))
        return VideoSink(path, self._source, first)

    def _line(self, frame: Frame, result: PoseResult, numbers: np.ndarray | None) -> dict[str, Any]:
        found = result.to_dict()
        del found["file_name"]
        if numbers is not None:
            for pose, number in zip(found["poses"], numbers.tolist(), strict=True):
                pose["track_id"] = number
        return {"video": self._source.name, "frame": frame.index, "time": round(float(frame.time), 6), **found}


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; a second one acts as usual.

    Ignored signals stay ignored, and only the main thread can receive any.
    """
    event = threading.Event()
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def interrupt(*_: object) -> None:
        event.set()
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, interrupt)
    try:
        yield event
    finally:
        restore()


def check_video_outputs(
    videos: Sequence[str], output: Path, results: Path | None, draw: bool, inputs: Iterable[str | Path] = ()
) -> None:
    """Check before any work that the outputs can be written and replace no input.

    Args:
        videos, output, results: see `predict_videos`.
        inputs: other files that the command reads.

    Raises:
        InputError: an output is an input, cannot be written or is no file, or the folder for the drawings holds one of
            the videos.
    """
    inputs = [*videos, *inputs]
    check_output(results or output / RESULTS_NAME, inputs, RESULT_SUFFIXES)
    if not draw:
        return
    check_writable(output)
    stems: list[str] = []
    for video in videos:
        if Path(video).is_file() and Path(video).resolve().parent == output.resolve():
            raise InputError(f"{output}: holds the video {Path(video).name}, expected another output folder")
        stems.append(output_stem(video, stems))
        for suffix in DRAWING_SUFFIXES:
            check_output(output / f"{stems[-1]}{suffix}", inputs)
