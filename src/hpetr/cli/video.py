"""What `hpetr predict` does and says for videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hpetr.video.run import Progress, VideoOptions, VideoReport, predict_videos

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

    from hpetr.poses.predictor import Predictor

INTERRUPTED = 130
# Of a path only the end stands before the bar, so that all of it fits into 80 columns.
NAME_LENGTH = 24


def predict_and_report(
    predictor: Predictor, videos: list[str], output: Path, results: Path | None, options: VideoOptions
) -> None:
    """Predict videos with a bar, say what became of each, and end with code 130 after Ctrl-C or SIGTERM."""
    with _VideoBar() as bar:
        run = predict_videos(predictor, videos, output, results, options, bar)
    for report in run.videos:
        _print_report(report)
    for _, reason in run.unreadable:
        typer.echo(f"warning: {reason}", err=True)
    if run.unreadable:
        typer.echo(f"{len(run.unreadable)} of {len(videos)} videos could not be read", err=True)
    if any(report.frames for report in run.videos):
        typer.echo(f"results: {run.results}")
    if run.interrupted:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED)


def _print_report(report: VideoReport) -> None:
    written = "" if report.drawing is None else f", {report.frames} drawn"
    tracks = "" if report.tracks is None else f", {report.tracks} tracks"
    rate = report.frames / report.seconds if report.seconds else 0
    typer.echo(
        f"{report.name}: {_frames(report.frames)} in{written}, {report.people} poses{tracks}, {rate:.1f} frames/s"
    )
    if report.drawing is not None:
        typer.echo(f"drawing: {report.drawing}")
    name = report.name
    if report.dropped:
        typer.echo(f"{name}: {_frames(report.dropped)} dropped to keep up with the live source", err=True)
    for codec in report.sound_left_out:
        typer.echo(f"warning: {name}: its sound ({codec}) does not go into {report.drawing}", err=True)
    if report.undecodable:
        typer.echo(f"warning: {name}: {_frames(report.undecodable)} could not be decoded, left out", err=True)
    if report.damaged:
        typer.echo(f"warning: {name}: {_frames(report.damaged)} damaged", err=True)
    if report.interrupted:
        return
    if report.fault is not None:
        typer.echo(f"warning: {name}: ended early ({report.fault})", err=True)
    if report.expected is not None and report.expected > report.frames + report.undecodable + report.dropped:
        typer.echo(f"warning: {name}: announces {_frames(report.expected)}, {report.frames} could be read", err=True)


def _frames(number: int) -> str:
    return f"{number} frame{'' if number == 1 else 's'}"


class _VideoBar(Progress):
    """A bar with frames per second on stderr, where that is a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console
        from rich.text import Text

        class Speed(progress.ProgressColumn):
            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{speed:.1f} frames/s")

        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            Speed(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: progress.TaskID | None = None

    def __enter__(self) -> _VideoBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, name: str, expected: int | None) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        shown = name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"
        self._task = self._bar.add_task(shown.replace("[", r"\["), total=expected)

    def advance(self, frames: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, frames)
