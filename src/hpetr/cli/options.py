"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpetr.errors import InputError

DEFAULT_MODEL = "Default: the model that comes with hpetr."

Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Precision = Annotated[
    str, typer.Option(help="float32, or bfloat16: faster on GPUs, and on CPUs with hardware for bfloat16 matrices.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Images that go through the network together. Default: 8 on a GPU, else 1.")
]
Checkpoint = Annotated[
    str | None, typer.Option(help=f"Checkpoint folder, hf://OWNER/NAME or exported model. {DEFAULT_MODEL}")
]
CheckpointArgument = Annotated[
    str | None, typer.Argument(help=f"Checkpoint folder or hf://OWNER/NAME. {DEFAULT_MODEL}")
]
Size = Annotated[
    str | None,
    typer.Option(help="Input of the network as HEIGHTxWIDTH, e.g. 800x1216. Default: the processor's choice."),
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of the images. Default: beside the JSON, or the YAML's path.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.")
]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of HEIGHTxWIDTH, None for None; InputError for anything else."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise InputError(f"--size {text}: expected HEIGHTxWIDTH in pixels, e.g. 800x1216")
    return int(height), int(width)
