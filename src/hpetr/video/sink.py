"""Where frames go: an H.264 video with the source's times and sound, and JSON lines; whole files or none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import av
import cv2
import numpy as np
from av.error import FFmpegError

from hpetr.errors import InputError
from hpetr.video.source import Frame, Source

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
# Constant quality, hardly to be told from the source; a slower preset would cost more than small models do.
ENCODING = {"crf": "20", "preset": "veryfast"}
BT601, LIMITED_RANGE = 5, 1


def video_suffix(path: str, source: Source) -> str:
    """The container for a source's drawings: its own, mp4 or mkv, the first that takes all its sound."""
    own = Path(path).suffix.lower()
    codecs = {sound_codec(track) for track in source.sound_tracks}
    for suffix in (own, ".mp4"):
        if suffix in FORMATS and codecs <= _supported_codecs(FORMATS[suffix]):
            return suffix
    return ".mkv"


def sound_codec(track: Any) -> str | None:
    """The name of a sound track's codec; None where FFmpeg does not know it."""
    return None if track.codec_context is None else track.codec_context.codec.canonical_name


def _supported_codecs(container_format: str) -> set[str]:
    with av.open(os.devnull, "w", format=container_format) as container:
        return set(container.supported_codecs)


class VideoSink:
    """A video file that appears under its name when `close` has finished it.

    Sound is copied as it is. Frames get the times they have in the source. A frame of another size than the first is
    scaled to it; an odd width or height gets one more pixel, as H.264 players expect.

    Args:
        path: the suffix says the container, one of `FORMATS`.

    Attributes:
        sound_left_out: codecs of the sound tracks that the container does not take.

    Raises:
        InputError: it cannot be written, or there is no encoder.
    """

    def __init__(self, path: Path, source: Source, first: Frame) -> None:
        self.path = path
        self.sound_left_out: list[str] = []
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._time_base = source.time_base
        self._last_pts: int | None = None
        self._matrix = source.colors.matrix if source.colors.matrix in (1, 9) else BT601
        height, width = first.image.shape[:2]
        self._size = (width + width % 2, height + height % 2)
        container_format = FORMATS[path.suffix.lower()]
        options = {} if container_format == "matroska" else {"movflags": "+faststart"}
        try:
            self._container = av.open(str(self._temporary), "w", format=container_format, container_options=options)
        except (FFmpegError, OSError) as error:
            raise self._failure(error) from error
        try:
            self._video = self._add_video(source)
            self._sound = {}
            supported = set(self._container.supported_codecs)
            for track in source.sound_tracks:
                codec = sound_codec(track)
                if codec in supported:
                    self._sound[track.index] = self._container.add_stream_from_template(track)
                else:
                    self.sound_left_out.append(codec or "unknown")
        except av.codec.codec.UnknownCodecError as error:
            self.discard()
            raise InputError(
                f"{path}: the installed PyAV has no H.264 encoder; --no-draw writes the poses alone"
            ) from error
        except (FFmpegError, OSError) as error:
            self.discard()
            raise self._failure(error) from error

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
        """Append a frame, (H, W, 3) uint8 RGB, and the sound before it."""
        height, width = drawing.shape[:2]
        if width % 2 or height % 2:
            drawing = cv2.copyMakeBorder(drawing, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        encoded = av.VideoFrame.from_ndarray(drawing, format="rgb24").reformat(
            *self._size, "yuv420p", dst_colorspace=self._matrix
        )
        pts = round(frame.time / self._time_base)
        if self._last_pts is not None:
            pts = max(pts, self._last_pts + 1)  # broken sources repeat times, which no container takes
        encoded.pts = self._last_pts = pts
        encoded.time_base = self._time_base
        encoded.duration = round(frame.duration / self._time_base)
        try:
            self.write_sound(frame.sound)
            self._container.mux(self._video.encode(encoded))
        except (FFmpegError, OSError) as error:
            raise self._failure(error) from error

    def write_sound(self, packets: Iterable[av.Packet]) -> None:
        """Append sound as it is in the source."""
        for packet in packets:
            if packet.stream.index in self._sound:
                packet.stream = self._sound[packet.stream.index]
                self._container.mux(packet)

    def close(self, late_sound: Iterable[av.Packet] = ()) -> None:
        """Finish the file and give it its name.

        Args:
            late_sound: packets after the last frame.
        """
        try:
            self.write_sound(late_sound)
            self._container.mux(self._video.encode(None))
            self._container.close()
            self._temporary.replace(self.path)
        except (FFmpegError, OSError) as error:
            raise self._failure(error) from error

    def discard(self) -> None:
        """Leave nothing."""
        with suppress(FFmpegError, OSError):
            self._container.close()  # an open file cannot be removed everywhere
        self._temporary.unlink(missing_ok=True)

    def _failure(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: cannot be written ({getattr(error, 'strerror', None) or error})")


class JsonLines:
    """A file of one JSON value a line that appears under its name when `close` has finished it.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: TextIO | None = None

    def write(self, value: Any) -> None:
        """Append a line; numbers that JSON does not have (NaN, infinity) are an error, not a broken file."""
        line = json.dumps(value, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = open(self._temporary, "w", encoding="utf-8")
            self._file.write(line)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Finish the file and give it its name; without a line there is no file."""
        if self._file is None:
            return
        try:
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as error:
            raise self._failure(error) from error

    def discard(self) -> None:
        """Leave nothing."""
        if self._file is not None:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror})")
