"""Run a service on a port until it is stopped."""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from hpetr.errors import InputError
from hpetr.server.app import Service, create_app

# Below the usual 1024 open files of a process; the queue is what limits work.
MAX_CONNECTIONS = 512
# Seconds that an idle connection stays open. At uvicorn's 5, one in ten of 64 clients that came back when `Retry-After`
# said so found its connection closed just then.
KEEP_ALIVE = 30


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address; port 0 takes a free one.

    Raises:
        InputError: the address is in use, or not of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        # Python adds the address to some of the system's messages; an unknown host name has no number of the system.
        reason = os.strerror(error.errno).lower() if error.errno and error.errno in errno.errorcode else str(error)
        raise InputError(f"serve: cannot listen on {host} port {port} ({reason})") from error


class HeadTimeout:
    """An application that also closes connections on which no complete head of a request arrives in time.

    uvicorn waits for a head without limit, so that `MAX_CONNECTIONS` silent clients would keep all others out.

    Args:
        app: the application, in ASGI.
        seconds: from the connection, or from the answer before, to the complete head of a request.

    Attributes:
        connections: of the server, each with `client` (host and port) and `transport`.
    """

    def __init__(self, app: Callable[..., Any], seconds: float) -> None:
        self._app, self._seconds = app, seconds
        self._waiting_since: dict[Any, float] = {}  # by client; infinite during a request
        self.connections: set[Any] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        client = scope.get("client")
        self._waiting_since[client] = math.inf
        try:
            await self._app(scope, receive, send)
        finally:
            self._waiting_since[client] = time.monotonic()

    async def close_late(self) -> None:
        """Close the connections that are late; called every second."""
        now = time.monotonic()
        self._waiting_since = {c.client: self._waiting_since.get(c.client, now) for c in self.connections}
        for connection in list(self.connections):
            if now - self._waiting_since[connection.client] >= self._seconds:
                connection.transport.close()


def make_server(service: Service) -> uvicorn.Server:
    """Return uvicorn with the application of a service, and limits on connections."""
    app = HeadTimeout(create_app(service), service.limits.timeout)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `HeadTimeout` finds a connection by its client
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(service.limits.timeout) + 1,
        callback_notify=app.close_late,
        timeout_notify=0,
    )
    server = uvicorn.Server(config)
    app.connections = server.server_state.connections
    return server


def serve(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those in progress within the service's time limit.

    Args:
        on_ready: called when the model is loaded and tried, just before the first request is taken.
    """
    server = make_server(service)

    def stop(*_: object) -> None:
        server.should_exit = True

    # After its own end uvicorn raises the signal again for the handler before it: here a stop is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    service.start()
    try:
        on_ready()
        server.run(sockets=[listener])
    finally:
        service.close()
