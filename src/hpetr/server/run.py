"""A service on a port, until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hpetr.errors import InputError
from hpetr.server.app import Service, create_app

# Below the usual 1024 open files of a process; the queue is what limits work.
MAX_CONNECTIONS = 512
# Seconds that an idle connection stays open. At uvicorn's 5, one in ten of 64 clients that came back when `Retry-After`
# said so found its connection closed just then.
KEEP_ALIVE = 30


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 takes a free one.

    Raises:
        InputError: the address is in use, or not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        # Python adds the address to some of the system's messages, and a host name that is none has no such number.
        number = getattr(error, "errno", None)
        reason = os.strerror(number).lower() if isinstance(number, int) and number in errno.errorcode else str(error)
        raise InputError(f"serve: cannot listen on {host} port {port} ({reason})") from error


def connections(head_timeout: float) -> type[H11Protocol]:
    """uvicorn's connections, which end when a request's head is not complete after so many seconds.

    uvicorn itself waits for ever: without this `MAX_CONNECTIONS` clients that say nothing keep everybody else out.
    """

    class Connection(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_timer()

        def _watch(self) -> None:
            """Between requests their state is idle, and after an answer uvicorn's own, shorter timer runs."""
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout, self.transport.close)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection


def make_server(service: Service) -> uvicorn.Server:
    """uvicorn with the application of a service, and limits on connections."""
    config = uvicorn.Config(
        create_app(service),
        http=connections(service.limits.timeout),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(service.limits.timeout) + 1,
    )
    return uvicorn.Server(config)


def serve(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that are inside, within the service's time limit.

    Args:
        on_ready: called when the model is loaded and tried, just before the first request is taken.
    """
    server = make_server(service)

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn stops on both signals and then raises them again for whoever was there before: that is an end as asked
    # for, not a failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    service.start()
    try:
        on_ready()
        server.run(sockets=[listener])
    finally:
        service.close()
