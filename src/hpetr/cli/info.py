"""The command `hpetr info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hpetr.cli.options import Size, parse_size
from hpetr.cli.output import print_table

if TYPE_CHECKING:
    from hpetr.evaluation.info import ModelInfo


def info_command(
    target: Annotated[
        str | None,
        typer.Argument(help="Preset, checkpoint folder or hf://OWNER/NAME. Default: versions and machine only."),
    ] = None,
    size: Size = None,
) -> None:
    """Show a model's size and cost, and the versions in use."""
    pixels = parse_size(size)
    from hpetr.evaluation.info import environment_info, model_info

    if target is not None:
        _print_model(model_info(target, pixels))
    print_table("Environment", environment_info().items())


def _print_model(model: ModelInfo) -> None:
    tokens = ", ".join(f"{count:,}" for count in model.tokens)
    rows = [
        ("parameters", f"{model.parameters:,}"),
        ("trainable", f"{model.trainable:,}"),
        ("frozen", f"{model.frozen:,}"),
        ("input", f"{model.size[0]} x {model.size[1]} (height x width)"),
        ("FLOPs", f"{model.flops / 1e9:.1f} G, multiply-add = 2, without deformable sampling"),
        ("tokens per level", f"{tokens} (sum {sum(model.tokens):,})"),
    ]
    print_table(model.name, rows)
