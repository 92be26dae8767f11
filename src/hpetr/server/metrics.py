"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        waiting: gives the images that wait for the network.
        admitted: gives the requests that are inside: uploading, waiting or in the network.
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
            "hpetr_batch_seconds", "Decoding and network, a batch.", buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "hpetr_batch_size", "Images that went together.", buckets=BATCH_SIZES, registry=self.registry
        )
        Gauge("hpetr_queue_length", "Images that wait.", registry=self.registry).set_function(waiting)
        Gauge("hpetr_admitted", "Requests that are inside.", registry=self.registry).set_function(admitted)
