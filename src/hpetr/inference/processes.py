"""Several processes that work as one: what they exchange, and one error for all of them.

torchrun starts the processes and says so in the environment. Where there is only one, everything here is the plain
thing: it takes no process group and costs nothing.
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
    """Form the group of the processes that torchrun started, unless there is one (or only one process).

    Args:
        training: gradients will be exchanged, which accelerate sets up. Otherwise Python objects are, for which gloo
            does wherever the models are.
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
        # gloo's threads otherwise live until the process dies, and where another process is gone first, they can end
        # this one with "terminate called without an active exception" and exit code 134 after all work is done.
        atexit.register(_leave)


def _leave() -> None:
    if _grouped():
        distributed.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if _grouped() else 1


def rank() -> int:
    """This process's number, from 0; the first prints and writes."""
    return distributed.get_rank() if _grouped() else 0


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather_to_first(value: T) -> list[T]:
    """Everybody's value, by rank, on the first process; an empty list on the others."""
    if count() == 1:
        return [value]
    values: list[Any] | None = [None] * count() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values or []


def gather(value: T) -> list[T]:
    """Everybody's value, by rank, on every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """The first process's value, on every process."""
    if count() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def together(action: Callable[[], T]) -> T:
    """What `action` gives on this process, once it is done on all of them.

    Raises:
        InputError: it was raised on a process. Every process raises the first one's, so that none is left waiting.
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
    """The device of this process: with several on a machine "auto" and "cuda" mean a GPU for each of them.

    It also becomes the current GPU, on which kernels run that are not told another.
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
