"""Where frames come from: files and streams through PyAV, cameras through OpenCV; upright RGB with their times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import cv2
import numpy as np
from av.error import ExitError, FFmpegError
from av.stream import Disposition

from hpetr.errors import InputError
from hpetr.video.naming import is_camera, is_url, public_name

# Protocols of cameras and broadcasts; http and https are live where the stream has no length.
LIVE_PROTOCOLS = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt"})
# Seconds without data after which a stream has failed, when it is opened and while it is read.
STREAM_TIMEOUT = 10.0
CAMERA_TIME_BASE = Fraction(1, 90_000)
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, and the same number for primaries and transfer


@dataclass
class Frame:
    """One frame of a source.

    Attributes:
        index: its number in the source, from 0; numbers that are missing were dropped.
        time: seconds from the start of the source.
        duration: seconds, 0 where the source does not say.
        image: (H, W, 3) uint8 RGB, upright.
        sound: packets of the sound tracks that lie before it in the file.
    """

    index: int
    time: Fraction
    duration: Fraction
    image: np.ndarray
    sound: list[av.Packet] = field(default_factory=list)


@dataclass(frozen=True)
class Colors:
    """How a video's numbers mean colors: FFmpeg's matrix, primaries and transfer; 2 where the video does not say."""

    matrix: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED


class Source:
    """What frames are read from. What is said of the video is known for sure after the first frame.

    Attributes:
        name: for messages and results, without passwords.
        live: it does not wait: who is too slow loses frames.
        time_base: seconds of which all times are multiples.
        rate: frames per second on average, None where it does not say.
        expected: frames it announces, None where it does not.
        pixel_aspect: width of a pixel of the upright frame to its height.
        colors: of the video; the frames are RGB.
        sound_tracks: streams whose packets come with the frames.
        late_sound: packets after the last frame, known at the end.
        undecodable: packets that gave no frame.
        damaged: frames of which the decoder had to guess a part.
        fault: why it ended early, None where it did not.
    """

    def __init__(self, name: str, live: bool, time_base: Fraction, rate: Fraction | None) -> None:
        self.name, self.live, self.time_base, self.rate = name, live, time_base, rate
        self.expected: int | None = None
        self.pixel_aspect = Fraction(1)
        self.colors = Colors()
        self.sound_tracks: list[Any] = []
        self.late_sound: list[av.Packet] = []
        self.undecodable = self.damaged = 0
        self.fault: str | None = None

    def frames(self) -> Iterator[Frame]:
        """All frames, in the order in which they are shown."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the file, connection or camera go."""
        raise NotImplementedError


def open_source(text: str, live: bool | None = None, sound: bool = True) -> Source:
    """A video file, a stream's URL, or a camera's number.

    Args:
        live: whether to drop frames rather than to fall behind; None: cameras, broadcasts and endless streams.
        sound: whether the sound tracks are wanted.

    Raises:
        InputError: there is no such thing, or it is no video; one line that says which.
    """
    return CameraSource(int(text)) if is_camera(text) else FileSource(text, live, sound)


class FileSource(Source):
    """A video file or a stream, decoded by FFmpeg. Attributes: see `Source`."""

    def __init__(self, text: str, live: bool | None = None, sound: bool = True) -> None:
        name = public_name(text)
        self._container = _open_container(text, name)
        # A cover image in a sound file looks like a video of one frame.
        videos = [v for v in self._container.streams.video if Disposition.attached_pic not in v.disposition]
        if not videos:
            self._container.close()
            raise InputError(f"{name}: has no video in it")
        self._video = max(videos, key=lambda video: video.width * video.height)
        if live is None:
            protocol = urlsplit(text).scheme.lower() if is_url(text) else ""
            live = protocol in LIVE_PROTOCOLS or (is_url(text) and self._container.duration is None)
        rate = self._video.average_rate or self._video.guessed_rate
        super().__init__(name, live, Fraction(self._video.time_base or CAMERA_TIME_BASE), rate)
        self.expected = self._video.frames or None
        self.pixel_aspect = Fraction(self._video.sample_aspect_ratio or 1)
        self.sound_tracks = list(self._container.streams.audio) if sound else []
        start = self._container.start_time
        self._start = None if start is None else Fraction(start, av.time_base)
        self._next_time = Fraction(0)

    def frames(self) -> Iterator[Frame]:
        sound: list[av.Packet] = []
        index = 0
        for packet in self._packets():
            if packet is not None and packet.stream is not self._video:
                if packet.dts is not None:  # the empty packet that ends a track has none
                    sound.append(self._shifted(packet))
                continue
            for decoded in self._decode(packet):
                yield self._frame(index, decoded, sound)
                index, sound = index + 1, []
        self.late_sound = sound

    def close(self) -> None:
        self._container.close()

    def _packets(self) -> Iterator[av.Packet | None]:
        """Packets of the video and the wanted sound; None in place of the rest that cannot be read."""
        try:
            yield from self._container.demux(self._video, *self.sound_tracks)
        except (FFmpegError, OSError) as error:
            self.fault = _reason(error)
            yield None

    def _decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            return self._video.codec_context.decode(packet)
        except (FFmpegError, OSError):
            self.undecodable += 1
            return []

    def _shifted(self, packet: av.Packet) -> av.Packet:
        """The packet with times from the start of the source."""
        base = Fraction(packet.time_base or self.time_base)
        if self._start is None:
            self._start = (packet.dts or 0) * base
        shift = round(self._start / base)
        if packet.dts is not None:
            packet.dts -= shift
        if packet.pts is not None:
            packet.pts -= shift
        return packet

    def _frame(self, index: int, decoded: av.VideoFrame, sound: list[av.Packet]) -> Frame:
        base = Fraction(decoded.time_base or self.time_base)
        duration = (decoded.duration or 0) * base
        if decoded.pts is None:  # raw streams have no times
            moment = self._next_time
        else:
            if self._start is None:
                self._start = decoded.pts * base
            moment = decoded.pts * base - self._start
        self._next_time = moment + (duration or (1 / self.rate if self.rate else Fraction(1, 25)))
        self.damaged += decoded.is_corrupt
        turns = round(decoded.rotation / 90) % 4
        if index == 0:
            if decoded.colorspace in (1, 5, 6, 9):  # BT.709, the two of BT.601, BT.2020
                self.colors = Colors(decoded.colorspace, decoded.color_primaries, decoded.color_trc)
            if turns % 2:
                self.pixel_aspect = 1 / self.pixel_aspect
        image = np.ascontiguousarray(np.rot90(decoded.to_ndarray(format="rgb24"), turns))  # counter-clockwise
        return Frame(index, moment, duration, image, sound)


class CameraSource(Source):
    """A camera by its number, through OpenCV, which knows every system's cameras. Attributes: see `Source`."""

    def __init__(self, number: int) -> None:
        name = f"camera {number}"
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # its warnings would hide our line
        self._capture = cv2.VideoCapture(number)
        if not self._capture.isOpened():
            raise InputError(f"{name}: cannot be opened: no such camera, or another program uses it")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        super().__init__(name, True, CAMERA_TIME_BASE, Fraction(round(rate * 1000), 1000) if rate > 0 else None)

    def frames(self) -> Iterator[Frame]:
        start, index = time.monotonic(), 0
        while True:
            there, bgr = self._capture.read()
            if not there:
                self.fault = "it gives no more frames"
                return
            moment = Fraction(round((time.monotonic() - start) / CAMERA_TIME_BASE)) * CAMERA_TIME_BASE
            yield Frame(index, moment, Fraction(0), cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
            index += 1

    def close(self) -> None:
        self._capture.release()


def _open_container(text: str, name: str) -> Any:
    remote = is_url(text)
    # Without TCP a lost packet is a grey image.
    options = {"rtsp_transport": "tcp"} if text.lower().startswith("rtsp") else {}
    try:
        if not remote and Path(text).stat().st_size == 0:
            raise InputError(f"{name}: the file is empty, expected a video")
        return av.open(text, options=options, timeout=STREAM_TIMEOUT if remote else None)
    except (FFmpegError, OSError) as error:
        kind = "stream" if remote else "video"
        raise InputError(f"{name}: cannot be read as a {kind} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ExitError):  # nobody but our own time limit asks FFmpeg to exit
        return f"no data for {STREAM_TIMEOUT:g} seconds"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
