"""What a trained network can be run with: bfloat16, torch.compile."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from hpetr import InputError
from hpetr.inference.precision import set_up_inference
from tiny_model import tiny_model


@torch.inference_mode()
def test_bfloat16_moves_poses_a_little_and_keeps_float32_results() -> None:
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = tiny_model().eval()(pixels)
    got = set_up_inference(tiny_model().eval(), "bfloat16")(pixels)
    assert got.poses.dtype == got.scores.dtype == torch.float32
    assert not torch.equal(got.proposal_logits, expected.proposal_logits)
    # proposals have no order that a rounding could change; an 8-bit mantissa is off by 1 in 256
    torch.testing.assert_close(got.proposal_logits, expected.proposal_logits, rtol=0.05, atol=0.1)


def test_freed_memory_is_not_asked_for_again() -> None:
    """Page faults of tensors of 64 MB, counted in a process of its own: the setting lasts."""
    script = """
import resource, torch
from hpetr.inference.precision import keep_freed_memory
kept = keep_freed_memory()
for _ in range(4):  # the heap grows a last time
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    if kept == "True":
        assert int(faults) < 8 * 2**26 / os.sysconf("SC_PAGESIZE") / 2  # without it every page of every tensor


def test_unknown_precision() -> None:
    with pytest.raises(InputError, match="precision is 'half', expected float32 or bfloat16"):
        set_up_inference(tiny_model(), "half")
