"""Callbacks of a run: the epoch's order, the averaged weights, the log file, the lines on the screen, and signals."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from tqdm import tqdm
from transformers import TrainerCallback

from hpetr.errors import InputError
from hpetr.inference import processes
from hpetr.training.run import EVAL_PREFIX, LOG, log_line, say
from hpetr.training.trainer import PoseTrainer


class RunCallback(TrainerCallback):
    """Choose the epoch's images, average the weights, and keep a log of one JSON object a line."""

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
    """Show a progress bar with loss and AP if stderr is a terminal, else a line for each log."""

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
            metrics = [f"{k.removeprefix(EVAL_PREFIX)} {v:.3f}" for k, v in logs.items() if k.startswith(EVAL_PREFIX)]
            self.say(f"step {state.global_step}: {', '.join(metrics)}")
        elif "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
            if self.bar is None:
                shown = ", ".join(f"{name} {value}" for name, value in self.shown.items())
                self.say(f"step {state.global_step} of {state.max_steps}: {shown}, {logs['step_seconds']:.2f} s a step")
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def say(self, line: str) -> None:
        """Print above the bar, if there is one."""
        with suppress(OSError):
            say(line) if self.bar is None else self.bar.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopOnSignal(TrainerCallback):
    """Stop after the current step and save a checkpoint at the first Ctrl+C or SIGTERM.

    A second one stops a single process at once. Of several processes all stop after the same step.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal
        self.handlers: dict[int, Any] = {}
        self.shared: torch.Tensor | None = None  # the highest number on any process, after the step before

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Receive the signals inside the block; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.restore()

    def restore(self) -> None:
        """Put the former handlers back."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal. torchrun repeats those of the terminal, so several processes ignore further ones."""
        if not self.number and processes.rank() == 0:
            with suppress(OSError):
                os.write(2, b"stopping after this step ...\n")  # print cannot be called while it prints
        self.number = number
        if processes.count() == 1:
            self.restore()

    def on_step_end(self, args, state, control, **kwargs):
        number = self.number
        if processes.count() > 1:
            # Read a step later, when the exchange is done: no step waits for it.
            number = 0 if self.shared is None else int(self.shared.item())
            self.shared = torch.tensor(self.number, device=args.device)
            distributed.all_reduce(self.shared, distributed.ReduceOp.MAX)
        if number:
            self.number = number
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False
