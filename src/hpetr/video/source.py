"""Sources of frames: upright RGB images with their times, from files, streams and cameras."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from hpetr.errors import InputError, needs_extra
from hpetr.video.naming import is_camera, public_name

if TYPE_CHECKING:
    import av

CAMERA_TIME_BASE = Fraction(1, 90_000)
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, and the same number for primaries and transfer


@dataclass
class Frame:
    """One frame of a source.

    Attributes:
        index: number in the source, from 0; missing numbers are dropped frames.
        time: seconds from the start of the source.
        duration: seconds, 0 if unknown.
        image: (H, W, 3) uint8 RGB, upright.
        sound: packets of the sound tracks between the frame before and this one.
    """

    index: int
    time: Fraction
    duration: Fraction
    image: np.ndarray
    sound: list[av.Packet] = field(default_factory=list)


class Colors(NamedTuple):
    """FFmpeg's numbers of a video's color matrix, primaries and transfer."""

    matrix: int = UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED


class Source:
    """Base of the sources. The attributes that describe the video are final after the first frame.

    Attributes:
        name: for messages and results, without passwords.
        live: frames arrive at their own pace, and a slow reader loses some.
        time_base: seconds of which all times are multiples.
        rate: average frames per second, None if unknown.
        expected: number of frames that the file announces, None if unknown.
        pixel_aspect: width over height of a pixel of the upright frame.
        colors: of the video; the frames are RGB.
        sound_tracks: streams whose packets come with the frames.
        late_sound: packets after the last frame, known at the end.
        dropped: number of frames left out to keep up with a live source.
        undecodable: number of packets that gave no frame.
        damaged: number of frames of which the decoder had to guess a part.
        fault: reason why the frames ended early, None if they did not.
    """

    def __init__(self, name: str, live: bool, time_base: Fraction, rate: Fraction | None) -> None:
        self.name, self.live, self.time_base, self.rate = name, live, time_base, rate
        self.expected: int | None = None
        self.pixel_aspect = Fraction(1)
        self.colors = Colors()
        self.sound_tracks: list[Any] = []
        self.late_sound: list[av.Packet] = []
        self.dropped = self.undecodable = self.damaged = 0
        self.fault: str | None = None

    def frames(self) -> Iterator[Frame]:
        """Yield all frames in display order."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the file, connection or camera."""
        raise NotImplementedError

    def no_frame(self) -> InputError:
        """Return the error of a source without frames."""
        return InputError(f"{self.name}: has no frame that can be read" + (f" ({self.fault})" if self.fault else ""))

    def losses(self, read: int) -> Iterator[str]:
        """Yield a line for each kind of frames that are missing after `read` frames."""
        for number, reason in (
            (self.dropped, "dropped to keep up with the live source"),
            (self.undecodable, "could not be decoded, left out"),
            (self.damaged, "damaged"),
        ):
            if number:
                yield f"{number} frame{'s' if number > 1 else ''} {reason}"
        if self.fault:
            yield f"ended early ({self.fault})"
        if (self.expected or 0) > read + self.undecodable + self.dropped:
            yield f"announces {self.expected} frames, {read} could be read"


def open_source(text: str, live: bool | None = None, sound: bool = True) -> Source:
    """Open a video file, a stream's URL, or a camera's number.

    Args:
        live: drop frames to keep up; None does so for cameras, broadcasts and streams without a length.
        sound: also read the sound tracks.

    Raises:
        InputError: it does not exist or is no video, or a package is missing.
    """
    if is_camera(text):
        return CameraSource(int(text))
    with needs_extra("video", public_name(text)):
        from hpetr.video.file_source import FileSource
    return FileSource(text, live, sound)


class CameraSource(Source):
    """A camera by its number, opened by OpenCV, which knows the cameras of every system. Attributes: see `Source`."""

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
