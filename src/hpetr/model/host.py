"""Copies between host and accelerator without synchronization.

An accelerator works through a queue. Most ways to move or read a number (`item`, `int`, `nonzero`, a boolean index,
`torch.tensor(..., device=...)`) empty that queue first, and the accelerator idles until the host has filled it again. A
training step waits once: for the matching costs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, through pinned memory, so that the copy is queued."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A queued copy of a tensor to the host; work that is queued before `wait` runs meanwhile."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def wait(self) -> np.ndarray:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor.numpy()
