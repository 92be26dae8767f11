"""The Triton kernel: that it is right (in Triton's interpreter), that it compiles, and when it is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_python(*arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if k not in ("HPETR_KERNEL", "TRITON_INTERPRET")}
    variables |= {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


@needs_triton
def test_right_in_the_interpreter(tmp_path):
    cases = Path(__file__).with_name("interpreted_triton.py")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases))
    run = run_python(*arguments, TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hpetr.model.ops import gpu

def local_arrays(kernel, value_type, capability):
    constants = dict(HEADS=8, WIDTH=32, LEVELS=4, POINTS=4, BLOCK=16, CHANNELS=32, INDEX=tl.int32)
    signature = {name: "*" + value_type for name in kernel.arg_names}
    signature |= {name: "*fp32" for name in kernel.arg_names if "locations" in name or "weights" in name}
    signature |= {"grad_value_pointer": "*fp32"} if "grad_value_pointer" in signature else {}
    signature |= {"sides": ("fp32",) * 8, "tokens": "i32", "queries": "i32"} | {name: "constexpr" for name in constants}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": gpu._WARPS})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"].count(".local ")

print(local_arrays(gpu._forward_kernel, "bf16", 90), local_arrays(gpu._backward_kernel, "bf16", 90))
"""


@needs_triton
def test_compiles_to_machine_code_without_a_gpu(tmp_path):
    # what the interpreter takes and the compiler refuses (types, layouts) shows up here; nothing may leave registers
    run = run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert run.stdout.split() == ["0", "0"], run.stderr


def test_the_cpu_leaves_triton_alone():
    # `hpetr.model.ops` brings in torch's compiler, which imports Triton, where it is installed, on its own account
    script = """
import sys, hpetr
print("triton" in sys.modules)
import torch
from hpetr.model.ops import kernel_name
kernel_name("cpu", torch.float32)
print("hpetr.model.ops.gpu" in sys.modules)
"""
    run = run_python("-c", script)
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_triton), False])
def test_gpu_without_working_triton_is_said_once(tmp_path, installed):
    # no CUDA here, as on a machine whose Triton or compiler is broken; or no Triton at all
    script = f"""
import logging, sys, torch
logging.basicConfig(format="LOG %(message)s")
if not {installed}: sys.modules["triton"] = None
from hpetr.model.ops import kernel_name
print(*(kernel_name("cuda:63", torch.float32) for _ in range(3)))
"""
    run = run_python("-c", script, TRITON_CACHE_DIR=str(tmp_path))
    assert run.stdout.split() == ["reference"] * 3, run.stderr
    log = [line for line in run.stderr.splitlines() if line.startswith("LOG")]
    assert len(log) == 1, log
    assert "slow plain torch" in log[0]
