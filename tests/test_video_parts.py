"""The parts of video prediction: frames decoded ahead, inputs told apart, names of outputs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hpetr import InputError
from hpetr.video.decoding import FrameQueue
from hpetr.video.naming import output_stem, public_name, split_inputs
from hpetr.video.source import Frame, Source


class Counting(Source):
    """Frames that only have a number and a packet's stand-in each."""

    def __init__(self, count: int, live: bool, error: Exception | None = None) -> None:
        super().__init__("counting", live, Fraction(1, 25), None)
        self.count, self.error = count, error
        self.given, self.closed = threading.Event(), threading.Event()

    def frames(self) -> Iterator[Frame]:
        for number in range(self.count):
            yield Frame(number, Fraction(number, 25), Fraction(0), np.zeros((1, 1, 3), np.uint8), [number])
        self.given.set()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed.set()


def take_all(frames: FrameQueue, count: int) -> list[Frame]:
    taken: list[Frame] = []
    while batch := frames.take(count, lambda: False):
        taken += batch
    return taken


def test_queue_of_a_file_gives_whole_batches_and_loses_nothing() -> None:
    source = Counting(100, live=False)
    frames = FrameQueue(source, capacity=8)
    assert [frame.index for frame in frames.take(7, lambda: False)] == list(range(7))
    assert [frame.index for frame in take_all(frames, 8)] == list(range(7, 100))
    assert frames.dropped == 0
    frames.close()
    assert source.closed.wait(5)


def test_queue_of_a_live_source_keeps_the_newest_and_all_sound() -> None:
    source = Counting(100, live=True)
    frames = FrameQueue(source, capacity=3)
    assert source.given.wait(5)
    taken = take_all(frames, 2)
    assert [frame.index for frame in taken] == [97, 98, 99]
    assert frames.dropped == 97
    assert [packet for frame in taken for packet in frame.sound] == list(range(100))
    frames.close()


def test_queue_gives_the_frames_before_an_error_and_then_the_error() -> None:
    frames = FrameQueue(Counting(5, live=False, error=InputError("cut")), capacity=8)
    assert len(frames.take(8, lambda: False)) == 5
    with pytest.raises(InputError, match="cut"):
        frames.take(8, lambda: False)
    frames.close()


def test_closing_a_queue_ends_a_thread_that_waits_for_room() -> None:
    source = Counting(100, live=False)
    FrameQueue(source, capacity=2).close()
    assert source.closed.wait(5)


def test_inputs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.jpg", "both/c.MOV", "both/d.png", "videos/e.webm", "1"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    inputs = ["0", "1", "rtsp://host/x", "a.mp4", "b.jpg", "both", "videos", "*.*", "a.mp4"]
    videos, rest = split_inputs(inputs)
    assert videos == ["0", "rtsp://host/x", "a.mp4", str(Path("both/c.MOV")), str(Path("videos/e.webm"))]
    assert rest == ["1", "b.jpg", "both", "b.jpg"]
    with pytest.raises(InputError, match=r"gone\.mp4: no such file"):
        split_inputs(["gone.mp4"])


def test_names_of_outputs() -> None:
    assert output_stem("x/clip.mp4", []) == "clip"
    assert output_stem("y/Clip.mov", ["clip"]) == "Clip_2"
    assert output_stem("07", []) == "camera-7"
    assert output_stem("rtsp://u:p@10.0.0.7:554/hall/cam%201?x=1", []) == "cam-201"
    assert output_stem("udp://239.0.0.1:1234", []) == "239.0.0.1"
    assert public_name("rtsp://u:p@10.0.0.7/a@b") == "rtsp://10.0.0.7/a@b"
