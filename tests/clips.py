"""Small videos in which every frame carries its number, and readers of their frames and sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, BITS, RATE, SAMPLES = 192, 96, 10, 25, 44_100


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) grey, with the number in black and white bars along the lower edge, where nothing is drawn."""
    image = np.full((height, width, 3), 110, np.uint8)
    for bit in range(BITS):
        left = width * bit // BITS
        image[height // 2 :, left : width * (bit + 1) // BITS] = 235 if number >> bit & 1 else 20
    return image


def read_number(image: np.ndarray) -> int:
    """The number in a frame, also of a compressed one: the median of each bar."""
    height, width = image.shape[:2]
    bars = np.array_split(image[height // 2 + 4 :].mean(-1), BITS, axis=1)
    assert width >= 2 * BITS
    return sum(int(np.median(bar) > 128) << bit for bit, bar in enumerate(bars))


def make_clip(
    path: Path,
    times: Sequence[int],
    *,
    sound: str | None = None,
    codec: str = "h264",
    matrix: Sequence[int] = (),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    container_format: str | None = None,
) -> Path:
    """A video with one numbered frame at each of the times, in 25ths of a second, and a tone as long as it."""
    with av.open(str(path), "w", format=container_format) as container:
        video = container.add_stream(codec, rate=RATE)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, RATE)
        if matrix:  # (a, b, c, d): a stored pixel (x, y) is shown at (a x + c y, b x + d y)
            a, b, c, d = (value << 16 for value in matrix)
            video.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
        tone = container.add_stream(sound, rate=SAMPLES, layout="mono", bit_rate=64_000) if sound else None
        wave = np.sin(np.arange(SAMPLES * (times[-1] + 1) // RATE) / 20).astype(np.float32)
        heard = 0
        for number, moment in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            frame.pts, frame.time_base, frame.duration = moment, Fraction(1, RATE), 1
            container.mux(video.encode(frame))
            while tone is not None and heard < min(SAMPLES * (moment + 1) // RATE, len(wave)):
                chunk = wave[None, heard : heard + (tone.codec_context.frame_size or 1024)]
                piece = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
                piece.sample_rate, piece.pts = SAMPLES, heard
                container.mux(tone.encode(piece))
                heard += chunk.shape[1]
        container.mux(video.encode(None))
        if tone is not None:
            container.mux(tone.encode(None))
    return path


def read_clip(path: Path) -> tuple[list[int], list[Fraction]]:
    """Numbers and times of a video's frames, as any player sees them."""
    with av.open(str(path)) as container:
        frames = [
            (read_number(frame.to_ndarray(format="rgb24")), frame.pts * Fraction(frame.time_base))
            for frame in container.decode(video=0)
        ]
    return [number for number, _ in frames], [moment for _, moment in frames]


def read_sound(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
