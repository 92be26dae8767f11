"""What a training run leaves behind: whole folders or none, and a log without gaps or repetitions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hpetr.checkpoints.folder import load_config
from hpetr.errors import InputError
from hpetr.images.files import write_bytes
from hpetr.model.config import HPetrConfig
from hpetr.training.recipe import Recipe, load_recipe, recipe_values, recipe_yaml

LOG, RECIPE, STATE = "log.jsonl", "recipe.yaml", "trainer_state.json"
EVAL_PREFIX = "eval_"  # transformers' mark of evaluations
UNFINISHED = ".unfinished"  # folder of folders that are being written
# Keys that may not change when a run goes on: with others its checkpoint would mean something else.
FIXED = ("model", "data.train", "train.total_batch_size", "train.seed", "train.ema")


def publish(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name; whatever had the name is replaced.

    The files are on the disk before the name changes, so that a power cut leaves the old folder or the new one.
    """
    for path in (*unfinished.iterdir(), unfinished):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_unfinished(output: Path) -> None:
    """Remove what a killed run did not finish; a folder that it was just replacing gets its name back."""
    for replaced in output.glob(".*.replaced"):
        final = output / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def checkpoint_to_resume(output: Path, resume: str | Path | None) -> Path | None:
    """The checkpoint's folder that `resume` means ("auto", a folder, None), or None to start from the beginning.

    Raises:
        InputError: the folder is no checkpoint, or a new run would write over the checkpoints of another.
    """
    if resume is None:
        if output.is_dir() and get_last_checkpoint(str(output)):
            raise InputError(f"output {output}: holds checkpoints of a run; pass --resume, or choose another output")
        return None
    folder: str | Path | None = resume
    if str(resume) == "auto":
        folder = get_last_checkpoint(str(output)) if output.is_dir() else None
    if folder is None:
        return None
    path = Path(folder) / STATE
    if not path.is_file():
        raise InputError(f"resume {folder}: expected the folder of a checkpoint with {STATE}")
    try:
        state = TrainerState.load_from_json(str(path))
        "".join(map(log_line, state.log_history))
    except Exception as error:  # JSON of any content
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is not what a training writes ({reason})") from error
    return Path(folder)


def check_same_run(checkpoint: Path, recipe: Recipe, config: HPetrConfig) -> None:
    """Raise `InputError` where the checkpoint is of another model, or the run's recipe said something else."""
    ours, theirs = (c.to_dict() for c in (config, load_config(checkpoint)))
    ignored = {"transformers_version", "dtype", "architectures", "_name_or_path"}
    for key in sorted(ours.keys() - ignored):
        if ours[key] != theirs.get(key):
            values = "" if isinstance(ours[key], dict) else f" {theirs.get(key)!r}, the recipe's {ours[key]!r}"
            raise InputError(f"resume {checkpoint}: is of another model than the recipe's: {key}{values}")
    written = checkpoint.parent / RECIPE
    if not written.is_file():
        return
    before, now = recipe_values(load_recipe(written)), recipe_values(recipe)
    for key in FIXED:
        old, new = (_value(values, key) for values in (before, now))
        if old != new:
            where, old, new = _first_difference(old, new, key)
            raise InputError(f"resume {checkpoint}: {where} was {old!r} in this run, expected the same, got {new!r}")


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _first_difference(old: Any, new: Any, key: str) -> tuple[str, Any, Any]:
    """The innermost key of two unequal values where they differ, and its values."""
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [(name, old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(place, *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    for name, ours, theirs in parts:
        if ours != theirs:
            return _first_difference(ours, theirs, f"{key}.{name}")
    return key, old, new


def write_recipe(recipe: Recipe) -> None:
    """Keep the recipe, with all its defaults, in the run's folder."""
    write_bytes(recipe.output / RECIPE, recipe_yaml(recipe).encode())


def log_line(entry: dict[str, Any]) -> str:
    """A line of the log: the step first, evaluations under the figures' own names."""
    rest = {name.removeprefix(EVAL_PREFIX): value for name, value in entry.items() if name != "step"}
    return json.dumps({"step": entry["step"], **rest}) + "\n"


def restore_log(output: Path, checkpoint: Path | None) -> None:
    """Put the log back to what it was when the checkpoint was written; without a checkpoint start a new one.

    A killed run may have logged more, and not have finished its last line.
    """
    history = [] if checkpoint is None else json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]
    write_bytes(output / LOG, "".join(map(log_line, history)).encode())
