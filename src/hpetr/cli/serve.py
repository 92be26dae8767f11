"""The command `hpetr serve`."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import typer

from hpetr.cli.options import BatchSize, Checkpoint, Device
from hpetr.errors import needs_extra


def serve_command(
    checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_megabytes: Annotated[float, typer.Option(help="Largest upload.")] = 20,
    max_pixels: Annotated[float, typer.Option(help="Largest image, e.g. 50e6.")] = 50e6,
    queue: Annotated[int, typer.Option(min=1, help="Requests inside at once; more are sent away with 503.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer, or to 504.")] = 30,
    batch_size: BatchSize = None,
    device: Device = "auto",
) -> None:
    """Serve a page to try the model on images and the camera, and an HTTP API. Stop it with Ctrl+C."""
    with needs_extra("serve", "serve"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    from hpetr.inference.open import find_model, open_predictor
    from hpetr.server.app import Service
    from hpetr.server.limits import Limits
    from hpetr.server.run import listen, serve

    limits = Limits(int(max_megabytes * 1e6), int(max_pixels), queue, timeout)
    name = find_model(checkpoint, ("checkpoint", "exported")).title
    # The port first: loading the model takes seconds.
    with listen(host, port) as listener:
        service = Service(open_predictor(checkpoint, device), name, limits, batch_size)
        bound = listener.getsockname()[1]

        def ready() -> None:
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"{name} on http://{shown}:{bound} (description of the API: /docs)")
            if not _is_loopback(host):
                typer.echo("warning: other machines can send images here without a password", err=True)

        serve(service, listener, ready)
    typer.echo("stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
