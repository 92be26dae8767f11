"""Shared by all tests."""

import torch

# With pytest-xdist every process would otherwise take all cores.
torch.set_num_threads(1)
