"""The command `hpetr convert`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import typer

from hpetr.cli.output import say, say_beside
from hpetr.errors import InputError


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="Official .pth file; or a checkpoint folder with --to-official or --half.")
    ],
    preset: Annotated[
        str | None, typer.Option(help="Model of the .pth, e.g. h-petr-r50. Default: found by its tensors.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New checkpoint folder.")] = None,
    to_official: Annotated[Path | None, typer.Option(help="New .pth file in the official layout.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the folder's matrices as float16 in --output.")] = False,
) -> None:
    """Convert an official checkpoint to hpetr, or back; or halve a checkpoint's size."""
    if (output is None) == (to_official is None) or ((half or to_official) and preset) or (half and to_official):
        raise InputError("convert: expected --output (with --preset or --half, or neither), or --to-official")
    from hpetr.checkpoints import official
    from hpetr.checkpoints.folder import check_new, load_checkpoint, save_checkpoint
    from hpetr.images.files import check_output, write_bytes
    from hpetr.model.image_processor import HPetrImageProcessor

    if to_official is not None:
        check_output(to_official, [source, *source.glob("*")], (".pth",))
        say_beside(to_official)
        model, _ = load_checkpoint(source, "cpu")
        import torch

        buffer = io.BytesIO()
        torch.save({"state_dict": official.to_official(model)}, buffer)
        write_bytes(to_official, buffer.getvalue())
        say(f"official checkpoint: {to_official}")
    elif output is not None:
        check_new(output)
        if half:
            save_checkpoint(*load_checkpoint(source, "cpu"), output, half=True)
        else:
            state = official.read_official(source)
            found = preset or official.identify(official.weight_shapes(state), source)
            save_checkpoint(official.load_official(state, found, source), HPetrImageProcessor.preset(found), output)
        say(f"checkpoint: {output}")
