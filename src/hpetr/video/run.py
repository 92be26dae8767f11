"""Poses of videos: frames in, drawings and JSON lines out, none lost on the way."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hpetr.errors import InputError
from hpetr.images.files import check_writable
from hpetr.poses.draw import draw_poses
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.video.decoding import FrameQueue
from hpetr.video.naming import RESULTS_NAME, output_stem
from hpetr.video.sink import JsonLines, VideoSink, video_suffix
from hpetr.video.source import Frame, Source, open_source
from hpetr.video.tracking import UNTRACKED, PoseSmoother, PoseTracker

# While tracking, poses down to this share of the threshold may continue a track.
DOUBTFUL_SHARE = 0.5


@dataclass
class VideoReport:
    """What became of a video.

    Attributes:
        name: the file, camera or URL (without a password in it).
        frames: frames that were predicted on; as many are in the results and in the drawing.
        people: poses in all frames.
        tracks: different people, None without tracking.
        seconds: from the first frame to the finished files.
        drawing: the video with the poses, None where none was asked for.
        sound_left_out: codecs of the sound tracks that the drawing's container does not take.
        dropped: frames of a live source that were left out to keep up.
        undecodable: packets that gave no frame.
        damaged: frames of which the decoder had to guess a part.
        expected: frames that the file announces, None where it does not.
        fault: why reading ended early, None where it did not.
        interrupted: Ctrl-C or SIGTERM ended it.
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
    """What became of all videos.

    Attributes:
        results: the JSON lines.
        videos: one report each, in order, up to the one that was interrupted.
        unreadable: videos that gave no frame, and why.
    """

    results: Path
    videos: list[VideoReport] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Ctrl-C or SIGTERM ended it."""
        return any(video.interrupted for video in self.videos)


@dataclass(frozen=True)
class VideoOptions:
    """How videos are predicted.

    Attributes:
        draw: write videos with the poses.
        batch_size: frames that go through the network together; None takes the predictor's own.
        track: give people numbers.
        smooth: take the jitter from tracked keypoints; tracks, too.
        live: drop frames rather than to fall behind; None: what `open_source` finds.
    """

    draw: bool = True
    batch_size: int | None = None
    track: bool = False
    smooth: bool = False
    live: bool | None = None


class Progress:
    """What `predict_videos` tells while it works; does nothing itself."""

    def start(self, name: str, expected: int | None) -> None:
        """A video begins that announces so many frames, None where it does not."""

    def advance(self, frames: int) -> None:
        """So many more frames are done."""


def predict_videos(
    predictor: Predictor,
    videos: Sequence[str],
    output: Path,
    results: Path | None = None,
    options: VideoOptions | None = None,
    progress: Progress | None = None,
) -> VideoRun:
    """Predict every frame of videos, cameras and streams; a video that cannot be read does not stop the rest.

    The results have a line for each frame: `video`, `frame` (its number, from 0), `time` (seconds from the start of the
    video), `width`, `height` and `poses`, each with `category_id`, `keypoints` (x, y, score), `bbox`, `score` and, when
    tracking, `track_id` (from 1).

    On Ctrl-C or SIGTERM, in the main thread, the frames so far are finished and both files get their names; a second
    one ends at once. Nothing has its name before it is whole.

    Args:
        videos: files, cameras' numbers and URLs; see `split_inputs`.
        output: folder for the drawings.
        results: the JSON lines; None puts `predictions.jsonl` into `output`.

    Raises:
        InputError: no video gives a frame, or an output cannot be written.
    """
    options = options or VideoOptions()
    check_video_outputs(videos, output, results, options.draw)
    run = VideoRun(output / RESULTS_NAME if results is None else results)
    lines = JsonLines(run.results)
    taken: set[str] = set()
    with _Interruption() as interruption, ExitStack() as on_failure:
        on_failure.callback(lines.discard)
        for video in videos:
            stem = output_stem(video, taken)
            taken.add(stem)
            try:
                source = open_source(video, options.live, sound=options.draw)
            except InputError as error:
                run.unreadable.append((video, str(error)))
                continue
            work = _VideoWork(predictor, source, lines, output / stem, video, options)
            try:
                report = work.run(interruption, progress or Progress())
            except BaseException:
                on_failure.pop_all()
                lines.close() if run.videos else lines.discard()  # the videos before this one are whole
                raise
            if report.frames:
                run.videos.append(report)
            elif interruption.asked:
                report.drawing = None
                run.videos.append(report)
            else:
                reason = f"{report.name}: has no frame that can be read"
                run.unreadable.append((video, f"{reason} ({report.fault})" if report.fault else reason))
            if interruption.asked:
                break
        if not run.videos:
            more = f" (and none of the other {len(videos) - 1} videos)" if len(videos) > 1 else ""
            raise InputError(f"{run.unreadable[0][1]}{more}")
        lines.close()
        on_failure.pop_all()
    return run


class _VideoWork:
    """One video on its way: decoding, the network, and tracking with writing run side by side, each in a thread."""

    def __init__(
        self,
        predictor: Predictor,
        source: Source,
        lines: JsonLines,
        target: Path,
        video: str,
        options: VideoOptions,
    ) -> None:
        self._predictor, self._source, self._lines = predictor, source, lines
        self._target, self._video, self._options = target, video, options
        self._threshold = predictor.threshold
        self._tracker: PoseTracker | None = None
        if options.track or options.smooth:
            sigmas = predictor.skeleton.sigmas
            self._tracker = PoseTracker(sigmas, self._threshold)
        self._smoother = PoseSmoother() if options.smooth else None
        self._sink: VideoSink | None = None
        self.report = VideoReport(source.name)

    def run(self, interruption: _Interruption, progress: Progress) -> VideoReport:
        """Do all frames, or those until the interruption, and finish the drawing."""
        start = time.monotonic()
        size = self._options.batch_size or self._predictor.default_batch_size
        frames = FrameQueue(self._source, size if self._source.live else 2 * size)
        progress.start(self._source.name, self._source.expected)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="writing") as writer:
                written: Future[None] | None = None
                while batch := frames.take(size, interruption.is_asked):
                    found = self._predict(batch)
                    if written is not None:
                        written.result()
                    written = writer.submit(self._write, batch, found)
                    progress.advance(len(batch))
                if written is not None:
                    written.result()
            self._finish(frames, interruption.asked)
        except BaseException:
            if self._sink is not None:
                self._sink.discard()
            raise
        finally:
            frames.close()
        self.report.seconds = time.monotonic() - start
        return self.report

    def _predict(self, batch: list[Frame]) -> list[PoseResult]:
        threshold = self._threshold * (DOUBTFUL_SHARE if self._tracker else 1)
        return self._predictor.predict([frame.image for frame in batch], threshold)

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
                self._sink.write(frame, draw_poses(frame.image, result, track_ids=numbers))
            self._lines.write(self._line(frame, result, numbers))
            self.report.frames += 1
            self.report.people += len(result)

    def _open_sink(self, first: Frame) -> VideoSink:
        path = self._target.with_name(self._target.name + video_suffix(self._video, self._source))
        return VideoSink(path, self._source, first)

    def _line(self, frame: Frame, result: PoseResult, numbers: Any) -> dict[str, Any]:
        height, width = result.image_size
        poses = result.to_coco(0, range(1, int(result.labels.max(initial=0)) + 2))
        for place, pose in enumerate(poses):
            del pose["image_id"]
            if numbers is not None:
                pose["track_id"] = int(numbers[place])
        return {
            "video": self._source.name,
            "frame": frame.index,
            "time": round(float(frame.time), 6),
            "width": width,
            "height": height,
            "poses": poses,
        }

    def _finish(self, frames: FrameQueue, interrupted: bool) -> None:
        source, report = self._source, self.report
        if self._sink is not None:
            self._sink.close(() if interrupted else source.late_sound)
            report.drawing, report.sound_left_out = self._sink.path, self._sink.sound_left_out
        report.tracks = None if self._tracker is None else self._tracker.count
        report.dropped, report.undecodable, report.damaged = frames.dropped, source.undecodable, source.damaged
        report.expected, report.fault, report.interrupted = source.expected, source.fault, interrupted


class _Interruption:
    """Ctrl-C and SIGTERM as a question that is asked between batches; a second one acts as usual. Only in the main
    thread, and not where they are ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def is_asked(self) -> bool:
        """Whether to stop."""
        return self.asked

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def check_video_outputs(videos: Sequence[str], output: Path, results: Path | None, draw: bool) -> None:
    """Prove before any work that the outputs can be written, and that no drawing lands among the videos.

    Raises:
        InputError: a folder cannot be used, or holds one of the videos.
    """
    if draw or results is None:
        check_writable(output)
    if results is not None:
        check_writable(results.parent)
        if results.is_dir():
            raise InputError(f"{results}: is a folder, expected a file for the results")
    if draw:
        for video in map(Path, videos):
            if video.is_file() and video.resolve().parent == output.resolve():
                raise InputError(f"{output}: holds the video {video.name}, expected another output folder")
