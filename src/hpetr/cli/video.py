"""The part of `hpetr predict` for videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hpetr.cli.output import count, say, warn
from hpetr.video.run import Progress, VideoOptions, VideoReport, predict_videos

if TYPE_CHECKING:
    from hpetr.poses.predictor import Predictor

INTERRUPTED = 130
# The end of a path stands before the bar, so that all of it fits into 80 columns.
NAME_LENGTH = 24


def predict_and_report(
    predictor: Predictor, videos: list[str], output: Path, results: Path | None, options: VideoOptions
) -> None:
    """Predict videos with a bar, print a report of each, and end with code 130 after Ctrl-C or SIGTERM."""
    bar = _VideoBar()
    with bar.bar:
        run = predict_videos(predictor, videos, output, results, options, bar)
    for report in run.videos:
        _print_report(report)
    for _, reason in run.unreadable:
        warn(reason)
    if run.unreadable:
        typer.echo(f"{len(run.unreadable)} of {len(videos)} videos could not be read", err=True)
    if run.kept is not None:
        say(f"earlier results of other videos: {run.kept}")
    if any(report.frames for report in run.videos):
        say(f"results: {run.results}")
    if run.interrupted:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED)


def _print_report(report: VideoReport) -> None:
    name, read = report.name, report.frames
    written = "" if report.drawing is None else f", {read} drawn"
    tracks = "" if report.tracks is None else f", {report.tracks} tracks"
    rate = read / report.seconds if report.seconds else 0
    say(f"{name}: {_frames(read)} in{written}, {report.people} poses{tracks}, {rate:.1f} frames/s")
    if report.drawing is not None:
        say(f"drawing: {report.drawing}")
    if report.dropped:
        typer.echo(f"{name}: {_frames(report.dropped)} dropped to keep up with the live source", err=True)
    for codec in report.sound_left_out:
        warn(f"{name}: its sound ({codec}) does not go into {report.drawing}")
    if report.undecodable:
        warn(f"{name}: {_frames(report.undecodable)} could not be decoded, left out")
    if report.damaged:
        warn(f"{name}: {_frames(report.damaged)} damaged")
    if report.fault is not None and not report.interrupted:
        warn(f"{name}: ended early ({report.fault})")
    expected = 0 if report.expected is None or report.interrupted else report.expected
    if expected > read + report.undecodable + report.dropped:
        warn(f"{name}: announces {_frames(expected)}, {read} could be read")


def _frames(number: int) -> str:
    return count(number, "frame", "frames")


class _VideoBar(Progress):
    """A bar with frames per second on stderr, if that is a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: progress.TaskID | None = None

    def start(self, name: str, expected: int | None) -> None:
        if self._task is not None:
            self.bar.remove_task(self._task)
        shown = name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"
        self._task = self.bar.add_task(shown.replace("[", r"\["), total=expected, rate="")

    def advance(self, frames: int) -> None:
        if self._task is not None:
            speed = self.bar.tasks[0].speed
            self.bar.update(self._task, advance=frames, rate="" if speed is None else f"{speed:.1f} frames/s")
