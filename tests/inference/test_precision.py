"""What a trained network can be run with: bfloat16, torch.compile."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpetr import InputError
from hpetr.inference.precision import autocast, check_precision
from tiny_model import tiny_model


@torch.inference_mode()
def test_bfloat16_moves_poses_a_little_and_keeps_float32_results() -> None:
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = tiny_model().eval()(pixels)
    with autocast(pixels.device, "bfloat16"):
        got = tiny_model().eval()(pixels)
    assert got.poses.dtype == got.scores.dtype == torch.float32
    assert not torch.equal(got.proposal_logits, expected.proposal_logits)
    # proposals have no order that a rounding could change; an 8-bit mantissa is off by 1 in 256
    torch.testing.assert_close(got.proposal_logits, expected.proposal_logits, rtol=0.05, atol=0.1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux alone shows the memory in use")
def test_freed_memory_stays() -> None:
    """In a process of its own: the setting lasts."""
    script = """
from pathlib import Path
import os, torch
from hpetr.inference.precision import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
kept = keep_freed_memory()
before = resident()
torch.ones(2**24)
print(kept, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, growth = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    assert (int(growth) > 2**25) == (kept == "True")  # of a freed tensor of 2^26 bytes


def test_unknown_precision() -> None:
    with pytest.raises(InputError, match="precision is 'half', expected float32 or bfloat16"):
        check_precision("half")
