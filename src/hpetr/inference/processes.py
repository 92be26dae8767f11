"""Several processes that work as one: exchange of values, and one error for all of them.

torchrun starts the processes and describes them in the environment. A single process forms no group, and every function
here is then trivial.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed

from hpetr.errors import InputError

T = TypeVar("T")
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(*, training: bool = False) -> None:
    """Form the group of the processes that torchrun started, unless it exists or there is only one process.

    Args:
        training: exchange gradients, through accelerate. Otherwise Python objects are exchanged, through gloo on any
            device.
    """
    if not distributed.is_available() or distributed.is_initialized():
        return
    if not all(name in os.environ for name in LAUNCH_VARIABLES) or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if training:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    else:
        distributed.init_process_group("gloo")
    # The threads of a group otherwise live until the process dies. If another process dies first, they can end this one
    # with "terminate called without an active exception" and exit code 134 after all work is done.
    atexit.register(leave)


def leave() -> None:
    """Leave the group, if there is one."""
    if _is_grouped():
        distributed.destroy_process_group()


def count() -> int:
    """Return the number of processes that work together."""
    return distributed.get_world_size() if _is_grouped() else 1


def rank() -> int:
    """Return this process's number, from 0; process 0 prints and writes."""
    return distributed.get_rank() if _is_grouped() else 0


def _is_grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather_to_first(value: T) -> list[T]:
    """Return the values of all processes by rank on the first process, and an empty list on the others."""
    if count() == 1:
        return [value]
    values: list[Any] | None = [None] * count() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values or []


def gather(value: T) -> list[T]:
    """Return the values of all processes by rank."""
    values: list[Any] = [value] * count()
    if count() > 1:
        distributed.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """Return the first process's value."""
    values = [value]
    if count() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def together(action: Callable[[], T]) -> T:
    """Run an action on every process and return its own result once all are done.

    Raises:
        InputError: a process raised it. All processes raise the first one's, so that none waits for another.
    """
    if count() == 1:
        return action()
    result, problem = None, None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    problems = [other for other in gather(problem) if other is not None]
    if problems:
        raise InputError(problems[0])
    return result  # type: ignore[return-value]


def claim_device(device: str) -> str:
    """Return the device of this process: of "auto" and "cuda" a GPU of its own, which becomes the current one.

    Raises:
        InputError: there are fewer GPUs than processes on this machine.
    """
    if count() == 1 or not (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        return device
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if place >= torch.cuda.device_count():
        raise InputError(
            f"device {device}: {torch.cuda.device_count()} GPUs here, expected one for each process; this is process "
            f"{place} of the machine, counted from 0"
        )
    torch.cuda.set_device(place)
    return f"cuda:{place}"
