"""The folder of a training run: whole checkpoints or none, and a log without gaps or repetitions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hpetr.checkpoints.folder import load_config
from hpetr.errors import InputError, first_line
from hpetr.images.files import write_bytes
from hpetr.inference import processes
from hpetr.model.config import HPetrConfig
from hpetr.training.recipe import Recipe, load_recipe, recipe_values, recipe_yaml

LOG, RECIPE, STATE = "log.jsonl", "recipe.yaml", "trainer_state.json"
WEIGHTS, BEST = "model.safetensors", "best"  # the trained model, and the folder of the one with the best AP
EVAL_PREFIX = "eval_"  # transformers' mark of evaluations
UNFINISHED = ".unfinished"  # folder of folders that are being written
# Keys that may not change when a run is resumed: with others its checkpoint would mean something else.
FIXED = ("model.", "data.train.", "train.total_batch_size.", "train.seed.", "train.ema.")


Say = Callable[[str], None]


def say(line: str) -> None:
    """Print a line at once; a full disk or a closed pipe behind standard output does not stop a run."""
    with suppress(OSError):
        print(line, flush=True)


def publish(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name, and replace a folder of that name.

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
    """Remove the unfinished folders of a killed run; a folder that it was just replacing gets its name back."""
    for replaced in output.glob(".*.replaced"):
        final = output / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint of a run's folder, None before the first."""
    folder = get_last_checkpoint(str(output)) if output.is_dir() else None
    return None if folder is None else Path(folder)


def checkpoint_to_resume(output: Path, resume: str | Path | None, tell: Say | None = None) -> Path | None:
    """Return the checkpoint's folder that `resume` names ("auto", a folder, None), or None to start from the beginning.

    Args:
        tell: called with a line if a resumed run finds no checkpoint, or a new one replaces a log.

    Raises:
        InputError: the folder is no checkpoint, or the run would write over the checkpoints or the model of another.
    """
    newest, tell = newest_checkpoint(output), tell or (lambda line: None)
    trained = [name for name in (WEIGHTS, BEST) if (output / name).exists()]
    if resume is None:
        if newest is not None:
            raise InputError(f"output {output}: holds checkpoints of a run; pass --resume, or choose another output")
        if trained:
            raise InputError(f"output {output}: holds the model of a run ({trained[0]}); choose another output")
        if (output / LOG).exists():
            tell(f"output {output}: the log of a run without checkpoints is replaced")
        return None
    folder = newest if str(resume) == "auto" else Path(resume)
    if folder is None:
        if WEIGHTS in trained:
            raise InputError(f"resume {output}: holds a trained model and no checkpoint to resume from")
        tell(f"resume: no checkpoint in {output}, the run starts from the beginning")
        return None
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"resume {folder}: expected the folder of a checkpoint with {STATE}")
    try:
        state = TrainerState.load_from_json(str(path))
        "".join(map(log_line, state.log_history))
    except Exception as error:  # JSON of any content
        raise InputError(f"{path}: is not the state of a training ({first_line(error)})") from error
    return folder


@contextmanager
def own_folder(output: Path, *, active: bool) -> Iterator[None]:
    """Keep other runs out of a run's folder; a killed run leaves it free.

    Args:
        active: whether this process writes; the others of a run do nothing here.

    Raises:
        InputError: another run is writing there, on any of the run's processes.
    """
    lock = FileLock(output / ".lock")

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"output {output}: another run is writing there, choose another output") from None
        except (OSError, NotImplementedError):
            pass  # a file system without locks

    processes.together(acquire if active else lambda: None)
    try:
        yield
    finally:
        lock.release()
        if active:
            Path(lock.lock_file).unlink(missing_ok=True)


class Interrupted(KeyboardInterrupt):
    """The stop of a run by Ctrl+C or a signal; the message names the checkpoint to resume from.

    Attributes:
        signal: its number.
    """

    def __init__(self, output: Path, number: int) -> None:
        self.signal, checkpoint = number, newest_checkpoint(output)
        where = "no checkpoint is there yet" if checkpoint is None else f"{checkpoint} is saved"
        advice = "" if checkpoint is None else "; the same command with --resume continues there"
        super().__init__(f"interrupted: {where}{advice}")


def check_same_run(checkpoint: Path, recipe: Recipe, config: HPetrConfig) -> None:
    """Raise `InputError` if the checkpoint is of another model, or the run's recipe had other values."""
    ours, theirs = (c.to_dict() for c in (config, load_config(checkpoint)))
    ignored = {"transformers_version", "dtype", "architectures", "_name_or_path"}
    for key in sorted(ours.keys() - ignored):
        if ours[key] != theirs.get(key):
            values = "" if isinstance(ours[key], dict) else f" {theirs.get(key)!r}, the recipe's {ours[key]!r}"
            raise InputError(f"resume {checkpoint}: is of another model than the recipe's: {key}{values}")
    written = checkpoint.parent / RECIPE
    if not written.is_file():
        return
    before, now = (_flat(recipe_values(each)) for each in (load_recipe(written), recipe))
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if f"{key}.".startswith(FIXED) and old != new:
            raise InputError(f"resume {checkpoint}: {key} was {old!r} in this run, expected the same, got {new!r}")


def _flat(values: Any, key: str = "") -> dict[str, Any]:
    """Return the innermost values of nested dicts and lists by their dotted keys."""
    if not isinstance(values, dict | list) or not values:
        return {key: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    start = f"{key}." if key else ""
    return {inner: value for name, each in items for inner, value in _flat(each, f"{start}{name}").items()}


def write_recipe(recipe: Recipe) -> None:
    """Write the recipe, with all its defaults, into the run's folder."""
    write_bytes(recipe.output / RECIPE, recipe_yaml(recipe).encode())


def log_line(entry: dict[str, Any]) -> str:
    """Return a line of the log: the step first, evaluations under the metrics' own names."""
    rest = {name.removeprefix(EVAL_PREFIX): value for name, value in entry.items() if name != "step"}
    return json.dumps({"step": entry["step"], **rest}) + "\n"


def restore_log(output: Path, checkpoint: Path | None) -> None:
    """Reset the log to its state at the time of the checkpoint; without a checkpoint start a new one.

    A killed run may have logged more, and not have finished its last line.
    """
    history = [] if checkpoint is None else json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]
    write_bytes(output / LOG, "".join(map(log_line, history)).encode())
