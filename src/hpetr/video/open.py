"""Open a video, a stream or a camera."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import cv2

from hpetr.errors import InputError, needs_extra
from hpetr.video.naming import is_camera, public_name
from hpetr.video.source import CAMERA_TIME_BASE, Frame, Source


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
