"""Sources of frames: upright RGB images with their times, from files, streams and cameras."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpetr.errors import InputError

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
