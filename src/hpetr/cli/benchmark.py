"""The command `hpetr benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpetr.cli.options import DEFAULT_MODEL, Device, Precision, Size, parse_size
from hpetr.cli.output import console, progress, say, say_beside

if TYPE_CHECKING:
    from hpetr.evaluation.benchmark import Benchmark, Spread

TABLE_WIDTH = 128  # a narrower terminal wraps the lines, which is better than numbers cut off


def benchmark_command(
    target: Annotated[
        str | None, typer.Argument(help=f"Checkpoint folder, hf://OWNER/NAME or preset. {DEFAULT_MODEL}")
    ] = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(help="Images that go through the network together.")] = 1,
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(help="Measured runs.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: torch's own choice.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to run on. Default: a made one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all numbers as JSON.")] = None,
    precision: Precision = "float32",
) -> None:
    """Measure the time of every stage, and compare it with the rates of this machine."""
    from hpetr.images.files import RESULT_SUFFIXES, check_output, write_json
    from hpetr.inference.files import model_files

    pixels = parse_size(size)
    if json_file is not None:
        check_output(json_file, [*model_files(target), *([] if image is None else [image])], RESULT_SUFFIXES)
        say_beside(json_file)
    from hpetr.checkpoints.folder import BUNDLED
    from hpetr.evaluation.benchmark import benchmark, runs
    from hpetr.inference.precision import keep_freed_memory

    keep_freed_memory()
    with progress("Measuring", runs(max(repeats, 1))) as advance:
        result = benchmark(
            target or BUNDLED, pixels, batch, device, repeats, threads, image, advance, precision=precision
        )
    print_benchmark(result)
    if json_file is not None:
        write_json(json_file, result.to_dict())
        say(f"numbers: {json_file}")


def print_benchmark(result: Benchmark) -> None:
    """Print a table of the stages, and below it the rates that the shares refer to."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    weights = " (random weights)" if result.weights == "random" else ""
    image, network = (f"{height} x {width}" for height, width in (result.image, result.input))
    title = (
        f"{result.model}{weights}: image {image}, network input {network}, batch {result.batch}\n{result.device}, "
        f"{result.threads} CPU threads, {result.precision}, {result.kernel} sampling kernel, {result.repeats} repeats"
    )
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE)
    table.add_column("stage", no_wrap=True)
    for head in ("ms", "quartiles", "share", "GFLOP", "sampling", "of matrix", "MB moved", "of copy"):
        table.add_column(head, justify="right", no_wrap=True)
    for stage in result.stages:
        table.add_row(
            stage.name,
            *_times(stage.seconds),
            _percent(stage.seconds.median / result.whole.median),
            _number(stage.flops / 1e9),
            _number(stage.sampling_flops / 1e9),
            _percent(stage.matrix_share),
            _number(stage.bytes / 1e6),
            _percent(stage.copy_share),
        )
    table.add_section()
    table.add_row("whole", *_times(result.whole), "100%")
    out = console()
    out.width = max(out.width, TABLE_WIDTH)
    out.print(table)
    out.print(f"{_number(result.images_per_second)} images per second")
    if result.peak_bytes is not None:
        loaded = "" if result.loaded_bytes is None else f", {result.loaded_bytes / 1e6:,.0f} MB before the first image"
        owner = "GPU tensors" if result.device.startswith("cuda") else "the process"
        out.print(f"peak memory of {owner} {result.peak_bytes / 1e6:,.0f} MB{loaded}")
    out.print(
        f"this machine, measured in this run: {result.matrix_rate / 1e9:,.0f} GFLOP/s float32 matrix product, "
        f"{result.copy_rate / 1e9:,.1f} GB/s copy"
    )


def _times(spread: Spread) -> tuple[str, str]:
    median, lower, upper = (_number(1e3 * x) for x in (spread.median, spread.lower_quartile, spread.upper_quartile))
    return median, f"{lower} to {upper}"


def _number(value: float) -> str:
    """Return a number with three digits or more, "-" for 0."""
    if value == 0:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
