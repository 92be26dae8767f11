"""The command `hpetr export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpetr.cli.options import CheckpointArgument


def export_command(
    checkpoint: CheckpointArgument = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx, for readers of ONNX such as ONNX Runtime; openvino; or torch-export, a program of plain torch "
            "operators.",
        ),
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="New file. Default: model.onnx, model.xml or model.pt2, by the format.")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Keep weights in float16: half the file. For onnx and openvino.")
    ] = False,
) -> None:
    """Write a model for other runtimes."""
    from hpetr.export.write import FORMATS, check_export, export_model, output_files

    path = output or Path("model").with_suffix(FORMATS[form].suffixes[-1] if form in FORMATS else "")
    check_export(path, form, half=half)
    from hpetr.checkpoints.folder import load_checkpoint
    from hpetr.images.files import is_stream
    from hpetr.inference.open import find_model

    found = find_model(checkpoint)
    assert found.path is not None
    check_export(path, form, half=half, inputs=[*found.path.glob("*.safetensors"), *found.path.glob("*.json")])
    model, processor = load_checkpoint(found.path, "cpu")
    typer.echo("translating the network, which takes a minute or two", err=True)
    export_model(model, processor, path, form, found.title, half=half)
    if not is_stream(path):
        typer.echo(f"model: {path}, {sum(file.stat().st_size for file in output_files(path, form)) / 1e6:.1f} MB")
