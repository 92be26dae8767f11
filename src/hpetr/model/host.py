"""Copies between host and accelerator that nobody waits for.

An accelerator works through a queue of its own. Most ways to move or look at a number (`item`, `int`, `nonzero`, a
boolean index, `torch.tensor(..., device=...)`) empty that queue first, and the accelerator idles until the host has
filled it again. A training step waits once: for the matching costs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, through pinned memory: the copy takes its place in the queue."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host; what is queued between the start and `wait` runs meanwhile."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def wait(self) -> np.ndarray:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor.numpy()
