"""One thread with the model, and the bounded line of images in front of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus

import numpy as np

from hpetr.errors import InputError
from hpetr.images.read import load_image
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.server.limits import Refusal, broken

logger = logging.getLogger(__name__)

OnBatch = Callable[[int, float], None]


@dataclass(eq=False)
class Job:
    """One image in the line.

    Attributes:
        data: the encoded image.
        size: (height, width) by its header, before rotation by EXIF.
        threshold: only poses with a higher score are wanted.
        future: becomes the poses, an InputError's `Refusal`, or is cancelled when nobody waits any more.
    """

    data: bytes
    size: tuple[int, int]
    threshold: float
    future: Future[PoseResult] = field(default_factory=Future)


class Batcher:
    """Runs a model in a thread of its own, on batches of the images that wait.

    A batch never waits for company: it is the oldest image and those behind it that the network sees in the same
    size, so that no padding is added and nobody's poses depend on other people's images. Encoded images wait;
    decoded are only those of the batch, and all of them together have at most `max_pixels` (or are one image).

    Args:
        predictor: the model.
        capacity: requests that may be inside at once, from `admit` to the end of their job.
        batch_size: images that go through the network together at most.
        max_pixels: of a batch.

    Requests are admitted before their upload is read, which bounds the memory of uploads too.
    """

    def __init__(self, predictor: Predictor, capacity: int, batch_size: int, max_pixels: int) -> None:
        self.predictor, self.capacity, self.batch_size, self.max_pixels = predictor, capacity, batch_size, max_pixels
        self.on_batch: OnBatch = lambda images, seconds: None
        self._line: deque[Job] = deque()
        self._changed = threading.Condition()
        self._admitted = 0
        self._closing = False
        self._seconds_per_image = 0.0
        self._thread = threading.Thread(target=self._work, name="hpetr-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """End the thread after the images that wait; waits for it so many seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether images that are submitted will be looked at."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Images in the line."""
        return len(self._line)

    @property
    def admitted(self) -> int:
        """Requests inside."""
        return self._admitted

    def admit(self) -> None:
        """Take a place; `release` or `submit` gives it back.

        Raises:
            Refusal: all places are taken.
        """
        with self._changed:
            if self._admitted >= self.capacity:
                seconds = max(1, math.ceil(self._admitted * self._seconds_per_image))
                raise Refusal(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "queue_full",
                    f"all {self.capacity} places in the queue are taken, try again in {seconds} s",
                    retry_after=seconds,
                )
            self._admitted += 1

    def release(self) -> None:
        """Give back the place of a request that submits nothing."""
        with self._changed:
            self._admitted -= 1

    def submit(self, job: Job) -> None:
        """Put an image of an admitted request in the line. Its place is free again when its future is done.

        Cancelling the future takes the image out of the line, unless the model has it already.
        """
        job.future.add_done_callback(lambda _: self._leave(job))
        with self._changed:
            self._line.append(job)
            self._changed.notify()

    def _leave(self, job: Job) -> None:
        with self._changed:
            self._admitted -= 1
            if job in self._line:
                self._line.remove(job)

    def _work(self) -> None:
        while (jobs := self._next_batch()) is not None:
            start = time.perf_counter()
            done = self._run(jobs)
            seconds = time.perf_counter() - start
            if done:
                old, new = self._seconds_per_image, seconds / done
                self._seconds_per_image = new if old == 0 else 0.8 * old + 0.2 * new
                self.on_batch(done, seconds)

    def _next_batch(self) -> list[Job] | None:
        """The oldest image that somebody still waits for and those that may go with it; None at the end."""
        with self._changed:
            while True:
                while not self._line and not self._closing:
                    self._changed.wait()
                if not self._line:
                    return None
                batch = self._oldest_and_like()
                for job in batch:
                    self._line.remove(job)
                # From here on a future cannot be cancelled; one that was is on its way out of the line.
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running

    def _oldest_and_like(self) -> list[Job]:
        oldest = self._line[0]
        batch, pixels, network_size = [oldest], math.prod(oldest.size), self._network_size(oldest.size)
        for job in list(self._line)[1:]:
            if len(batch) == self.batch_size:
                break
            if self._network_size(job.size) == network_size and pixels + math.prod(job.size) <= self.max_pixels:
                batch.append(job)
                pixels += math.prod(job.size)
        return batch

    def _network_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.predictor.network_size(*size)

    def _run(self, jobs: Sequence[Job]) -> int:
        """Answer every job; gives how many images went through the network."""
        groups: dict[tuple[int, int], list[tuple[Job, np.ndarray]]] = {}
        for job in jobs:
            try:
                image = load_image(job.data)
            except InputError as error:
                # Without load_image's "image of 123 bytes: ", which is about us.
                job.future.set_exception(broken(str(error).partition(": ")[2]))
            except MemoryError as error:
                job.future.set_exception(error)
            else:
                # By EXIF an image may lie on its side, other than its header says.
                height, width = image.shape[:2]
                groups.setdefault(self._network_size((height, width)), []).append((job, image))
        for group in groups.values():
            self._predict(group)
        return sum(map(len, groups.values()))

    def _predict(self, group: Sequence[tuple[Job, np.ndarray]]) -> None:
        lowest = min(job.threshold for job, _ in group)
        images = [image for _, image in group]
        try:
            results = self.predictor.predict(images, lowest)
        except Exception as error:  # a failure is answered, and the next batch may do
            logger.exception("the model failed on a batch of %d", len(group))
            for job, _ in group:
                job.future.set_exception(error)
            return
        for (job, _), result in zip(group, results, strict=True):
            job.future.set_result(result[result.scores > job.threshold])
