"""A service on a port, until it is told to stop."""

from __future__ import annotations

import errno
import math
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from hpetr.errors import InputError
from hpetr.server.app import Service, create_app

# Below the usual 1024 open files of a process; the queue is what limits work.
MAX_CONNECTIONS = 512


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


def serve(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that are inside, within the service's time limit.

    Args:
        on_ready: called when the model is loaded and tried, just before the first request is taken.
    """
    config = uvicorn.Config(
        create_app(service),
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(service.limits.timeout) + 1,
    )
    server = uvicorn.Server(config)

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
