"""The parts of video prediction: frames decoded ahead, videos among the inputs, names of outputs."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from clips import HEIGHT, WIDTH, make_clip, read_number
from hpetr import InputError
from hpetr.poses.skeleton import COCO
from hpetr.video import file_source
from hpetr.video.decoding import FrameQueue
from hpetr.video.naming import output_stem, public_name, split_inputs
from hpetr.video.open import open_source
from hpetr.video.source import Frame, Source
from hpetr.video.tracking import PoseTracker


class Counting(Source):
    """Frames that only have a number, and the same number in place of a sound packet."""

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
    while batch := frames.take(count):
        taken += batch
    return taken


def test_queue_of_a_file_gives_full_batches_and_loses_nothing() -> None:
    source = Counting(100, live=False)
    with FrameQueue(source, capacity=8) as frames:
        assert [frame.index for frame in frames.take(7)] == list(range(7))
        assert [frame.index for frame in take_all(frames, 8)] == list(range(7, 100))
        assert source.dropped == 0
        assert not source.closed.is_set()
    assert source.closed.wait(600)


def test_queue_of_a_live_source_keeps_the_newest_and_all_sound() -> None:
    source = Counting(100, live=True)
    with FrameQueue(source, capacity=3) as frames:
        assert source.given.wait(600)
        taken = take_all(frames, 2)
    assert [frame.index for frame in taken] == [97, 98, 99]
    assert source.dropped == 97
    assert [packet for frame in taken for packet in frame.sound] == list(range(100))


def test_queue_gives_the_frames_before_an_error_and_then_the_error() -> None:
    with FrameQueue(Counting(5, live=False, error=InputError("cut")), capacity=8) as frames:
        assert len(frames.take(8)) == 5
        with pytest.raises(InputError, match="cut"):
            frames.take(8)


def test_queue_ends_when_its_frames_are_unwanted() -> None:
    with FrameQueue(Counting(100, live=False), capacity=8) as frames:
        assert frames.take(8, lambda: True) == []


def test_closing_a_queue_ends_a_thread_that_waits_for_room() -> None:
    source = Counting(100, live=False)
    with FrameQueue(source, capacity=2):
        pass
    assert source.closed.wait(600)


@pytest.mark.parametrize(
    ("package", "use"),
    [("av", lambda: open_source("clip.mp4")), ("scipy.optimize", lambda: PoseTracker(COCO.sigmas, 0.3))],
)
def test_missing_package_is_one_line_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, use: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "hpetr.video.file_source")
    with pytest.raises(InputError, match=rf'{package} is missing, expected after pip install .* "\.\[video\]"'):
        use()


def test_videos_are_split_from_other_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_camera_gives_its_frames_with_the_times_of_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A camera unplugged after ten frames; OpenCV plays a file instead, as the machine of the tests has no camera."""
    clip, opened = make_clip(tmp_path / "clip.mp4", range(10)), []
    play = cv2.VideoCapture

    def capture(number: int) -> cv2.VideoCapture:
        opened.append(number)
        return play(str(clip))

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    camera = open_source("1")
    assert (opened, camera.name, camera.live, camera.rate) == ([1], "camera 1", True, 25)
    frames = list(camera.frames())
    camera.close()
    assert [frame.index for frame in frames] == [read_number(frame.image) for frame in frames] == list(range(10))
    assert {frame.image.shape for frame in frames} == {(HEIGHT, WIDTH, 3)}
    times = [frame.time for frame in frames]
    assert times == sorted(times)
    assert camera.fault == "it gives no more frames"


def test_camera_colors_are_not_exchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    red = np.full((32, 32, 3), (0, 0, 200), np.uint8)  # as OpenCV writes images, BGR
    cv2.imwrite(str(tmp_path / "red_0.png"), red)
    play = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: play(str(tmp_path / "red_%d.png")))
    camera = open_source("0")
    assert next(camera.frames()).image[0, 0].tolist() == [200, 0, 0]
    camera.close()


def test_silent_stream_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_source, "STREAM_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts the connection, no program answers
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot be read as a stream \(no data for 0.3 seconds\)"):
            open_source(address)


def test_stream_that_falls_silent_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_source, "STREAM_TIMEOUT", 3.0)  # also for opening, on a busy machine
    data = make_clip(tmp_path / "live.ts", range(300)).read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"

        def send() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(data)
                heard.wait(60)

        heard = threading.Event()
        sender = threading.Thread(target=send)
        sender.start()
        stream = open_source(address)
        frames = list(stream.frames())
        heard.set()
        sender.join()
        stream.close()
    assert [read_number(frame.image) for frame in frames] == list(range(len(frames)))
    assert len(frames) > 290
    assert stream.fault == "no data for 3 seconds"
