"""Write frames into an H.264 video with the times and the sound of their source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.codec.codec import UnknownCodecError
from av.error import FFmpegError

from hpetr.errors import InputError, first_line
from hpetr.video.naming import DRAWING_SUFFIXES
from hpetr.video.source import Frame, Source

FORMATS = dict(zip(DRAWING_SUFFIXES, ("mp4", "mp4", "mov", "matroska"), strict=True))
# Constant quality, hard to tell from the source; a slower preset would cost more than small models do.
ENCODING = {"crf": "20", "preset": "veryfast"}
BT601, LIMITED_RANGE = 5, 1


def video_suffix(path: str, source: Source) -> str:
    """Return the container for a source's drawings: its own, mp4 or mkv, the first that takes all its sound."""
    own = Path(path).suffix.lower()
    codecs = {sound_codec(track) for track in source.sound_tracks}
    for suffix in (own, ".mp4"):
        if suffix in FORMATS:
            with av.open(os.devnull, "w", format=FORMATS[suffix]) as container:
                if codecs <= container.supported_codecs:
                    return suffix
    return ".mkv"


def sound_codec(track: Any) -> str | None:
    """Return the name of a sound track's codec, None if FFmpeg does not know it."""
    return None if track.codec_context is None else track.codec_context.codec.canonical_name


class VideoSink:
    """A video file, under a temporary name until `close`; a failure removes it.

    Sound is copied without encoding. A frame of another size than the first is scaled to it; an odd width or height
    gets one more pixel, as H.264 players expect.

    Args:
        path: its suffix is the container, one of `FORMATS`.

    Attributes:
        sound_left_out: codecs of the sound tracks that the container does not take.

    Raises:
        InputError: it cannot be written, or the encoder is missing.
    """

    def __init__(self, path: Path, source: Source, first: Frame) -> None:
        self.path = path
        self.sound_left_out: list[str] = []
        self._target = Path(os.path.realpath(path))
        self._temporary = self._target.with_name(f".{self._target.name[:40]}.{os.getpid()}.tmp")
        self._time_base = source.time_base
        self._last_pts = -1
        self._matrix = source.colors.matrix if source.colors.matrix in (1, 9) else BT601
        height, width = first.image.shape[:2]
        self._size = (width + width % 2, height + height % 2)
        self._sound = {}
        container_format = FORMATS[path.suffix.lower()]
        options = {} if container_format == "matroska" else {"movflags": "+faststart"}
        self._container: Any = None
        with self._writing():
            self._container = av.open(str(self._temporary), "w", format=container_format, container_options=options)
            self._video = self._add_video(source)
            for track in source.sound_tracks:
                codec = sound_codec(track)
                if codec in self._container.supported_codecs:
                    self._sound[track.index] = self._container.add_stream_from_template(track)
                else:
                    self.sound_left_out.append(codec or "unknown")

    def _add_video(self, source: Source) -> Any:
        video = self._container.add_stream("h264", rate=source.rate or 30, options=dict(ENCODING))
        video.width, video.height = self._size
        video.pix_fmt = "yuv420p"
        video.time_base = video.codec_context.time_base = self._time_base
        video.codec_context.sample_aspect_ratio = source.pixel_aspect
        video.codec_context.colorspace = source.colors.matrix
        video.codec_context.color_primaries = source.colors.primaries
        video.codec_context.color_trc = source.colors.transfer
        video.codec_context.color_range = LIMITED_RANGE
        return video

    def write(self, frame: Frame, drawing: np.ndarray) -> None:
        """Append the sound before a frame, and its drawing (H, W, 3) uint8 RGB."""
        height, width = drawing.shape[:2]
        if width % 2 or height % 2:
            drawing = cv2.copyMakeBorder(drawing, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        encoded = av.VideoFrame.from_ndarray(drawing, format="rgb24").reformat(
            *self._size, "yuv420p", dst_colorspace=self._matrix
        )
        # Broken sources repeat times, which no container takes.
        self._last_pts = max(round(frame.time / self._time_base), self._last_pts + 1)
        encoded.pts, encoded.time_base = self._last_pts, self._time_base
        encoded.duration = round(frame.duration / self._time_base)
        with self._writing():
            self._write_sound(frame.sound)
            self._container.mux(self._video.encode(encoded))

    def _write_sound(self, packets: Iterable[av.Packet]) -> None:
        for packet in packets:
            if packet.stream.index in self._sound:
                packet.stream = self._sound[packet.stream.index]
                self._container.mux(packet)

    def close(self, late_sound: Iterable[av.Packet] = ()) -> None:
        """Append the sound after the last frame, finish the file and give it its name."""
        with self._writing():
            self._write_sound(late_sound)
            self._container.mux(self._video.encode(None))
            self._container.close()
            self._temporary.replace(self._target)

    def discard(self) -> None:
        """Remove the unfinished file."""
        if self._container is not None:
            with suppress(FFmpegError, OSError):
                self._container.close()  # an open file cannot be removed on every system
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UnknownCodecError as error:
            self.discard()
            reason = "the installed PyAV has no H.264 encoder; --no-draw writes the poses alone"
            raise InputError(f"{self.path}: {reason}") from error
        except (FFmpegError, OSError) as error:
            self.discard()
            raise InputError(f"{self.path}: cannot be written ({first_line(error)})") from error
