"""The command `hpetr export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpetr.errors import InputError

FORMATS = ("onnx",)


def export_command(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint folder. Default: the model that comes with hpetr.")
    ] = None,
    form: Annotated[str, typer.Option("--format", help="onnx, for ONNX Runtime and what else reads ONNX.")] = "onnx",
    output: Annotated[Path, typer.Option(help="New file.")] = Path("model.onnx"),
) -> None:
    """Write a model for programs without torch."""
    from hpetr.export import check_export, export_onnx

    if form not in FORMATS:
        raise InputError(f"--format {form}: expected {' or '.join(FORMATS)}")
    check_export(output)
    from hpetr.checkpoint import BUNDLED, load_checkpoint, resolve_checkpoint
    from hpetr.hub import is_hub_place

    name = checkpoint or BUNDLED
    if not is_hub_place(name):
        name = resolve_checkpoint(checkpoint).resolve().name
    model, processor = load_checkpoint(checkpoint, "cpu")
    typer.echo("translating the network, which takes a minute or two")
    export_onnx(model, processor, output, name)
    typer.echo(f"model: {output}, {output.stat().st_size / 1e6:.1f} MB")
