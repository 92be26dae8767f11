"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Metrics of one server, in a registry of its own.

    Args:
        waiting: returns the number of images in the queue.
        admitted: returns the number of requests uploading, waiting or in the network.
    """

    def __init__(self, waiting: Callable[[], int], admitted: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        self.requests = Counter("hpetr_requests", "Requests for poses.", registry=self.registry)
        self.failures = Counter("hpetr_failures", "Requests without poses.", ["kind"], registry=self.registry)
        self.latency = Histogram(
            "hpetr_request_seconds", "From a request to its answer.", buckets=SECONDS, registry=self.registry
        )
        self.inference = Histogram(
            "hpetr_batch_seconds", "Decoding and forward pass of a batch.", buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "hpetr_batch_size", "Images in a forward pass.", buckets=BATCH_SIZES, registry=self.registry
        )
        Gauge("hpetr_queue_length", "Images in the queue.", registry=self.registry).set_function(waiting)
        Gauge("hpetr_admitted", "Requests in progress.", registry=self.registry).set_function(admitted)

    def count_batch(self, images: int, seconds: float) -> None:
        """Count one batch."""
        self.batch_size.observe(images)
        self.inference.observe(seconds)
