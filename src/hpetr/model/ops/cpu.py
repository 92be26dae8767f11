"""The C kernels, compiled at first use and cached, and deformable sampling with them as two torch operators.

The operators work with autograd, `torch.compile` and inference mode. They rely on `hpetr.model.ops.deformable_sampling`
to have checked shapes, dtypes and devices.
"""

import array
import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hpetr.model.ops.operators import complete_operators

logger = logging.getLogger("hpetr")

# float16, and the gradients of bfloat16, are computed on a float32 copy.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_SOURCES = Path(__file__).parent / "csrc"
# -fno-trapping-math and -fno-math-errno drop exception flags and errno, so that floor() and selections vectorize. No
# flag lets the compiler change a value, as -ffast-math would for points on a pixel border.
_FLAGS = (
    "-std=gnu11 -O3 -fPIC -shared -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-psabi -Wno-unknown-pragmas"
).split()
# Tried in this order: Apple's compiler has no OpenMP, and some for Arm have no -march=native.
_EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
_lock = threading.Lock()
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


def _compiler() -> list[str]:
    """Return the command of the C compiler, from $CC or the path; empty without one."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command if shutil.which(command[0]) else []
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), [])


def _cpu_model() -> str:
    """Return a description of the CPU, as far as -march=native depends on it: unlike machines may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    keep = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join([platform.machine(), platform.processor(), *sorted({x for x in lines if x.startswith(keep)})])


def _cache_directory() -> Path:
    """Return $HPETR_CACHE, or `hpetr` in the user's cache folder; RuntimeError without a home directory."""
    if directory := os.environ.get("HPETR_CACHE"):
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpetr"


def _temporary_directory() -> Path:
    """Return a new folder that is removed when the process ends."""
    directory = tempfile.mkdtemp(prefix="hpetr-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


def _library(compiler: list[str], directory: Path) -> ctypes.CDLL:
    """Load the library, compiled into a folder unless an equal one is there.

    Raises:
        OSError: the folder cannot be used, or the library cannot be loaded from it.
        ValueError: the compiler fails.
    """
    sources = sorted(path for path in _SOURCES.iterdir() if path.suffix in (".c", ".h"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*(path.read_text() for path in sources), *compiler, version, *_FLAGS, repr(_EXTRA_FLAGS), _cpu_model()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    library = directory / f"kernels_cpu-{digest}.so"
    if library.exists():
        return ctypes.CDLL(str(library))
    directory.mkdir(parents=True, exist_ok=True)
    errors = ""
    # Another process may compile the same: each has a folder of its own and renames the result.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as build:
        output = Path(build) / library.name
        for extra in _EXTRA_FLAGS:
            command = [*compiler, *_FLAGS, *extra, *(str(x) for x in sources if x.suffix == ".c"), "-o", str(output)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return ctypes.CDLL(str(output.replace(library)))
            errors = errors or run.stderr.strip()
    raise ValueError(f"{compiler[0]} failed: {errors.splitlines()[0] if errors else 'no message'}")


def load() -> ctypes.CDLL | None:
    """Return the C library; None, after one warning in the log, if it cannot be compiled or loaded."""
    with _lock:
        return _load()


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        compiler = _compiler()
        if not compiler:
            raise ValueError("no C compiler found ($CC, cc, gcc, clang)")
        try:
            return _library(compiler, _cache_directory())
        except (OSError, RuntimeError):  # no home, a folder that is read-only or not executable, a broken file
            return _library(compiler, _temporary_directory())
    except (OSError, ValueError) as error:
        logger.warning("deformable sampling uses slow plain torch on the CPU: %s", error)
        return None


def call(name: str, sizes: bytes, *tensors: Tensor | None) -> None:
    """Call a C function with a packed struct of sizes and all its tensors, contiguous, in order."""
    library = load()
    assert library is not None, "kernel_name() did not choose the C kernel"
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p] * (1 + len(tensors))
    if function(sizes, *(None if x is None else x.data_ptr() for x in tensors)):
        raise MemoryError(f"{name}: out of memory for the threads' scratch space")


def _sample(name: str, value: Tensor, sides: Sequence[int], locations: Tensor, *tensors: Tensor) -> None:
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    shapes = array.array("q", sides)
    sizes = (batch, tokens, heads, width, levels, queries, points, torch.get_num_threads())
    call(name, struct.pack("8qP", *sizes, shapes.buffer_info()[0]), *tensors)  # `problem` in csrc/deformable_cpu.c


@torch.library.custom_op("hpetr::deformable_sampling", mutates_args=(), device_types="cpu")
def _forward(value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    stored_dtype = value.dtype if value.dtype in _SUFFIXES else compute_dtype
    stored = value.to(stored_dtype).contiguous()
    locations, weights = (x.to(compute_dtype).contiguous() for x in (locations, weights))
    output = stored.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])  # (B, Q, M*D)
    if output.numel():
        name = f"hpetr_forward_{_SUFFIXES[stored_dtype]}"
        _sample(name, stored, sides, locations, stored, locations, weights, output)
    return output.to(value.dtype)


@torch.library.custom_op("hpetr::deformable_sampling_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_output: Tensor, value: Tensor, sides: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute_dtype = torch.promote_types(value.dtype, torch.float32)
    inputs = [x.to(compute_dtype).contiguous() for x in (grad_output, value, locations, weights)]
    grads = [torch.zeros_like(inputs[1]), torch.empty_like(inputs[2]), torch.empty_like(inputs[3])]
    if grad_output.numel():
        _sample(f"hpetr_backward_{_SUFFIXES[compute_dtype]}", value, sides, locations, *inputs, *grads)
    return grads[0].to(value.dtype), grads[1].to(locations.dtype), grads[2].to(weights.dtype)


complete_operators(_forward, _backward)
