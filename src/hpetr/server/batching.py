"""A thread with the model, and the bounded queue of images in front of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from hpetr.errors import InputError
from hpetr.images.read import load_image
from hpetr.poses.predictor import Predictor
from hpetr.poses.result import PoseResult
from hpetr.server.limits import Refusal, broken

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One image in the queue.

    Attributes:
        data: the encoded image.
        size: (height, width) by its header, before rotation by EXIF.
        threshold: only poses with a higher score are returned.
        future: the poses, or a `Refusal`; cancelling it takes a waiting image out of the queue.
    """

    data: bytes
    size: tuple[int, int]
    threshold: float
    future: Future[PoseResult] = field(default_factory=Future)


class Batcher:
    """Run a model in a thread, on batches of the images that wait.

    A batch never waits for more images. It holds the oldest image and those behind it that have the same size in the
    network, so that no padding is added and the poses of an image do not depend on other images. Images wait encoded;
    only those of the batch are decoded, and together they have at most `max_pixels` (or are one image).

    Requests are admitted before their upload is read, which bounds the memory of uploads too.

    Args:
        predictor: the model.
        capacity: maximum number of requests between `admit` and `release`.
        batch_size: maximum number of images in a forward pass.
        max_pixels: of a batch.
    """

    def __init__(self, predictor: Predictor, capacity: int, batch_size: int, max_pixels: int) -> None:
        self.predictor, self.capacity, self.batch_size, self.max_pixels = predictor, capacity, batch_size, max_pixels
        self.on_batch: Callable[[int, float], None] = lambda images, seconds: None
        self.admitted = 0
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._seconds_per_image = 0.0
        self._thread = threading.Thread(target=self._work, name="hpetr-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Predict the images that wait and end the thread; wait for it at most `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether submitted images will be predicted."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Number of images in the queue."""
        return len(self._queue)

    def admit(self) -> None:
        """Take a place for a request, until `release`.

        Raises:
            Refusal: all places are taken.
        """
        with self._changed:
            if self.admitted >= self.capacity:
                seconds = max(1, math.ceil(self.admitted * self._seconds_per_image))
                detail = f"all {self.capacity} places in the queue are taken, try again in {seconds} s"
                raise Refusal("queue_full", detail, retry_after=seconds)
            self.admitted += 1

    def release(self) -> None:
        """Give a place back."""
        with self._changed:
            self.admitted -= 1

    def submit(self, job: Job) -> None:
        """Put the image of an admitted request into the queue."""
        with self._changed:
            self._queue.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))

    def _forget(self, job: Job) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)

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
        """Take the oldest image and those that may go with it out of the queue; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return None
                batch = self._oldest_and_like()
                for job in batch:
                    self._queue.remove(job)
                # From here on a future cannot be cancelled; a cancelled one leaves the batch.
                if running := [job for job in batch if job.future.set_running_or_notify_cancel()]:
                    return running

    def _oldest_and_like(self) -> list[Job]:
        batch: list[Job] = []
        pixels, network_size = 0, self.predictor.network_size(*self._queue[0].size)
        for job in self._queue:
            fits = pixels + math.prod(job.size) <= self.max_pixels and len(batch) < self.batch_size
            if not batch or (fits and self.predictor.network_size(*job.size) == network_size):
                batch.append(job)
                pixels += math.prod(job.size)
        return batch

    def _run(self, jobs: Sequence[Job]) -> int:
        """Answer every job, and return the number of images that went through the network."""
        groups: dict[tuple[int, int], list[tuple[Job, np.ndarray]]] = {}
        for job in jobs:
            try:
                image = load_image(job.data)
            except InputError as error:
                # Without load_image's "image of 123 bytes: ", which means nothing to the client.
                job.future.set_exception(broken(str(error).partition(": ")[2]))
            except MemoryError as error:
                job.future.set_exception(error)
            else:
                # EXIF may turn an image, so that its size differs from its header's.
                height, width = image.shape[:2]
                groups.setdefault(self.predictor.network_size(height, width), []).append((job, image))
        for group in groups.values():
            self._predict(group)
        return sum(map(len, groups.values()))

    def _predict(self, group: Sequence[tuple[Job, np.ndarray]]) -> None:
        try:
            results = self.predictor.predict([image for _, image in group], min(job.threshold for job, _ in group))
        except Exception as error:  # a failure is answered, and the next batch may succeed
            logger.exception("the model failed on a batch of %d", len(group))
            for job, _ in group:
                job.future.set_exception(error)
        else:
            for (job, _), result in zip(group, results, strict=True):
                job.future.set_result(result[result.scores > job.threshold])
