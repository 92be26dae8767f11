"""Decode video files and streams with FFmpeg."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
from av.error import ExitError, FFmpegError
from av.stream import Disposition

from hpetr.errors import InputError, first_line
from hpetr.video.naming import is_url, public_name
from hpetr.video.source import CAMERA_TIME_BASE, Colors, Frame, Source

# Protocols of cameras and broadcasts; http and https are live when the stream has no length.
LIVE_PROTOCOLS = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt"})
# Seconds without data after which a stream has failed, both when opened and when read.
STREAM_TIMEOUT = 10.0
KNOWN_MATRICES = (1, 5, 6, 9)  # FFmpeg's numbers of BT.709, the two of BT.601, and BT.2020


class FileSource(Source):
    """A video file or a stream. Attributes: see `Source`."""

    def __init__(self, text: str, live: bool | None = None, sound: bool = True) -> None:
        name = public_name(text)
        self._container = _open_container(text, name)
        # A cover image in a sound file looks like a video of one frame.
        videos = [v for v in self._container.streams.video if Disposition.attached_pic not in v.disposition]
        if not videos:
            self._container.close()
            raise InputError(f"{name}: has no video in it")
        self._video = max(videos, key=lambda video: video.width * video.height)
        if live is None and is_url(text):
            live = urlsplit(text).scheme.lower() in LIVE_PROTOCOLS or self._container.duration is None
        rate = self._video.average_rate or self._video.guessed_rate
        super().__init__(name, bool(live), Fraction(self._video.time_base or CAMERA_TIME_BASE), rate)
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
                    sound.append(self._from_start(packet))
                continue
            for decoded in self._decode(packet):
                yield self._frame(index, decoded, sound)
                index, sound = index + 1, []
        self.late_sound = sound

    def close(self) -> None:
        self._container.close()

    def _packets(self) -> Iterator[av.Packet | None]:
        """Yield the packets of the video and the sound; None, which flushes the decoder, after a failure."""
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

    def _from_start(self, packet: av.Packet) -> av.Packet:
        """Return the packet with times from the start of the source."""
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
        image, turned = _upright(decoded)
        if index == 0:
            if decoded.colorspace in KNOWN_MATRICES:
                self.colors = Colors(decoded.colorspace, decoded.color_primaries, decoded.color_trc)
            if turned:
                self.pixel_aspect = 1 / self.pixel_aspect
        return Frame(index, moment, duration, image, sound)


def _upright(decoded: av.VideoFrame) -> tuple[np.ndarray, bool]:
    """Apply the display matrix, which rotates and mirrors by multiples of 90 degrees.

    Returns:
        (H, W, 3) uint8 RGB, and whether width and height are exchanged.
    """
    image = decoded.to_ndarray(format="rgb24")
    matrix: Any = decoded.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image, False
    # A stored pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    turned = abs(b) > abs(a)
    if turned:
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]), turned


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
    """Return why reading failed; only our own time limit makes FFmpeg exit."""
    return f"no data for {STREAM_TIMEOUT:g} seconds" if isinstance(error, ExitError) else first_line(error)
