"""What happens beside the steps: the epoch's order, the averaged weights, the log file and the lines on the screen."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm
from transformers import TrainerCallback

from hpetr.errors import InputError
from hpetr.training.run import EVAL_PREFIX, LOG, log_line
from hpetr.training.trainer import PoseTrainer


class RunCallback(TrainerCallback):
    """Chooses the epoch's images, averages the weights, and keeps a log of one JSON object a line."""

    def __init__(self, trainer: PoseTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.set_epoch(math.floor(state.epoch or 0))

    def start_clock(self, *args, **kwargs):
        self.started = time.monotonic()

    # A step lasts from the end of the one before it, the loading of its images included; evaluations and checkpoints
    # are no part of it.
    on_train_begin = on_evaluate = on_save = start_clock

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.seconds += time.monotonic() - self.started
        self.trainer.steps += 1
        self.start_clock()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.network)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(log_line({"step": state.global_step, **(logs or {})}))
            except OSError as error:
                raise InputError(f"{path}: cannot be written ({error.strerror})") from error


class Console(TrainerCallback):
    """A progress bar with loss and AP where stderr is a terminal, else a line a log."""

    def __init__(self, *, terminal: bool):
        self.terminal = terminal
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.terminal:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, done=0, total=0, **kwargs):
        if self.bar is not None:
            self.bar.set_postfix({**self.shown, "evaluated": f"{done}/{total}"})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if (ap := logs.get(f"{EVAL_PREFIX}AP")) is not None:
            self.shown["AP"] = f"{ap:.4f}"
            figures = ", ".join(
                f"{k.removeprefix(EVAL_PREFIX)} {v:.3f}" for k, v in logs.items() if k.startswith(EVAL_PREFIX)
            )
            self.say(f"step {state.global_step}: {figures}")
        elif "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
            if self.bar is None:
                shown = ", ".join(f"{name} {value}" for name, value in self.shown.items())
                self.say(f"step {state.global_step} of {state.max_steps}: {shown}, {logs['step_seconds']:.2f} s a step")
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def say(self, line: str) -> None:
        """Print above the bar, or at once where there is none."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            typer.echo(line)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
