"""Decoding in a thread of its own, a bounded number of frames ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from hpetr.video.source import Frame, Source

# How often somebody who waits for frames looks whether they are still wanted, in seconds.
POLL = 0.1


class FrameQueue:
    """Frames of a source, decoded ahead in a thread.

    A file waits until there is room, so every frame comes out, in order. A live source does not wait: the oldest frame
    goes when there is no room, and is counted in `dropped`; its sound stays.

    Args:
        capacity: frames that are held at most.
    """

    def __init__(self, source: Source, capacity: int) -> None:
        self.dropped = 0
        self._source = source
        self._capacity = capacity
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name=f"decoding {source.name}", daemon=True)
        self._thread.start()

    def take(self, count: int, unwanted: Callable[[], bool]) -> list[Frame]:
        """The next `count` frames; fewer at the end, and of a live source those that are there; none after the end.

        Args:
            unwanted: asked while waiting; once it says yes there are no more frames.

        Raises:
            Exception: what went wrong in the thread, after the frames before it.
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

    def close(self) -> None:
        """End the thread and close the source."""
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
                # Sound packets that are still to be written belong to the source: it stays open until `close`.
                self._changed.wait_for(lambda: self._closed)
            self._source.close()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            while len(self._frames) >= self._capacity and not self._closed:
                if self._source.live:
                    oldest = self._frames.popleft()
                    following = self._frames[0] if self._frames else frame
                    following.sound = oldest.sound + following.sound
                    self.dropped += 1
                else:
                    self._changed.wait()
            if self._closed:
                return False
            self._frames.append(frame)
            self._changed.notify_all()
            return True
