"""Decode a video in a thread, a bounded number of frames ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from hpetr.video.source import Frame, Source

POLL = 0.1  # seconds between two checks whether a waiting caller still wants frames


class FrameQueue:
    """Frames of a source, decoded ahead in a thread; closes the source at the end of the `with` block.

    A file waits for room, so every frame comes out, in order. A live source does not wait: its oldest frame is dropped
    and counted in `source.dropped`, and the sound of that frame moves to the next one.

    Args:
        capacity: maximum number of frames held.
    """

    def __init__(self, source: Source, capacity: int) -> None:
        self._source = source
        self._capacity = capacity
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name=f"decoding {source.name}", daemon=True)
        self._thread.start()

    def take(self, count: int, unwanted: Callable[[], bool] = lambda: False) -> list[Frame]:
        """Return the next `count` frames; fewer at the end or from a live source, none after the end.

        Args:
            unwanted: asked while waiting; True ends the frames.

        Raises:
            Exception: the error of the thread, after the frames before it.
        """
        needed = 1 if self._source.live else count
        with self._changed:
            while len(self._frames) < needed and not self._ended and not unwanted():
                self._changed.wait(POLL)
            if unwanted():
                return []
            taken = [self._frames.popleft() for _ in range(min(count, len(self._frames)))]
            self._changed.notify_all()
            if not taken and self._error is not None:
                raise self._error
            return taken

    def __enter__(self) -> FrameQueue:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A thread that waits for a silent stream ends with the stream's own time limit, and closes the source then.
        self._thread.join(timeout=1)

    def _read(self) -> None:
        try:
            for frame in self._source.frames():
                if not self._put(frame):
                    break
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
                # Sound packets still to be written belong to the source: it stays open until the `with` block ends.
                self._changed.wait_for(lambda: self._closed)
            self._source.close()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            while len(self._frames) >= self._capacity and not self._closed:
                if self._source.live:
                    oldest = self._frames.popleft()
                    following = self._frames[0] if self._frames else frame
                    following.sound = oldest.sound + following.sound
                    self._source.dropped += 1
                else:
                    self._changed.wait()
            self._frames.append(frame)
            self._changed.notify_all()
            return not self._closed
